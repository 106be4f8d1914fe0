"""Continuous batching: what steps feed, within which bounds, and what sequences share. Whatever
runs beside a request, its tokens are the reference's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from covering import Row, covering
from mpi4py import MPI
from tiny_models import tiny_config
from toys import AXES, Recorder, has_effect, layout_of, mesh_of, meshes, oracle, toy

from mpishard.arithmetic.packed import Began, Step
from mpishard.communication.mesh import Mesh
from mpishard.description.layout import Layout
from mpishard.engine.generate import generate
from mpishard.engine.sampling import Sampling
from mpishard.engine.schedule import WORTH_SHARING, Limits, Request

pytestmark = pytest.mark.ranks

GREEDY = Sampling()

# Plain, uneven, with windows, and with frequencies that go by the length.
VARIANTS = "llama-gqa llama-uneven mistral-window qwen3-mixed llama-dynamic-old mistral-dynamic-new"
every_kind = pytest.mark.parametrize("variant", VARIANTS.split())


def some_requests(variant: str, count: int = 9, sampling: Sampling = GREEDY) -> list[Request]:
    """Prompts of 1 to 13 tokens, answers of 1 to 6."""
    random = np.random.RandomState(11)
    vocab = oracle(variant).config.vocab
    return [
        Request(
            index,
            random.randint(0, vocab, 1 + (5 * index) % 13).tolist(),
            1 + (3 * index) % 6,
            sampling,
        )
        for index in range(count)
    ]


def greedy(variant: str, requests: list[Request]) -> list[list[int]]:
    """The reference's answers."""
    return [oracle(variant).greedy(request.ids, request.max_tokens) for request in requests]


def fed(model: Recorder) -> list[int]:
    """The tokens of all ranks in each step."""
    return [sum(map(len, step.places)) for step in model.steps]


def alone(requests: list[Request]) -> int:
    """The tokens that are fed where nothing is shared."""
    return sum(len(request.ids) + request.max_tokens - 1 for request in requests)


def begun(model: Recorder) -> list[bool]:
    """Of each sequence whether it began with nothing, rather than with what another one had."""
    first = {id(s.cache): s.fresh for step in model.steps[::-1] for s in step.segments}
    return list(first.values())


def recorded(comm: MPI.Intracomm, variant: str) -> Iterator[tuple[Mesh, Recorder]]:
    for mesh in meshes(comm, variant):
        yield mesh, Recorder(toy(variant, mesh))


@pytest.mark.ranks(1, 2, 3, 4)
@every_kind
def test_steps_keep_to_their_bounds(comm: MPI.Intracomm, variant: str):
    """Prompts longer than a step enter by pieces beside sequences that run."""
    requests = some_requests(variant)
    right = greedy(variant, requests)
    limits = Limits(step_tokens=6, sequences=4, chunk=5)
    for mesh, model in recorded(comm, variant):
        answers = generate(model, requests, limits=limits)
        assert [answer.ids for answer in answers] == right, mesh.layout
        assert max(fed(model)) == 6
        most = max(len(step.segments) for step in model.steps)
        assert most == 4 or "dynamic" in variant  # which feed all they know again and again


@pytest.mark.ranks(1, 2, 4)
def test_a_place_is_taken_in_the_step_after_it_is_left(comm: MPI.Intracomm):
    requests = [Request(index, [1 + index], 3 + index % 3) for index in range(8)]
    for _, model in recorded(comm, "llama-gqa"):
        generate(model, requests, limits=Limits(step_tokens=8, sequences=3, chunk=8))
        running = [len(step.segments) for step in model.steps]
        assert running[:8] == [3] * 8 and sum(running) == sum(r.max_tokens for r in requests)


@pytest.mark.ranks(1, 2, 4)
def test_more_sequences_than_a_step_has_tokens_take_turns(comm: MPI.Intracomm):
    requests = some_requests("llama-gqa", 5)
    for _, model in recorded(comm, "llama-gqa"):
        answers = generate(model, requests, limits=Limits(step_tokens=2, sequences=5, chunk=2))
        assert [answer.ids for answer in answers] == greedy("llama-gqa", requests)
        assert max(fed(model)) == 2


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("variant", ["llama-gqa", "llama-uneven", "mistral-window"])
def test_caches_keep_to_the_memory_they_are_given(comm: MPI.Intracomm, variant: str):
    """Its bytes are those of the rank that needs most; what never fits is refused, and says so."""
    requests = [*some_requests(variant), Request(9, [1] * 30, 9)]
    right = greedy(variant, requests[:9])
    for mesh, model in recorded(comm, variant):
        largest = max(mesh.world.comm.allgather(model.cache_bytes(19)))
        room = 2 * largest
        limits = Limits(kv_bytes=room, chunk=100)
        sizes = [model.cache_bytes(38), model.cache_bytes(19)]
        too_long = max(mesh.world.comm.allgather(sizes[0])) > room
        answers = generate(model, requests, limits=limits)
        assert [answer.ids for answer in answers[:9]] == right
        assert bool(answers[9].refused) == too_long
        if too_long:
            assert f"but there are {room}; shorten it" in answers[9].refused
            assert answers[9].ids == [] and answers[9].finish_reason == ""
        for step in model.steps:
            assert sum(cache_bytes(step)) <= room
        most = max(len(step.segments) for step in model.steps)
        assert 2 <= most < 9


