"""Continuous batching: what steps process, within which bounds, and which prefixes are reused. A
request's tokens are the reference's, whatever runs beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from covering import Row, covering
from mpi4py import MPI
from sweep import AXES, a_few_layouts, has_effect, layout_of
from tiny_models import tiny_config
from toys import Recorder, mesh_of, meshes, oracle, toy

from mpishard.communication.mesh import Mesh
from mpishard.config.layout import Layout
from mpishard.engine.generate import generate
from mpishard.engine.prefix_cache import MIN_PREFIX_TOKENS
from mpishard.engine.sampling_params import SamplingParams
from mpishard.engine.scheduler import SchedulerConfig
from mpishard.engine.sequence import Request
from mpishard.errors import UserError
from mpishard.sequences.sharding import FirstChunk
from mpishard.sequences.step import Step

pytestmark = pytest.mark.ranks

GREEDY = SamplingParams()

# Plain, uneven, with sliding windows, and with dynamic RoPE.
VARIANTS = "llama-gqa llama-uneven mistral-window qwen3-mixed llama-dynamic-old mistral-dynamic-new"
every_kind = pytest.mark.parametrize("variant", VARIANTS.split())


def some_requests(variant: str, count: int = 9, sampling: SamplingParams = GREEDY) -> list[Request]:
    """Prompts of 1 to 13 tokens, answers of 1 to 6."""
    random = np.random.RandomState(11)
    vocab = oracle(variant).config.vocab
    return [
        Request(
            index,
            random.randint(0, vocab, 1 + (5 * index) % 13).tolist(),
            replace(sampling, max_tokens=1 + (3 * index) % 6),
        )
        for index in range(count)
    ]


def greedy(variant: str, requests: list[Request]) -> list[list[int]]:
    """The reference's answers."""
    return [oracle(variant).greedy(request.ids, request.params.max_tokens) for request in requests]


def fed(model: Recorder) -> list[int]:
    """How many tokens each step processed, on all ranks together."""
    return [sum(map(len, step.global_index)) for step in model.steps]


def alone(requests: list[Request]) -> int:
    """How many tokens are processed if no prefix is reused."""
    return sum(len(request.ids) + request.params.max_tokens - 1 for request in requests)


def begun(model: Recorder) -> list[bool]:
    """For each sequence, whether it started with an empty cache and not with a prefix."""
    first = {id(s.cache): s.is_first_chunk for step in model.steps[::-1] for s in step.segments}
    return list(first.values())


def recorded(comm: MPI.Intracomm, variant: str) -> Iterator[tuple[Mesh, Recorder]]:
    for mesh in meshes(comm, variant, a_few_layouts(comm.size, variant)):
        yield mesh, Recorder(toy(variant, mesh))


@pytest.mark.ranks(1, 2, 3, 4)
@every_kind
def test_steps_keep_to_their_bounds(comm: MPI.Intracomm, variant: str):
    """Prompts longer than a step are prefilled in chunks beside running sequences."""
    requests = some_requests(variant, 7)
    right = greedy(variant, requests)
    limits = SchedulerConfig(max_num_batched_tokens=6, max_num_seqs=4, chunked_prefill_size=5)
    for mesh, model in recorded(comm, variant):
        answers = generate(model, requests, limits=limits)
        assert [answer.ids for answer in answers] == right, mesh.layout
        assert max(fed(model)) == 6
        most = max(len(step.segments) for step in model.steps)
        assert most == 4 or "dynamic" in variant  # which processes all tokens again and again


@pytest.mark.ranks(1, 2, 4)
def test_a_place_is_taken_in_the_step_after_it_is_left(comm: MPI.Intracomm):
    requests = [
        Request(index, [1 + index], SamplingParams(max_tokens=3 + index % 3)) for index in range(8)
    ]
    for _, model in recorded(comm, "llama-gqa"):
        generate(
            model,
            requests,
            limits=SchedulerConfig(
                max_num_batched_tokens=8, max_num_seqs=3, chunked_prefill_size=8
            ),
        )
        running = [len(step.segments) for step in model.steps]
        assert running[:8] == [3] * 8 and sum(running) == sum(r.params.max_tokens for r in requests)


