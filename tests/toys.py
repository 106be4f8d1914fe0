"""Tiny models divided over a mesh, for the tests that run on several ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from mpi4py import MPI
from tiny_models import VARIANTS, tiny_config, tiny_weights

from mpishard.arithmetic.packed import Step
from mpishard.communication.collectives import all_gather
from mpishard.communication.mesh import Mesh
from mpishard.description.layout import Layout, block_sizes
from mpishard.description.partition import weight_table
from mpishard.model import Decoder, Observer
from mpishard.reference import Reference


def layouts(ranks: int) -> list[Layout]:
    """Every layout of `ranks` ranks."""
    return [Layout(tp=tp, dp=ranks // tp) for tp in range(1, ranks + 1) if ranks % tp == 0]


def meshes(comm: MPI.Intracomm, variant: str) -> Iterator[Mesh]:
    """A mesh of each layout of the ranks of `comm` that `variant` has query heads for."""
    for layout in layouts(comm.size):
        if layout.tp <= VARIANTS[variant]["num_attention_heads"]:
            mesh = Mesh.split(comm, layout)
            yield mesh
            mesh.tp.comm.Free()
            mesh.dp.comm.Free()


def toy(variant: str, mesh: Mesh, dtype: type = np.float64) -> Decoder:
    """`variant` on this rank of `mesh`, cut by the partition table."""
    config, weights = tiny_config(variant), tiny_weights(variant, dtype)
    tp = mesh.tp
    shards = {
        weight.name: weights[weight.name][weight.slices(config, tp.size, tp.rank)]
        for weight in weight_table(config)
    }
    return Decoder(config, shards, mesh)


class Recorder(Decoder):
    """A model that keeps every step it is fed, and what it answers."""

    def __init__(self, model: Decoder) -> None:
        self.__dict__.update(model.__dict__)
        self.steps: list[Step] = []
        self.logits: list[np.ndarray] = []

    def forward(self, step: Step, observe: Observer | None = None) -> np.ndarray:
        self.steps.append(step)
        self.logits.append(super().forward(step, observe))
        return self.logits[-1]


def oracle(variant: str, dtype: type = np.float64) -> Reference:
    """The reference of `variant`."""
    return Reference(tiny_config(variant), tiny_weights(variant), dtype)


def whole_logits(logits_Mv: np.ndarray, model: Decoder) -> np.ndarray:
    """The logits of all ranks' blocks of the vocabulary: (M, V)."""
    tp = model.mesh.tp
    sizes = block_sizes(model.config.vocab, tp.size)
    return all_gather(logits_Mv, tp, axis=1, sizes=sizes)
