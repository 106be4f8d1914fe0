"""Routing recorded on one layout and replayed on others, whose routers would choose otherwise."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from mpi4py import MPI
from tiny_models import tiny_config
from toys import Recorder as TimedDecoder
from toys import mesh_of, oracle, toy, whole_logits

from mpishard.communication.mesh import Mesh
from mpishard.config.layout import TOKEN_DISPATCHERS, Layout
from mpishard.engine.generate import generate
from mpishard.engine.sampling_params import SamplingParams
from mpishard.engine.scheduler import SchedulerConfig
from mpishard.engine.sequence import Request
from mpishard.errors import UserError
from mpishard.model import Decoder
from mpishard.parallel.data import assign_requests
from mpishard.parallel.expert import MoELayer
from mpishard.parallel.router_replay import RoutingRecorder, replay_layer
from mpishard.storage.routing_trace import RoutingTrace

pytestmark = pytest.mark.ranks(1, 2, 4)

VARIANT = "qwen2_moe-shared"
LAYOUTS = {
    1: [Layout()],
    2: [Layout(tp=2, ep=2), Layout(cp=2, sequence_parallel=True), Layout(dp=2, ep=2)],
    4: [
        Layout(tp=2, cp=2, ep=4),
        Layout(tp=4, ep=2, sequence_parallel=True, moe_token_dispatcher="all-gather"),
        Layout(tp=2, dp=2, ep=4),
        Layout(dp=4),
    ],
}
NAMES = ("a", "b", "c")


def requests() -> list[Request]:
    """Of different lengths, for any number of replicas."""
    random = np.random.RandomState(6)
    vocab = tiny_config(VARIANT).vocab
    return [
        Request(
            index, random.randint(0, vocab, length).tolist(), SamplingParams(max_tokens=max_tokens)
        )
        for index, (length, max_tokens) in enumerate([(9, 4), (5, 6), (11, 2)])
    ]


def run(model: Decoder, mesh: Mesh) -> tuple[list[list[int]], dict[tuple[int, ...], np.ndarray]]:
    """The answers to this replica's requests, and the logits after each sequence so far."""
    watched = TimedDecoder(model)
    mine = [requests()[place] for place in assign_requests(len(NAMES), mesh)]
    answers = generate(watched, mine, limits=SchedulerConfig(chunked_prefill_size=6))
    sequences = [r.ids + answer.ids for r, answer in zip(mine, answers, strict=True)]
    segments = [segment for step in watched.steps for segment in step.segments]
    caches = list({id(segment.cache): segment.cache for segment in segments}.values())
    logits = {}
    for step, logits_Mv, asked in zip(watched.steps, watched.logits, watched.asked, strict=True):
        logits_MV = whole_logits(logits_Mv, watched, step)
        for logits_V, (cache, length) in zip(logits_MV, asked, strict=True):
            logits[tuple(sequences[caches.index(cache)][:length])] = logits_V
    return [answer.ids for answer in answers], logits


def recorded(model: Decoder, mesh: Mesh) -> RoutingTrace | None:
    """What the routers decide on the ranks of `mesh`, on the first."""
    recorder = RoutingRecorder()
    run(model.map_moe_layers(recorder.record_layer), mesh)
    return recorder.gather_routing(mesh, NAMES, model.dtype)


def misled(layer: int, w: MoELayer) -> MoELayer:
    """An MoE layer whose router would choose other experts, on all ranks the same."""
    noise = np.random.RandomState(layer).standard_normal(w.gate.weight.shape)
    return replace(w, gate=replace(w.gate, weight=w.gate.weight + noise))


def of_one_rank(layout: Layout = Layout()) -> RoutingTrace:  # noqa: B008 (immutable)
    """What the routers decide on one rank, the same on each that asks."""
    with mesh_of(MPI.COMM_SELF, VARIANT, layout) as mesh:
        decisions = recorded(toy(VARIANT, mesh), mesh)
    assert decisions is not None
    return decisions