@pytest.mark.ranks(1, 2, 4)
def test_more_sequences_than_a_step_has_tokens_take_turns(comm: MPI.Intracomm):
    requests = some_requests("llama-gqa", 5)
    for _, model in recorded(comm, "llama-gqa"):
        answers = generate(
            model,
            requests,
            limits=SchedulerConfig(
                max_num_batched_tokens=2, max_num_seqs=5, chunked_prefill_size=2
            ),
        )
        assert [answer.ids for answer in answers] == greedy("llama-gqa", requests)
        assert max(fed(model)) == 2


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("variant", ["llama-gqa", "llama-uneven", "mistral-window"])
def test_caches_keep_to_the_memory_they_are_given(comm: MPI.Intracomm, variant: str):
    """The rank that needs most counts. A request that never fits is rejected with the reason."""
    requests = [*some_requests(variant), Request(9, [1] * 30, SamplingParams(max_tokens=9))]
    right = greedy(variant, requests[:9])
    for mesh, model in recorded(comm, variant):
        largest = max(mesh.world.comm.allgather(model.cache_bytes(19)))
        room = 2 * largest
        limits = SchedulerConfig(kv_cache_memory_bytes=room, chunked_prefill_size=100)
        sizes = [model.cache_bytes(38), model.cache_bytes(19)]
        too_long = max(mesh.world.comm.allgather(sizes[0])) > room
        answers = generate(model, requests, limits=limits)
        assert [answer.ids for answer in answers[:9]] == right
        assert bool(answers[9].error) == too_long
        if too_long:
            assert f"but there are {room}; shorten it" in answers[9].error
            assert answers[9].ids == [] and answers[9].finish_reason == ""
        for step in model.steps:
            assert sum(cache_bytes(step)) <= room
        most = max(len(step.segments) for step in model.steps)
        assert 2 <= most < 9


@pytest.mark.ranks(1, 2)
def test_a_request_that_needs_more_than_all_memory_is_refused(comm: MPI.Intracomm):
    limits = SchedulerConfig(kv_cache_memory_bytes=1)
    for _, model in recorded(comm, "llama-gqa"):
        with pytest.raises(UserError, match=r"prompt 1 has no answer: .* bytes of KV cache"):
            generate(model, some_requests("llama-gqa"), limits=limits)


def cache_bytes(step: Step) -> list[int]:
    return [segment.cache.k.nbytes + segment.cache.v.nbytes for segment in step.segments]


