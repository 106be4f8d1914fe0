"""Models with an encoder on several ranks: every phase against the reference, and what attention
to the encoder's outputs and the capacity of experts send."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
from mpi4py import MPI
from sweep import course, fits
from tiny_encoder_models import ENCODER_VARIANTS
from tiny_models import tiny_config, tiny_weights
from toys import mesh_of, toy

from mpishard.config.layout import Layout, block
from mpishard.engine.generate import generate
from mpishard.engine.sampling_params import SamplingParams
from mpishard.engine.scheduler import SchedulerConfig
from mpishard.engine.sequence import Request
from mpishard.model import Decoder
from mpishard.parallel.cross_attention import CrossAttention
from mpishard.parallel.data import assign_requests, gather_results
from mpishard.reference import Reference
from mpishard.sequences.step import ScheduledChunk, pack

pytestmark = pytest.mark.ranks

MIXED = "switch_transformers-mixed"
# What the encoder reads of four sequences, fewer tokens than ranks and more.
INPUT_LENGTHS = (17, 1, 3, 30)
# How many tokens of each the decoder processes in a step: see `test_model.PHASES`.
PHASES = ((5, 1, 6, 0), (4, 1, 0, 21), (1, 1, 1, 1))


@cache
def reference(variant: str) -> Reference:
    return Reference(tiny_config(variant), tiny_weights(variant))


@cache
def expected_logits(variant: str, ids: tuple[int, ...], encoder_ids: tuple[int, ...]) -> np.ndarray:
    return reference(variant).forward(ids, encoder_ids)[0]


@cache
def expected_tokens(variant: str, ids: tuple[int, ...], encoder_ids: tuple[int, ...]) -> list[int]:
    return reference(variant).greedy(ids, 6, encoder_ids)


def layouts(ranks: int, variant: str) -> Iterator[Layout]:
    """The model's course, and layouts in which replicas share experts."""
    yield from (one for one in course(variant) if one.world_size == ranks)
    config = tiny_config(variant)
    for layout in (
        Layout(dp=ranks, ep=ranks),
        Layout(tp=ranks, sequence_parallel=ranks > 1),
        Layout(cp=ranks, ep=ranks),
        Layout(cp=ranks, cp_order="contiguous", decode_merge="all-reduce"),
    ):
        if fits(layout, config):
            yield layout


@pytest.mark.parametrize("variant", ENCODER_VARIANTS)
def test_every_phase_is_the_references(comm: MPI.Intracomm, variant: str):
    """First chunks, with their inputs, further chunks and decode, alone and side by side: after
    every token, this rank's block of the logits."""
    vocab = tiny_config(variant).vocab
    random = np.random.RandomState(3)
    sequences = [random.randint(0, vocab, sum(counts)) for counts in zip(*PHASES, strict=True)]
    inputs = [random.randint(0, vocab, length) for length in INPUT_LENGTHS]
    whole = [
        expected_logits(variant, tuple(ids), tuple(encoder_ids))
        for ids, encoder_ids in zip(sequences, inputs, strict=True)
    ]
    for layout in layouts(comm.size, variant):
        with mesh_of(comm, variant, layout) as mesh:
            model, mine = toy(variant, mesh), block(vocab, mesh.tp.size, mesh.tp.rank)
            caches = [
                model.allocate_cache(len(ids_S), first, encoder_length=len(encoder_ids_T))
                for ids_S, first, encoder_ids_T in zip(
                    sequences, (5, 1, 6, 21), inputs, strict=True
                )
            ]
            for counts in PHASES:
                feeds: list[ScheduledChunk] = []
                expected: list[np.ndarray] = []
                for place in map(int, np.flatnonzero(counts)):
                    start = caches[place].length
                    new = slice(start, start + counts[place])
                    encoder_ids = None if start else inputs[place]
                    feed = ScheduledChunk(
                        sequences[place][new], caches[place], encoder_ids_T=encoder_ids
                    )
                    feeds.append(feed)
                    expected.append(whole[place][new])
                step = pack(feeds, model.sequence_sharding, all_logits=True)
                logits_Mv = model.forward(step)
                expected_WV = np.concatenate(expected)
                found = expected_WV[step.global_index[mesh.cp.rank], mine]
                np.testing.assert_allclose(logits_Mv, found, atol=1e-9, err_msg=str(layout))


