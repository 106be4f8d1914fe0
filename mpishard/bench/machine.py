"""The machine and the libraries that a report is of."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from mpi4py import MPI

from mpishard.api import Model
from mpishard.arithmetic.gemm import KERNELS


def environment(model: Model) -> dict[str, Any]:
    numpy_built: Any = np.show_config(mode="dicts")
    blas = numpy_built["Build Dependencies"]["blas"]
    threads = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS")
    library, version = MPI.get_vendor()
    return {
        "model": str(model.path),
        "layout": str(model.mesh.layout),
        "ranks": model.mesh.world.size,
        "threads": int(threads) if threads else len(os.sched_getaffinity(0)),
        "dtype": str(model.decoder.dtype),
        "numpy": np.__version__,
        "blas": f"{blas['name']} {blas['version']}",
        "blas_kernels": KERNELS,
        "mpi": f"{library} {'.'.join(map(str, version))}",
    }