@pytest.mark.ranks(1, 2, 3, 4)
@every_kind
def test_the_bytes_of_a_cache_are_enough(comm: MPI.Intracomm, variant: str):
    for mesh in meshes(comm, variant):
        model = toy(variant, mesh)
        for capacity in (1, 2, 7, 20, 33):
            for first in {1, 2, capacity // 2 + 1, capacity}:
                cache = model.allocate_cache(capacity, min(first, capacity))
                assert cache.k.nbytes + cache.v.nbytes <= model.cache_bytes(capacity)


@pytest.mark.ranks(1, 2, 3, 4)
@every_kind
def test_what_prompts_begin_with_is_computed_once(
    comm: MPI.Intracomm, variant: str, monkeypatch: pytest.MonkeyPatch
):
    """The first computes it and the others wait a step, also with sliding windows and sharded
    caches. Dynamic RoPE rules it out. Under context parallelism the 7 tokens of the shortest are
    not reused, because the next chunk is longer."""
    monkeypatch.setattr("mpishard.engine.prefix_cache.MIN_PREFIX_TOKENS", 5)
    config = oracle(variant).config
    random = np.random.RandomState(3)
    length = min(38, config.max_position_embeddings - 10)
    shared = random.randint(0, config.vocab, length).tolist()
    endings = [[], [1, 2], [3], [1, 2, 5, 6], random.randint(0, config.vocab, 7).tolist()]
    requests = [
        Request(index, shared + end, SamplingParams(max_tokens=3))
        for index, end in enumerate(endings)
    ]
    requests.insert(
        0, Request(5, shared[:7], SamplingParams(max_tokens=2))
    )  # too short for other frequencies
    right = greedy(variant, requests)
    for mesh, model in recorded(comm, variant):
        dynamic = model.uses_dynamic_rope(length + 3)
        for limits in (
            SchedulerConfig(),
            SchedulerConfig(max_num_batched_tokens=20, max_num_seqs=4, chunked_prefill_size=20),
        ):
            model.steps.clear()
            answers = generate(model, requests, limits=limits)
            assert [answer.ids for answer in answers] == right, mesh.layout
            shares = [] if dynamic else [length] * 4 + [7] * (mesh.layout.cp == 1)
            assert len(begun(model)) - sum(begun(model)) == len(shares)
            assert dynamic or sum(fed(model)) == alone(requests) - sum(shares)


def test_a_prefix_outlives_the_sequence_that_computed_it_for_a_step(comm: MPI.Intracomm):
    """All sequences finish together, and the next ones start with the same tokens."""
    shared = [(7 * place) % 67 for place in range(MIN_PREFIX_TOKENS)]
    requests = [
        Request(index, [*shared, index], SamplingParams(max_tokens=2)) for index in range(6)
    ]
    right = greedy("llama-gqa", requests)
    for mesh, model in recorded(comm, "llama-gqa"):
        answers = generate(
            model, requests, limits=SchedulerConfig(max_num_seqs=1, chunked_prefill_size=100)
        )
        assert [answer.ids for answer in answers] == right
        assert fed(model) == [33, 1] + 5 * [1, 1], mesh.layout


# Prefixes under context parallelism: each rank copies the positions that it holds.

# Grouped heads, windows, sinks with windows in some layers, latents, many heads for few.
CONTEXT = "llama-gqa mistral-window gpt_oss-plain deepseek_v2-lite llama-mqa".split()


def over_context(
    comm: MPI.Intracomm, variant: str, limits: tuple[SchedulerConfig, ...]
) -> Iterator[tuple[Mesh, Recorder, SchedulerConfig]]:
    """`variant` over every number of context-parallel ranks, in forms of which every two meet, and
    meet each of the `limits` and of the variants, among all variants."""
    for cp in (cp for cp in range(2, comm.size + 1) if comm.size % cp == 0):
        plain = Layout(tp=comm.size // cp, cp=cp)

        def allowed(row: Row, plain: Layout = plain) -> bool:
            config = tiny_config(row["variant"])
            return has_effect(layout_of({"degrees": plain} | row), config.heads > config.kv_heads)

        rows = covering(AXES | {"limits": limits, "variant": CONTEXT}, allowed=allowed)
        for row in (row for row in rows if row["variant"] == variant):
            with mesh_of(comm, variant, layout_of({"degrees": plain} | row)) as mesh:
                yield mesh, Recorder(toy(variant, mesh)), row["limits"]


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("variant", CONTEXT)
def test_a_document_is_computed_once_for_all_questions(
    comm: MPI.Intracomm, variant: str, monkeypatch: pytest.MonkeyPatch
):
    """Whole or in pieces, it is divided and goes round once, and the caches of those that take it
    over have room for what is to come, and for nothing else."""
    monkeypatch.setattr("mpishard.engine.prefix_cache.MIN_PREFIX_TOKENS", 11)
    random = np.random.RandomState(5)
    document = random.randint(0, oracle(variant).config.vocab, 41).tolist()
    requests = [
        Request(n, document + [n] * (1 + 3 * n % 7), SamplingParams(max_tokens=2 + n % 2))
        for n in range(4)
    ]
    right = greedy(variant, requests)
    pieces = (
        SchedulerConfig(),
        SchedulerConfig(max_num_batched_tokens=17, chunked_prefill_size=15, max_num_seqs=3),
    )
    for mesh, model, limits in over_context(comm, variant, pieces):
        answers = generate(model, requests, limits=limits)
        assert [answer.ids for answer in answers] == right, mesh.layout
        assert sum(begun(model)) == 1
        assert sum(fed(model)) == alone(requests) - 3 * len(document)
        for cache in {id(s.cache): s.cache for step in model.steps for s in step.segments}.values():
            assert cache.num_local == len(cache.positions), mesh.layout


@pytest.mark.ranks(3, 4)
@pytest.mark.parametrize("order, shares", [("contiguous", False), ("zigzag", True)])
def test_what_lies_on_few_ranks_is_computed_anew(
    comm: MPI.Intracomm, order: str, shares: bool, monkeypatch: pytest.MonkeyPatch
):
    """In contiguous order the first rank, or the first two, hold a third of a prompt."""
    monkeypatch.setattr("mpishard.engine.prefix_cache.MIN_PREFIX_TOKENS", 5)
    long = np.random.RandomState(6).randint(0, 67, 60).tolist()
    requests = [
        Request(0, long, SamplingParams(max_tokens=3)),
        Request(1, [*long[:20], 1], SamplingParams(max_tokens=3)),
    ]
    right = greedy("llama-gqa", requests)
    with mesh_of(comm, "llama-gqa", Layout(cp=comm.size, cp_order=order)) as mesh:
        model = Recorder(toy("llama-gqa", mesh))
        assert [answer.ids for answer in generate(model, requests)] == right
        assert sum(fed(model)) == alone(requests) - 20 * shares
        assert len(model.steps) == 3 + shares, "what is not shared is not waited for"


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("chunk, shares", [(None, False), (7, False), (6, True)])
def test_a_prefix_is_as_long_as_what_a_step_feeds_after_it(
    comm: MPI.Intracomm, chunk: int | None, shares: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mpishard.engine.prefix_cache.MIN_PREFIX_TOKENS", 5)
    long = np.random.RandomState(7).randint(0, 67, 30).tolist()
    requests = [
        Request(0, long, SamplingParams(max_tokens=3)),
        Request(1, [*long[:6], *range(20)], SamplingParams(max_tokens=3)),
    ]
    right = greedy("llama-gqa", requests)
    with mesh_of(comm, "llama-gqa", Layout(cp=comm.size)) as mesh:
        model = Recorder(toy("llama-gqa", mesh))
        answers = generate(model, requests, limits=SchedulerConfig(chunked_prefill_size=chunk))
        assert [answer.ids for answer in answers] == right
        assert sum(fed(model)) == alone(requests) - 6 * shares


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("shares", [False, True])
def test_a_prefix_is_taken_over_where_its_ranks_have_the_memory(
    comm: MPI.Intracomm, shares: bool, monkeypatch: pytest.MonkeyPatch
):
    """In contiguous order the first of two ranks holds all of it: more than an even share."""
    monkeypatch.setattr("mpishard.engine.prefix_cache.MIN_PREFIX_TOKENS", 5)
    long = np.random.RandomState(8).randint(0, 67, 40).tolist()
    requests = [
        Request(0, long, SamplingParams(max_tokens=4)),
        Request(1, [*long[:20], 1], SamplingParams(max_tokens=3)),
    ]
    right = greedy("llama-gqa", requests)
    layout = Layout(cp=2, tp=comm.size // 2, cp_order="contiguous")
    with mesh_of(comm, "llama-gqa", layout) as mesh:
        model = Recorder(toy("llama-gqa", mesh))
        even, uneven = model.cache_bytes(23), model.cache_bytes(23, FirstChunk(40, 20))
        assert uneven > even
        room = model.cache_bytes(43) + (uneven if shares else uneven - 1)
        answers = generate(model, requests, limits=SchedulerConfig(kv_cache_memory_bytes=room))
        assert [answer.ids for answer in answers] == right
        assert sum(fed(model)) == alone(requests) - 20 * shares
        assert all(sum(cache_bytes(step)) <= room for step in model.steps)


def test_what_is_hardly_the_same_is_not_waited_for(comm: MPI.Intracomm):
    shared = [5] * (MIN_PREFIX_TOKENS - 1)
    requests = [
        Request(index, [*shared, index, 9], SamplingParams(max_tokens=1)) for index in range(4)
    ]
    for _, model in recorded(comm, "llama-gqa"):
        generate(model, requests)
        assert fed(model) == [4 * (MIN_PREFIX_TOKENS + 1)]


@pytest.mark.ranks(1, 2, 3)
def test_samples_do_not_depend_on_what_runs_beside(comm: MPI.Intracomm):
    requests = some_requests(
        "llama-gqa", sampling=SamplingParams(1.2, top_k=30, top_p=0.95, seed=4)
    )
    alone = None
    for _, model in recorded(comm, "llama-gqa"):
        found = [generate(model, [request])[0].ids for request in requests]
        alone = alone or found
        limits = SchedulerConfig(max_num_batched_tokens=7, max_num_seqs=3, chunked_prefill_size=4)
        together = [answer.ids for answer in generate(model, requests, limits=limits)]
        assert together == found == alone
