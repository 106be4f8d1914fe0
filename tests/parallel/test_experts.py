"""Expert parallelism: what is sent against its closed form, and routers that send all to one.

What mixtures compute on every layout is in `test_model`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from mpi4py import MPI
from sweep import moe_layouts, over
from tiny_models import tiny_config, tiny_weights
from toys import mesh_of, meshes, oracle, tokens_of_ranks, toy

from mpishard.communication.mesh import Mesh
from mpishard.config.layout import TOKEN_DISPATCHERS, Layout, block
from mpishard.config.model_config import ModelConfig
from mpishard.engine.generate import generate
from mpishard.engine.sampling_params import SamplingParams
from mpishard.engine.sequence import Request
from mpishard.parallel.expert import MoELayer
from mpishard.reference import Reference
from mpishard.sequences.step import pack

pytestmark = pytest.mark.ranks


@over(moe_layouts)
def test_what_is_sent(comm: MPI.Intracomm, variant: str):
    """Rows by the experts that the reference's router chooses, token by token."""
    config = tiny_config(variant)
    ids = np.random.RandomState(3).randint(0, config.vocab, 13)
    routings = oracle(variant).routings(ids.tolist()).values()
    chosen = [routing.experts_SA for routing in routings]
    for mesh in meshes(comm, variant, moe_layouts(comm.size, variant)):
        model = toy(variant, mesh)
        feeds = [(ids, model.allocate_cache(len(ids)))] if mesh.dp.rank == 0 else []
        model.forward(pack(feeds, model.sequence_sharding))
        tokens = tokens_of_ranks(mesh, model, len(ids))  # of every rank that shares the experts
        check = gathered if mesh.layout.moe_token_dispatcher == "all-gather" else dispatched
        check(mesh, config, tokens, chosen)


def gathered(
    mesh: Mesh, config: ModelConfig, tokens: list[np.ndarray], chosen: list[np.ndarray]
) -> None:
    """Every token goes to all ranks, with its experts and their weights, and one sum comes back."""
    assert config.moe is not None
    row, e, here = config.hidden * 8, 8, len(tokens[mesh.moe.rank])
    per_layer = (8 + here * (row + config.moe.top_k * (8 + e))) * (mesh.moe.size - 1)
    entry = mesh.ledger["all_gather", "moe"]
    assert entry.calls == 4 * len(chosen)
    assert entry.wire_bytes == per_layer * len(chosen)
    others = sum(map(len, tokens)) - here
    assert mesh.ledger["reduce_scatter", "moe"].wire_bytes == others * row * len(chosen)


def dispatched(
    mesh: Mesh, config: ModelConfig, tokens: list[np.ndarray], chosen: list[np.ndarray]
) -> None:
    """A row goes to each expert elsewhere that its token chose, and one comes back."""
    assert config.moe is not None
    experts, row = config.moe.num_experts, config.hidden * 8
    counts = 8 * experts * (mesh.moe.size - 1) * len(chosen)
    assert mesh.ledger["all_gather", "moe"].calls == len(chosen)
    assert mesh.ledger["all_gather", "moe"].wire_bytes == counts
    own = range(experts)[block(experts, mesh.ep.size, mesh.ep.rank)]
    column = [tokens[rank * mesh.etp.size + mesh.etp.rank] for rank in range(mesh.ep.size)]
    wire = came = 0
    for experts_SA in chosen:
        coming = [int(np.isin(experts_SA[there], own).sum()) for there in column]
        leaving = int((~np.isin(experts_SA[tokens[mesh.moe.rank]], own)).sum())
        wire += leaving + sum(coming) - coming[mesh.ep.rank]
        came += sum(coming)
    entry = mesh.ledger["all_to_all", "ep"]
    assert entry.calls == 2 * len(chosen)
    assert entry.wire_bytes == wire * row
    assert mesh.ledger["all_gather", "etp"].payload_bytes == came * row


@pytest.mark.ranks(2)
def test_all_tokens_for_one_expert_and_none_for_the_others(comm: MPI.Intracomm):
    """A router that always chooses the same: other ranks have nothing to do, and take part."""
    variant = "mixtral-full"
    weights = tiny_weights(variant)
    for name in weights:
        if name.endswith("gate.weight"):
            weights[name][:] = 0
    right = Reference(tiny_config(variant), weights).greedy([5], 3)
    for dispatch in TOKEN_DISPATCHERS:
        for layout in (Layout(tp=2, ep=2), Layout(tp=2, ep=1), Layout(dp=2, ep=2)):
            with mesh_of(comm, variant, replace(layout, moe_token_dispatcher=dispatch)) as mesh:
                model = toy(variant, mesh)
                for layer in model.layers:
                    assert isinstance(layer.ffn, MoELayer)
                    layer.ffn.gate.weight[:] = 0  # equal scores: the lowest experts are taken
                request = Request(0, [5], SamplingParams(max_tokens=3))
                mine = [request][: 1 if mesh.dp.rank == 0 else 0]
                answers = generate(model, mine)
                assert [a.ids for a in answers] == [right for _ in mine]
