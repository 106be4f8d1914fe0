"""Whole models on every layout: against transformers' golden values, against the reference, and
token by token through the generate loop."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from mpi4py import MPI
from tiny_models import tiny_config
from toys import Recorder, every_variant, meshes, oracle, slices, toy, whole_logits

from mpishard.engine.generate import generate
from mpishard.engine.sampling_params import SamplingParams
from mpishard.engine.scheduler import SchedulerConfig
from mpishard.engine.sequence import Request
from mpishard.model import Decoder
from mpishard.parallel.data import assign_requests, gather_results
from mpishard.sequences.step import pack

pytestmark = pytest.mark.ranks

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_TOLERANCE = 2e-4  # of the logits' standard deviation


def score(
    model: Decoder, prompts: list[np.ndarray]
) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """For each prompt, all fed in one step: the logits at every position, and the residual streams
    entering each layer and after the final norm."""
    feeds = [(ids_S, model.allocate_cache(len(ids_S))) for ids_S in prompts]
    step = pack(feeds, model.sequence_sharding, all_logits=True)
    streams: list[np.ndarray] = []

    def observe(_: int, x_nD: np.ndarray) -> None:
        streams.append(model.gather_sequence(x_nD, step))

    logits_WV = whole_logits(model.forward(step, observe), model, step)
    return (
        [logits_WV[new] for new in slices(step)],
        [[x_WD[new] for x_WD in streams] for new in slices(step)],
    )


@every_variant
def test_float32_agrees_with_transformers(comm: MPI.Intracomm, variant: str):
    golden = np.load(GOLDEN / f"{variant}.npz")
    prompts = [golden["ids_0"], golden["ids_1"]]
    for mesh in meshes(comm, variant):
        model = toy(variant, mesh, np.float32)
        logits, hidden = score(model, prompts)
        for place in range(len(prompts)):
            expected = golden[f"logits_{place}"]
            assert logits[place].dtype == np.float32
            error = np.abs(logits[place] - expected).max() / expected.std()
            assert error < GOLDEN_TOLERANCE, f"{mesh.layout}: {error} of the standard deviation"
            for x_SD, expected_SD in zip(hidden[place], golden[f"hidden_{place}"], strict=True):
                error = np.abs(x_SD - expected_SD).max() / expected_SD.std()
                assert error < GOLDEN_TOLERANCE, f"{mesh.layout}: {error} of a hidden state's"


@pytest.mark.ranks(1, 2, 3, 4, 6, 8)
@every_variant
def test_float64_agrees_with_the_reference(comm: MPI.Intracomm, variant: str):
    reference = oracle(variant)
    random = np.random.RandomState(3)
    prompts = [random.randint(0, reference.config.vocab, length) for length in (17, 1, 4, 30)]
    for mesh in meshes(comm, variant):
        logits, hidden = score(toy(variant, mesh), prompts)
        for place, ids_S in enumerate(prompts):
            expected_SV, expected = reference.forward(ids_S.tolist())
            np.testing.assert_allclose(logits[place], expected_SV, rtol=0, atol=1e-9)
            np.testing.assert_allclose(hidden[place], expected, rtol=0, atol=1e-9)


@every_variant
def test_the_generate_loop_goes_on_as_transformers_does(comm: MPI.Intracomm, variant: str):
    golden = np.load(GOLDEN / f"{variant}.npz")
    for mesh in meshes(comm, variant):
        model = toy(variant, mesh, np.float32)
        prompts = [golden["ids_0"].tolist(), golden["ids_1"].tolist()]
        answers = generate(
            model, [Request(i, ids, SamplingParams(max_tokens=8)) for i, ids in enumerate(prompts)]
        )
        for place, answer in enumerate(answers):
            assert answer.ids == golden[f"greedy_{place}"].tolist(), mesh.layout


@pytest.mark.ranks(1, 2, 3, 4, 6, 8)
@pytest.mark.parametrize("chunk", [None, 4])
@every_variant
def test_every_step_of_the_generate_loop_is_the_references(
    comm: MPI.Intracomm, variant: str, chunk: int | None
):
    """Sequences enter and leave at different steps, whole or in chunks, and each token's logits are
    held to those of a whole recomputation."""
    reference = oracle(variant)
    vocab = reference.config.vocab
    random = np.random.RandomState(5)
    requests = [
        Request(
            index, random.randint(0, vocab, length).tolist(), SamplingParams(max_tokens=max_tokens)
        )
        for index, (length, max_tokens) in enumerate([(9, 4), (1, 7), (14, 1), (3, 5)])
    ]
    for mesh in meshes(comm, variant):
        model = Recorder(toy(variant, mesh))
        mine = [requests[place] for place in assign_requests(len(requests), mesh)]
        answers = generate(model, mine, limits=SchedulerConfig(chunked_prefill_size=chunk))
        assert [answer.index for answer in answers] == [request.index for request in mine]
        for request, answer in zip(mine, answers, strict=True):
            assert answer.ids == reference.greedy(request.ids, request.params.max_tokens)
            assert answer.finish_reason == "length"
        if chunk and not model.uses_dynamic_rope(14):
            fed = [
                len(np.concatenate(s.positions_by_rank))
                for step in model.steps
                for s in step.segments
            ]
            assert max(fed, default=0) <= chunk
        segments = [segment for step in model.steps for segment in step.segments]
        caches = list({id(segment.cache): segment.cache for segment in segments}.values())
        sequences = [r.ids + answer.ids for r, answer in zip(mine, answers, strict=True)]
        for step, logits_Mv, asked in zip(model.steps, model.logits, model.asked, strict=True):
            found_MV = whole_logits(logits_Mv, model, step)
            for found_V, (cache, length) in zip(found_MV, asked, strict=True):
                ids = sequences[caches.index(cache)][:length]
                expected_V = reference.forward(ids)[0][-1]
                np.testing.assert_allclose(found_V, expected_V, rtol=0, atol=1e-9)


def test_answers_come_back_in_the_order_of_the_requests(comm: MPI.Intracomm):
    for mesh in meshes(comm, "llama-mha"):
        for count in (0, 1, 2, 7, 11):
            everything = [b"%d" % index * (index % 4) for index in range(count)]
            mine = [everything[place] for place in assign_requests(count, mesh)]
            assert gather_results(mine, count, mesh) == everything


def test_each_replica_takes_its_share(comm: MPI.Intracomm):
    for mesh in meshes(comm, "llama-mha"):
        shares = comm.allgather(list(assign_requests(10, mesh)))
        dealt = sorted(place for share in shares for place in share)
        assert dealt == sorted(list(range(10)) * mesh.layout.replica_size)
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_ends_of_answers(comm: MPI.Intracomm):
    """End-of-sequence ids, a stop of the caller's and the last position each end one answer."""
    ids = [3, 1, 4, 1, 5]
    greedy = oracle("qwen3-mixed").greedy(ids, 12)
    room = tiny_config("qwen3-mixed").max_position_embeddings
    for mesh in meshes(comm, "qwen3-mixed"):
        model = toy("qwen3-mixed", mesh)
        requests = [
            Request(0, ids, SamplingParams(max_tokens=12)),
            Request(1, ids, SamplingParams(max_tokens=12), eos_ids=frozenset([greedy[2]])),
            Request(2, ids, SamplingParams(max_tokens=12), stop_fn=lambda ids: len(ids) == 5),
            Request(3, [1] * room, SamplingParams(max_tokens=9)),
        ]
        told, finished = Mock(), Mock()
        answers = generate(model, requests, on_token=told, on_finish=finished)
        sharding = greedy.index(greedy[2]) + 1
        assert [answer.ids for answer in answers[:3]] == [greedy, greedy[:sharding], greedy[:5]]
        reasons = [answer.finish_reason for answer in answers]
        assert reasons == ["length", "stop", "stop", "length"]
        assert len(answers[3].ids) == 1  # the prompt has taken every position
        tokens = [[t.args[1] for t in told.mock_calls if t.args[0] is r] for r in requests]
        assert tokens == [answer.ids for answer in answers]
        ended = [call.args for call in finished.mock_calls]
        assert {request.index: answer for request, answer in ended} == dict(enumerate(answers))
        assert ended[0][0].index == 3 and ended[-1][0].index == 0


def test_more_requests_than_run_at_once(comm: MPI.Intracomm):
    limits = SchedulerConfig(max_num_batched_tokens=8, max_num_seqs=3)
    reference = oracle("llama-gqa")
    random = np.random.RandomState(11)
    requests = [
        Request(
            index,
            random.randint(0, reference.config.vocab, 1 + index).tolist(),
            SamplingParams(max_tokens=1 + index % 3),
        )
        for index in range(10)
    ]
    expected = [reference.greedy(request.ids, request.params.max_tokens) for request in requests]
    for mesh in meshes(comm, "llama-gqa"):
        model = Recorder(toy("llama-gqa", mesh))
        assert [answer.ids for answer in generate(model, requests, limits=limits)] == expected
        assert max(len(step.segments) for step in model.steps) == 3