@pytest.mark.parametrize("variant", ENCODER_VARIANTS)
def test_sequences_come_and_go(comm: MPI.Intracomm, variant: str):
    """Greedy tokens of the generate loop, of prompts whole and in chunks, where replicas have
    unequal work and some have none."""
    vocab = tiny_config(variant).vocab
    random = np.random.RandomState(5)
    prompts = [
        (random.randint(0, vocab, n).tolist(), random.randint(0, vocab, t).tolist())
        for n, t in ((1, 14), (7, 2), (1, 1), (11, 26), (2, 5))
    ]
    for layout, limits in zip(
        layouts(comm.size, variant),
        [
            SchedulerConfig(chunked_prefill_size=4, max_num_seqs=2),
            SchedulerConfig(max_num_batched_tokens=16),
        ]
        * 20,
        strict=False,
    ):
        with mesh_of(comm, variant, layout) as mesh:
            mine = assign_requests(len(prompts), mesh)
            requests = [
                Request(place, prompts[place][0], SamplingParams(max_tokens=6),
                        encoder_ids=prompts[place][1])
                for place in mine
            ]  # fmt: skip
            outputs = generate(toy(variant, mesh), requests, limits=limits)
            own = [np.array(one.ids).tobytes() for one in outputs]
            found = [
                np.frombuffer(one, np.int64).tolist()
                for one in gather_results(own, len(prompts), mesh)
            ]
        expected = [expected_tokens(variant, tuple(ids), tuple(more)) for ids, more in prompts]
        assert found == expected, layout


def sent_by_attention(model: Decoder, input_length: int) -> list[tuple[str, int, float]]:
    """What attention to the memory of one layer sends for a decode token of one sequence."""
    cache = model.allocate_cache(4, 3, encoder_length=input_length)
    ids_T = np.zeros(input_length, int)
    first = ScheduledChunk(np.zeros(3, int), cache, encoder_ids_T=ids_T)
    model.forward(pack([first], model.sequence_sharding))
    step = pack([(np.zeros(1, int), cache)], model.sequence_sharding)
    w = getattr(model.layers[0], "cross_attention", None)
    assert isinstance(w, CrossAttention)
    q_NhK = w.project_q(np.ones((len(step.ids_N), model.config.hidden)))
    model.mesh.ledger.clear()
    model.attend_memory(q_NhK, w.spec, 0, step, model.mesh)
    return [(str(what), entry.calls, entry.wire_bytes) for what, _, entry in model.mesh.ledger]


@pytest.mark.ranks(2, 3)
def test_the_length_of_an_input_does_not_change_what_is_sent(comm: MPI.Intracomm):
    with mesh_of(comm, MIXED, Layout(cp=comm.size)) as mesh:
        model = toy(MIXED, mesh)
        assert sent_by_attention(model, 2) == sent_by_attention(model, 50) != []
    with mesh_of(comm, MIXED, Layout(tp=comm.size)) as mesh:
        assert sent_by_attention(toy(MIXED, mesh), 9) == []


@pytest.mark.ranks(2, 4)
def test_memories_are_divided(comm: MPI.Intracomm):
    """By heads over tp, and by positions over cp; the bound of its bytes holds."""
    config = tiny_config(MIXED)
    for layout in (Layout(tp=comm.size), Layout(cp=comm.size)):
        with mesh_of(comm, MIXED, layout) as mesh:
            model = toy(MIXED, mesh)
            cache = model.allocate_cache(8, encoder_length=40)
            assert cache.memory is not None
            heads, _, slots = cache.memory.k.shape[1:]
            assert heads <= -(-config.heads // layout.tp) and slots == 40 // layout.cp
            assert cache.nbytes <= model.cache_bytes(8, encoder_length=40)
