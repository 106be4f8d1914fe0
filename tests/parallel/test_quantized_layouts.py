"""Models in every storage form, read by ranks whose parts end within blocks and words, against the
reference with the numbers that the codes mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI
from quantized_models import MODELS, plain, prompt_of, write_quantized
from toys import whole_logits

from mpishard.communication.mesh import Mesh
from mpishard.config.layout import Layout
from mpishard.model import Decoder
from mpishard.reference import Reference
from mpishard.sequences.step import pack
from mpishard.storage.source import open_source
from mpishard.storage.weights import load_weights

LAYOUTS = {3: [Layout(tp=3)], 4: [Layout(tp=4), Layout(tp=2, cp=2, sequence_parallel=True)]}


@pytest.mark.ranks(3, 4)
@pytest.mark.parametrize("form", MODELS)
def test_every_layout_agrees_with_the_reference(
    comm: MPI.Intracomm, mpi_tmp_path: Path, form: str
) -> None:
    if comm.rank == 0:
        write_quantized(form, mpi_tmp_path)
    comm.Barrier()
    source, ids = open_source(mpi_tmp_path), prompt_of(form)
    expected_SV, _ = Reference(source.config, plain(form)).forward(ids)
    for layout in LAYOUTS[comm.size]:
        mesh = Mesh.split(comm, layout, source.config)
        shards = load_weights(source, mesh.weight_sharding, mesh.shard_index, np.float64)
        model = Decoder(source.config, shards, mesh)
        feeds = [(np.array(ids), model.allocate_cache(len(ids)))]
        step = pack(feeds, model.sequence_sharding, all_logits=True)
        found_SV = whole_logits(model.forward(step), model, step)
        np.testing.assert_allclose(found_SV, expected_SV, rtol=0, atol=1e-9)
        mesh.free()
