"""Whole models on every layout: against transformers' golden values, against the reference, and
token by token through the generate loop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from mpi4py import MPI
from sweep import over, swept, swept_in_float32, trials
from tiny_models import tiny_config
from toys import Recorder, Remembering, mesh_of, meshes, oracle, slices, toy, whole_logits

from mpishard.communication.mesh import Mesh
from mpishard.config.layout import Layout, block
from mpishard.engine.generate import generate
from mpishard.engine.sampling_params import SamplingParams
from mpishard.engine.scheduler import SchedulerConfig
from mpishard.engine.sequence import Request
from mpishard.model import Decoder
from mpishard.parallel.data import assign_requests, gather_results
from mpishard.sequences.step import Step, pack

pytestmark = pytest.mark.ranks

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_TOLERANCE = 2e-4  # of the logits' standard deviation

# How many tokens of each of four sequences a step processes: first chunks side by side, of more
# tokens than ranks and of fewer; a further chunk and a decode beside a prompt that is longer than
# every window and every original length; a decode of all.
PHASES = ((5, 1, 6, 0), (4, 1, 0, 21), (1, 1, 1, 1))


def phases(
    model: Decoder, sequences: list[np.ndarray]
) -> Iterator[tuple[Step, list[tuple[int, int, int]]]]:
    """The steps, with all logits, and which tokens they process: (sequence, start, stop). With
    rotary frequencies that go by its length a sequence is processed anew, as in the engine."""
    firsts = [next(filter(None, counts)) for counts in zip(*PHASES, strict=True)]
    caches = [
        model.allocate_cache(len(ids_S), first)
        for ids_S, first in zip(sequences, firsts, strict=True)
    ]
    lengths = [0] * len(sequences)
    for counts in PHASES:
        new = []
        for place in map(int, np.flatnonzero(counts)):
            start, stop = lengths[place], lengths[place] + counts[place]
            if model.uses_dynamic_rope(stop):
                start, caches[place] = 0, model.allocate_cache(stop)
            new.append((place, start, stop))
            lengths[place] = stop
        feeds = [(sequences[place][start:stop], caches[place]) for place, start, stop in new]
        yield pack(feeds, model.sequence_sharding, all_logits=True), new


@over(swept)
def test_every_phase_is_the_references(comm: MPI.Intracomm, variant: str):
    """After every token, this rank's block of the logits."""
    reference = oracle(variant)
    vocab = reference.config.vocab
    random = np.random.RandomState(3)
    sequences = [random.randint(0, vocab, sum(counts)) for counts in zip(*PHASES, strict=True)]
    for layout in swept(comm.size, variant):
        with mesh_of(comm, variant, layout) as mesh:
            model, mine = toy(variant, mesh), block(vocab, mesh.tp.size, mesh.tp.rank)
            for step, new in phases(model, sequences):
                logits_Mv = model.forward(step)
                expected_WV = np.concatenate(
                    [reference.logits(sequences[place], stop)[start:] for place, start, stop in new]
                )
                agree(logits_Mv, expected_WV[step.global_index[mesh.cp.rank], mine], mesh)


def agree(found: np.ndarray, expected: np.ndarray, mesh: Mesh) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9, err_msg=str(mesh.layout))


@over(swept_in_float32)
def test_float32_agrees_with_transformers(comm: MPI.Intracomm, variant: str):
    """The logits at every position, the residual streams entering each layer and after the final
    norm, and how the generate loop goes on, with prompts in chunks."""
    golden = np.load(GOLDEN / f"{variant}.npz")
    prompts = [golden["ids_0"], golden["ids_1"]]
    requests = [
        Request(place, ids.tolist(), SamplingParams(max_tokens=8))
        for place, ids in enumerate(prompts)
    ]
    for layout in swept_in_float32(comm.size, variant):
        with mesh_of(comm, variant, layout) as mesh:
            model = toy(variant, mesh, np.float32)
            logits, hidden = score(model, prompts)
            answers = generate(model, requests, limits=SchedulerConfig(chunked_prefill_size=8))
        for place, answer in enumerate(answers):
            assert logits[place].dtype == np.float32
            close(logits[place], golden[f"logits_{place}"], layout)
            for x_SD, expected_SD in zip(hidden[place], golden[f"hidden_{place}"], strict=True):
                close(x_SD, expected_SD, layout)
            assert answer.ids == golden[f"greedy_{place}"].tolist(), layout


def close(found: np.ndarray, expected: np.ndarray, layout: Layout) -> None:
    error = np.abs(found - expected).max() / expected.std()
    assert error < GOLDEN_TOLERANCE, f"{layout}: {error} of the standard deviation"


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


@pytest.mark.ranks(1, 2, 3, 4, 6, 8)
@over(trials)
def test_every_step_of_the_generate_loop_is_the_references(comm: MPI.Intracomm, variant: str):
    """Sequences enter and leave at different steps, whole or in chunks, and each token's logits are
    held to those of a whole recomputation. Replicas that share experts step together, with unequal
    work and with none."""
    reference = oracle(variant)
    vocab = reference.config.vocab
    random = np.random.RandomState(5)
    requests = [
        Request(
            index, random.randint(0, vocab, length).tolist(), SamplingParams(max_tokens=max_tokens)
        )
        for index, (length, max_tokens) in enumerate([(9, 3), (1, 4), (14, 1), (3, 2)])
    ]
    for layout, chunk in trials(comm.size, variant):
        with mesh_of(comm, variant, layout) as mesh:
            model = Recorder(toy(variant, mesh))
            mine = [requests[place] for place in assign_requests(len(requests), mesh)]
            answers = generate(model, mine, limits=SchedulerConfig(chunked_prefill_size=chunk))
            assert [answer.index for answer in answers] == [request.index for request in mine]
            sequences = [r.ids + answer.ids for r, answer in zip(mine, answers, strict=True)]
            check_steps(model, sequences, reference)
            for request, answer in zip(mine, answers, strict=True):
                assert answer.ids == reference.greedy(request.ids, request.params.max_tokens)
                assert answer.finish_reason == "length"
            if chunk and not model.uses_dynamic_rope(14):
                chunks = [s.positions_by_rank for step in model.steps for s in step.segments]
                assert max((sum(map(len, ranks)) for ranks in chunks), default=0) <= chunk


def check_steps(model: Recorder, sequences: list[list[int]], reference: Remembering) -> None:
    """Whether this rank's block of the logits of every step is the reference's."""
    segments = [segment for step in model.steps for segment in step.segments]
    caches = list({id(segment.cache): segment.cache for segment in segments}.values())
    for ids in sequences:
        reference.logits_after(ids)
    mesh = model.mesh
    mine = block(model.config.vocab, mesh.tp.size, mesh.tp.rank)
    for step, logits_Mv, asked in zip(model.steps, model.logits, model.asked, strict=True):
        expected = [
            reference.logits_after(sequences[caches.index(asked[place][0])][: asked[place][1]])
            for place in step.logits_owner_index[mesh.cp.rank]
        ]
        assert len(logits_Mv) == len(expected)
        if expected:
            agree(logits_Mv, np.array(expected)[:, mine], mesh)


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
