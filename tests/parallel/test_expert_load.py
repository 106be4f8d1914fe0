"""The load of experts and ranks, as counted, against the reference's router and the rows that ranks
have really computed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from mpi4py import MPI
from tiny_models import tiny_config
from toys import mesh_of, oracle, toy

from mpishard.communication.collectives import all_gather
from mpishard.communication.mesh import Mesh
from mpishard.config.layout import TOKEN_DISPATCHERS, Layout, block
from mpishard.engine.generate import generate
from mpishard.engine.sampling_params import SamplingParams
from mpishard.engine.scheduler import SchedulerConfig
from mpishard.engine.sequence import Request, RequestOutput
from mpishard.model import Decoder
from mpishard.parallel import expert
from mpishard.parallel.data import assign_requests
from mpishard.parallel.expert import MoELayer
from mpishard.parallel.expert_load import PHASES, ExpertLoad, imbalance

VARIANT = "qwen2_moe-mixed"  # experts in one of four layers
LAYOUTS = {
    1: [Layout()],
    2: [Layout(dp=2), Layout(tp=2, ep=2), Layout(dp=2, ep=2)],
    4: [Layout(tp=2, cp=2, ep=2, sequence_parallel=True), Layout(tp=2, dp=2, ep=4)],
}


def requests() -> list[Request]:
    """Of different lengths, more than replicas."""
    random = np.random.RandomState(2)
    return [
        Request(
            index, random.randint(0, 65, length).tolist(), SamplingParams(max_tokens=max_tokens)
        )
        for index, (length, max_tokens) in enumerate([(9, 3), (4, 5), (6, 1)])
    ]


def answers_of(model: Decoder) -> list[RequestOutput]:
    """The answers to this replica's requests, prompts in chunks of which the last may be a single
    token."""
    mine = [requests()[place] for place in assign_requests(len(requests()), model.mesh)]
    return generate(model, mine, limits=SchedulerConfig(chunked_prefill_size=4))


def expected_rows() -> dict[tuple[int, str, int], int]:
    """The rows of (layer, phase, expert), from the reference's routings of whole sequences."""
    reference, rows = oracle(VARIANT), Counter[tuple[int, str, int]]()
    for request in requests():
        ids = request.ids + reference.greedy(request.ids, request.params.max_tokens)[:-1]
        for layer, routing in reference.routings(ids).items():
            for position, experts_A in enumerate(routing.experts_SA.tolist()):
                phase = PHASES[position >= len(request.ids)]
                rows.update((layer, phase, expert) for expert in experts_A)
    return rows


@pytest.mark.ranks(1, 2, 4)
@pytest.mark.parametrize("dispatch", TOKEN_DISPATCHERS)
def test_the_rows_of_experts_and_ranks(comm: MPI.Intracomm, dispatch: str, monkeypatch):
    expected, moe = expected_rows(), tiny_config(VARIANT).moe
    assert moe is not None
    computed = [0]
    right = expert.partial_experts

    def counted(rows_BD: np.ndarray, expert_B: np.ndarray, w: MoELayer) -> np.ndarray:
        computed[0] += len(rows_BD)
        return right(rows_BD, expert_B, w)

    monkeypatch.setattr(expert, "partial_experts", counted)
    for layout in LAYOUTS[comm.size]:
        with mesh_of(comm, VARIANT, replace(layout, moe_token_dispatcher=dispatch)) as mesh:
            computed[0], load = 0, ExpertLoad()
            answers_of(toy(VARIANT, mesh).map_moe_layers(load.attach))
            mesh.ledger.clear()
            totals = load.totals(mesh)
            assert {(rows.layer, rows.phase) for rows in totals} == {
                (layer, phase) for layer in np.flatnonzero(moe.layers) for phase in PHASES
            }
            for rows in totals:
                found = dict(enumerate(rows.tokens_per_expert))
                right_E = {e: expected[rows.layer, rows.phase, e] for e in range(moe.num_experts)}
                assert found == right_E, f"{layout}, {rows.phase}"
                assert rows.dropped == 0
            everyone = all_gather(np.array([computed[0]]), mesh.world).tolist()
            assert np.sum([rows.tokens_per_rank for rows in totals], axis=0).tolist() == everyone


@pytest.mark.ranks(2)
def test_counting_communicates_nothing_before_the_end(comm: MPI.Intracomm):
    with mesh_of(comm, VARIANT, Layout(tp=2, ep=2)) as mesh:
        model = toy(VARIANT, mesh)
        calls = [_calls(mesh, model), _calls(mesh, model.map_moe_layers(ExpertLoad().attach))]
        assert calls[0] == calls[1]


def _calls(mesh: Mesh, model: Decoder) -> dict[tuple[str, str], tuple[int, float]]:
    mesh.ledger.clear()
    answers_of(model)
    return {(what, group): (e.calls, e.wire_bytes) for what, group, e in mesh.ledger}


@pytest.mark.ranks(1, 2)
def test_dropped_rows_are_counted_apart(comm: MPI.Intracomm):
    expected, moe = expected_rows(), tiny_config(VARIANT).moe
    assert moe is not None
    for layout in (Layout(tp=comm.size, ep=comm.size), Layout(dp=comm.size)):
        with mesh_of(comm, VARIANT, replace(layout, expert_capacity_factor=0.5)) as mesh:
            load = ExpertLoad()
            answers_of(toy(VARIANT, mesh).map_moe_layers(load.attach))
            dropped = 0
            for rows in load.totals(mesh):
                if rows.phase == "prefill":  # generated tokens may be others where rows are dropped
                    of_all = sum(expected[rows.layer, "prefill", e] for e in range(moe.num_experts))
                    assert sum(rows.tokens_per_expert) + rows.dropped == of_all
                    dropped += rows.dropped
                owners = [block(moe.num_experts, mesh.ep.size, r) for r in range(mesh.ep.size)]
                if mesh.layout.dp == 1:
                    assert rows.tokens_per_rank == [
                        sum(rows.tokens_per_expert[own]) for own in owners
                    ]
            assert dropped > 0


@pytest.mark.ranks(2)
def test_layers_come_in_their_order_and_prefill_before_decode(comm: MPI.Intracomm):
    variant = "qwen3_moe-plain"
    with mesh_of(comm, variant, Layout(tp=2, ep=2)) as mesh:
        load = ExpertLoad()
        model = toy(variant, mesh).map_moe_layers(load.attach)
        order = [(rows.layer, rows.phase) for rows in load.totals(mesh)]
        assert order == [(layer, phase) for layer in range(model.config.layers) for phase in PHASES]


def test_the_imbalance_is_the_most_over_the_mean():
    assert imbalance([3, 1, 2, 2]) == 1.5
    assert imbalance([0, 0]) is None