def cache_bytes(step: Step) -> list[int]:
    return [segment.cache.k.nbytes + segment.cache.v.nbytes for segment in step.segments]


@pytest.mark.ranks(1, 2, 3, 4)
@every_kind
def test_the_bytes_of_a_cache_are_enough(comm: MPI.Intracomm, variant: str):
    for mesh in meshes(comm, variant):
        model = toy(variant, mesh)
        for capacity in (1, 2, 7, 20, 33):
            for first in {1, 2, capacity // 2 + 1, capacity}:
                cache = model.new_cache(capacity, min(first, capacity))
                assert cache.k.nbytes + cache.v.nbytes <= model.cache_bytes(capacity)


@pytest.mark.ranks(1, 2, 3, 4)
@every_kind
def test_what_prompts_begin_with_is_computed_once(
    comm: MPI.Intracomm, variant: str, monkeypatch: pytest.MonkeyPatch
):
    """By the first of them, for which the others wait a step; windows and divided caches included.
    Not where the frequencies go by the length, nor, over context-parallel ranks, the 7 of the
    shortest, after which there are more to feed."""
    monkeypatch.setattr("mpishard.engine.schedule.WORTH_SHARING", 5)
    config = oracle(variant).config
    random = np.random.RandomState(3)
    length = min(38, config.max_positions - 10)
    shared = random.randint(0, config.vocab, length).tolist()
    endings = [[], [1, 2], [3], [1, 2, 5, 6], random.randint(0, config.vocab, 7).tolist()]
    requests = [Request(index, shared + end, 4) for index, end in enumerate(endings)]
    requests.insert(0, Request(5, shared[:7], 2))  # too short for other frequencies
    right = greedy(variant, requests)
    for mesh, model in recorded(comm, variant):
        dynamic = model.depends_on_length(length + 3)
        for limits in (Limits(), Limits(step_tokens=20, sequences=4, chunk=20)):
            model.steps.clear()
            answers = generate(model, requests, limits=limits)
            assert [answer.ids for answer in answers] == right, mesh.layout
            shares = [] if dynamic else [length] * 4 + [7] * (mesh.layout.cp == 1)
            assert len(begun(model)) - sum(begun(model)) == len(shares)
            assert dynamic or sum(fed(model)) == alone(requests) - sum(shares)


def test_a_prefix_outlives_the_sequence_that_computed_it_for_a_step(comm: MPI.Intracomm):
    """All sequences end together, and the next ones begin as they did."""
    shared = [(7 * place) % 67 for place in range(WORTH_SHARING)]
    requests = [Request(index, [*shared, index], 2) for index in range(6)]
    right = greedy("llama-gqa", requests)
    for mesh, model in recorded(comm, "llama-gqa"):
        answers = generate(model, requests, limits=Limits(sequences=1, chunk=100))
        assert [answer.ids for answer in answers] == right
        assert fed(model) == [33, 1] + 5 * [1, 1], mesh.layout


# What context-parallel ranks share: each copies what it has.

# Grouped heads, windows, sinks with windows in some layers, latents, many heads for few.
CONTEXT = "llama-gqa mistral-window gpt_oss-plain deepseek_v2-lite llama-mqa".split()


def over_context(
    comm: MPI.Intracomm, variant: str, limits: tuple[Limits, ...]
) -> Iterator[tuple[Mesh, Recorder, Limits]]:
    """`variant` over every number of context-parallel ranks, in forms of which every two meet, and
    meet each of the `limits`."""
    config = tiny_config(variant)
    for cp in (cp for cp in range(2, comm.size + 1) if comm.size % cp == 0):
        plain = Layout(tp=comm.size // cp, cp=cp)

        def allowed(row: Row, plain: Layout = plain) -> bool:
            return has_effect(layout_of({"degrees": plain} | row), config.heads > config.kv_heads)

        for row in covering(AXES | {"limits": limits}, allowed=allowed):
            with mesh_of(comm, variant, layout_of({"degrees": plain} | row)) as mesh:
                yield mesh, Recorder(toy(variant, mesh)), row["limits"]


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("variant", CONTEXT)
def test_a_document_is_computed_once_for_all_questions(
    comm: MPI.Intracomm, variant: str, monkeypatch: pytest.MonkeyPatch
):
    """Whole or in pieces, it is divided and goes round once, and the caches of those that take it
    over have room for what is to come, and for nothing else."""
    monkeypatch.setattr("mpishard.engine.schedule.WORTH_SHARING", 11)
    random = np.random.RandomState(5)
    document = random.randint(0, oracle(variant).config.vocab, 41).tolist()
    requests = [Request(n, document + [n] * (1 + 3 * n % 7), 3 + n % 3) for n in range(5)]
    right = greedy(variant, requests)
    pieces = (Limits(), Limits(step_tokens=17, chunk=15, sequences=3))
    for mesh, model, limits in over_context(comm, variant, pieces):
        answers = generate(model, requests, limits=limits)
        assert [answer.ids for answer in answers] == right, mesh.layout
        assert sum(begun(model)) == 1
        assert sum(fed(model)) == alone(requests) - 4 * len(document)
        for cache in {id(s.cache): s.cache for step in model.steps for s in step.segments}.values():
            assert cache.held == len(cache.positions), mesh.layout


@pytest.mark.ranks(3, 4)
@pytest.mark.parametrize("order, shares", [("contiguous", False), ("zigzag", True)])
def test_what_lies_on_few_ranks_is_computed_anew(
    comm: MPI.Intracomm, order: str, shares: bool, monkeypatch: pytest.MonkeyPatch
):
    """A third of a prompt in contiguous order is the first rank's, or the first two ranks'."""
    monkeypatch.setattr("mpishard.engine.schedule.WORTH_SHARING", 5)
    long = np.random.RandomState(6).randint(0, 67, 60).tolist()
    requests = [Request(0, long, 3), Request(1, [*long[:20], 1], 3)]
    right = greedy("llama-gqa", requests)
    with mesh_of(comm, "llama-gqa", Layout(cp=comm.size, order=order)) as mesh:
        model = Recorder(toy("llama-gqa", mesh))
        assert [answer.ids for answer in generate(model, requests)] == right
        assert sum(fed(model)) == alone(requests) - 20 * shares
        assert len(model.steps) == 3 + shares, "what is not shared is not waited for"


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("chunk, shares", [(None, False), (7, False), (6, True)])
def test_a_prefix_is_as_long_as_what_a_step_feeds_after_it(
    comm: MPI.Intracomm, chunk: int | None, shares: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mpishard.engine.schedule.WORTH_SHARING", 5)
    long = np.random.RandomState(7).randint(0, 67, 30).tolist()
    requests = [Request(0, long, 3), Request(1, [*long[:6], *range(20)], 3)]
    right = greedy("llama-gqa", requests)
    with mesh_of(comm, "llama-gqa", Layout(cp=comm.size)) as mesh:
        model = Recorder(toy("llama-gqa", mesh))
        answers = generate(model, requests, limits=Limits(chunk=chunk))
        assert [answer.ids for answer in answers] == right
        assert sum(fed(model)) == alone(requests) - 6 * shares


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("shares", [False, True])
def test_a_prefix_is_taken_over_where_its_ranks_have_the_memory(
    comm: MPI.Intracomm, shares: bool, monkeypatch: pytest.MonkeyPatch
):
    """In contiguous order the first of two ranks has all of it, which is more than an even part."""
    monkeypatch.setattr("mpishard.engine.schedule.WORTH_SHARING", 5)
    long = np.random.RandomState(8).randint(0, 67, 40).tolist()
    requests = [Request(0, long, 4), Request(1, [*long[:20], 1], 3)]
    right = greedy("llama-gqa", requests)
    layout = Layout(cp=2, tp=comm.size // 2, order="contiguous")
    with mesh_of(comm, "llama-gqa", layout) as mesh:
        model = Recorder(toy("llama-gqa", mesh))
        even, uneven = model.cache_bytes(23), model.cache_bytes(23, Began(40, 20))
        assert uneven > even
        room = model.cache_bytes(43) + (uneven if shares else uneven - 1)
        answers = generate(model, requests, limits=Limits(kv_bytes=room))
        assert [answer.ids for answer in answers] == right
        assert sum(fed(model)) == alone(requests) - 20 * shares
        assert all(sum(cache_bytes(step)) <= room for step in model.steps)


def test_what_is_hardly_the_same_is_not_waited_for(comm: MPI.Intracomm):
    shared = [5] * (WORTH_SHARING - 1)
    requests = [Request(index, [*shared, index, 9], 1) for index in range(4)]
    for _, model in recorded(comm, "llama-gqa"):
        generate(model, requests)
        assert fed(model) == [4 * (WORTH_SHARING + 1)]


@pytest.mark.ranks(1, 2, 3)
def test_samples_do_not_depend_on_what_runs_beside(comm: MPI.Intracomm):
    requests = some_requests("llama-gqa", sampling=Sampling(1.2, top_k=30, top_p=0.95, seed=4))
    alone = None
    for _, model in recorded(comm, "llama-gqa"):
        found = [generate(model, [request])[0].ids for request in requests]
        alone = alone or found
        limits = Limits(step_tokens=7, sequences=3, chunk=4)
        together = [answer.ids for answer in generate(model, requests, limits=limits)]
        assert together == found == alone