def test_replaying_is_what_was_recorded_whatever_the_routers_say(comm: MPI.Intracomm):
    decisions = of_one_rank()
    with mesh_of(MPI.COMM_SELF, VARIANT, Layout()) as mesh:
        expected_ids, expected_logits = run(toy(VARIANT, mesh), mesh)
        otherwise, _ = run(toy(VARIANT, mesh).map_moe_layers(misled), mesh)
        assert otherwise != expected_ids, "the routers are not misled"
    for layout in LAYOUTS[comm.size]:
        for dispatch in TOKEN_DISPATCHERS:
            with mesh_of(comm, VARIANT, replace(layout, moe_token_dispatcher=dispatch)) as mesh:
                model = toy(VARIANT, mesh).map_moe_layers(misled)
                model = model.map_moe_layers(partial(replay_layer, decisions))
                ids, logits = run(model, mesh)
                assert ids == [expected_ids[place] for place in assign_requests(len(NAMES), mesh)]
                for sequence, logits_V in logits.items():
                    expected_V = expected_logits[sequence]
                    np.testing.assert_allclose(logits_V, expected_V, rtol=0, atol=1e-9)


def test_every_layout_records_what_the_reference_routes(comm: MPI.Intracomm):
    reference = oracle(VARIANT)
    for layout in LAYOUTS[comm.size]:
        with mesh_of(comm, VARIANT, layout) as mesh:
            decisions = recorded(toy(VARIANT, mesh), mesh)
            assert (decisions is None) == (mesh.world.rank != 0)
            if decisions is None:
                continue
            assert decisions.request_ids == NAMES and decisions.layers == (0, 1)
            for request in requests():
                # The token chosen last is not fed, and so not routed.
                ids = request.ids + reference.greedy(request.ids, request.params.max_tokens)[:-1]
                of = decisions.request_T == request.index
                assert decisions.token_T[of].tolist() == ids
                assert decisions.position_T[of].tolist() == list(range(len(ids)))
                for place, routing in enumerate(reference.routings(ids).values()):
                    experts_SA = decisions.experts_TLA[of, place]
                    np.testing.assert_array_equal(experts_SA, routing.experts_SA)
                    weights_SA = decisions.weights_TLA[of, place]
                    np.testing.assert_allclose(weights_SA, routing.weights_SA, rtol=0, atol=1e-9)


def test_recording_and_replaying_communicate_nothing(comm: MPI.Intracomm):
    for layout in LAYOUTS[comm.size][:1]:
        with mesh_of(comm, VARIANT, layout) as mesh:
            sent = []
            for change in (
                None,
                RoutingRecorder().record_layer,
                partial(replay_layer, of_one_rank()),
            ):
                model = toy(VARIANT, mesh)
                mesh.ledger.clear()
                run(model.map_moe_layers(change) if change else model, mesh)
                sent.append({(what, group): e.wire_bytes for what, group, e in mesh.ledger})
            assert sent[0] == sent[1] == sent[2]


def test_capacity_limits_what_is_replayed(comm: MPI.Intracomm):
    """The decisions are those before anything is dropped; the weights say what is."""
    decisions, limited = of_one_rank(), of_one_rank(Layout(expert_capacity_factor=0.5))
    with mesh_of(MPI.COMM_SELF, VARIANT, Layout(expert_capacity_factor=0.5)) as mesh:
        first = slice(0, 5)  # tokens of layer 0, before anything is dropped
        np.testing.assert_array_equal(
            limited.experts_TLA[first, 0], decisions.experts_TLA[first, 0]
        )
        expected = run(toy(VARIANT, mesh), mesh)
        model = toy(VARIANT, mesh).map_moe_layers(misled)
        found = run(model.map_moe_layers(partial(replay_layer, limited)), mesh)
        assert found[0] == expected[0]
        for sequence, logits_V in found[1].items():
            np.testing.assert_allclose(logits_V, expected[1][sequence], rtol=0, atol=1e-9)


@pytest.mark.ranks(1)
def test_a_request_is_recorded_once(comm: MPI.Intracomm):
    with mesh_of(comm, VARIANT, Layout()) as mesh:
        recorder = RoutingRecorder()
        model = toy(VARIANT, mesh).map_moe_layers(recorder.record_layer)
        for _ in range(2):
            run(model, mesh)
        with pytest.raises(UserError, match="a request was fed more than once while"):
            recorder.gather_routing(mesh, NAMES, model.dtype)
