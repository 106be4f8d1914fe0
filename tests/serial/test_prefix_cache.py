"""Prefix caching: which prefix a request reuses, and when it waits, without a model or ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpishard.engine.prefix_cache import MAX_IMBALANCE, MIN_PREFIX_TOKENS, PrefixCache
from mpishard.engine.sampling_params import SamplingParams
from mpishard.engine.sequence import Request, RequestOutput, Sequence
from mpishard.sequences.kv_cache import KVCache
from mpishard.sequences.sharding import FirstChunk, SequenceSharding


def fake_model(cp: int = 1, order: str = "zigzag", dynamic_from: int = 1000) -> Any:
    """What the prefix cache asks of a decoder, whose RoPE is dynamic beyond `dynamic_from`."""
    return SimpleNamespace(
        config=SimpleNamespace(max_position_embeddings=1000, linear_attention=None, encoder=None),
        sequence_sharding=SequenceSharding(cp, order=order),
        uses_dynamic_rope=lambda length: length > dynamic_from,
    )


def prompt(common: int, own: int, seed: int) -> list[int]:
    """`common` tokens that all prompts begin with, and `own` tokens that no other seed has."""
    return [*range(common), *([10_000 + seed] * own)]


def sequence(ids: list[int], cached: int, first: int | None = None, finished: str = "") -> Sequence:
    """A sequence with `cached` positions in its cache, of which `first` were its first chunk."""
    first = cached if first is None else first
    cache = KVCache(1, 1, len(ids) + 8, 1, np.dtype(np.float32))
    cache.extend(np.arange(cached), cached)
    output = RequestOutput(0, finish_reason=finished)
    return Sequence(
        Request(0, ids, SamplingParams(max_tokens=8)), output, cache, 0, FirstChunk(first, first)
    )


def lookup(
    ids: list[int], sequences: list[Sequence], model: Any = None, chunk: int | None = None
) -> tuple[Sequence | None, int, bool]:
    """The donor, the length of the prefix, and whether to wait for a longer one."""
    cache = PrefixCache(model or fake_model(), chunk, lambda request, first_chunk: True)
    hit, longer_soon = cache.lookup(Request(1, ids, SamplingParams(max_tokens=8)), sequences)
    return (hit.donor, hit.num_tokens, longer_soon) if hit else (None, 0, longer_soon)


def test_the_example_of_the_documentation():
    """Which rank computes which position, first of A and then of B."""
    sharding = SequenceSharding(cp=2)
    of_a = sharding.positions_by_rank(FirstChunk(16, 16), 16)
    of_b = sharding.positions_by_rank(FirstChunk(16, 16).cut(12), 16)
    assert [a.tolist() for a in of_a] == [[0, 1, 2, 3, 12, 13, 14, 15], [*range(4, 12)]]
    assert [b.tolist() for b in of_b] == [[0, 1, 2, 3, 12, 14], [*range(4, 12), 13, 15]]


def test_a_request_waits_for_what_is_about_to_be_computed_and_then_copies_it():
    a, b = prompt(100, 10, 1), prompt(100, 12, 2)
    assert lookup(b, [sequence(a, cached=0)]) == (None, 0, True)
    computed = sequence(a, cached=110)
    assert lookup(b, [computed]) == (computed, 100, False)


def test_a_finished_sequence_computes_nothing_more():
    """What its cache holds can be reused, but nothing is waited for."""
    done = sequence(prompt(100, 10, 1), cached=40, finished="stop")
    assert lookup(prompt(100, 12, 2), [done]) == (done, 40, False)


@pytest.mark.parametrize("more, waits", [(MIN_PREFIX_TOKENS - 1, False), (MIN_PREFIX_TOKENS, True)])
def test_a_wait_gains_as_many_tokens_as_the_shortest_prefix(more: int, waits: bool):
    half = sequence(prompt(40 + more, 10, 1), cached=40)
    assert lookup(prompt(40 + more, 12, 2), [half]) == (half, 40, waits)


@pytest.mark.parametrize("common, reused", [(MIN_PREFIX_TOKENS - 1, 0), (MIN_PREFIX_TOKENS, 32)])
def test_the_shortest_prefix(common: int, reused: int):
    donor = sequence(prompt(common, 10, 1), cached=common + 10)
    assert lookup(prompt(common, 12, 2), [donor])[1:] == (reused, False)


def test_the_longest_prefix_wins_and_the_first_of_equals():
    short, long, same = (sequence(prompt(n, 9, n), cached=n + 9) for n in (50, 90, 90))
    assert lookup(prompt(100, 12, 2), [short, long, same]) == (long, 90, False)


def test_the_last_token_of_a_prompt_is_computed():
    donor = sequence(prompt(100, 0, 1), cached=100)
    assert lookup(prompt(100, 0, 2), [donor])[1] == 99


def test_a_prefix_that_has_no_room_leaves_the_next_longest():
    long, short = sequence(prompt(90, 9, 1), cached=99), sequence(prompt(50, 9, 2), cached=59)
    cache = PrefixCache(fake_model(), None, lambda request, first: first.inherited < 90)
    hit, longer_soon = cache.lookup(
        Request(1, prompt(100, 3, 3), SamplingParams(max_tokens=8)), [long, short]
    )
    assert hit and (hit.donor, hit.num_tokens, longer_soon) == (short, 50, False)
    assert hit.first_chunk == FirstChunk(59, 50)


def test_dynamic_rope_rules_a_request_and_a_donor_out():
    """Both answers are 8 tokens long, the last of which needs no position."""
    donor, ids = sequence(prompt(100, 10, 1), cached=110), prompt(100, 20, 2)
    assert lookup(ids, [donor], fake_model(dynamic_from=127))[1] == 100
    assert lookup(ids, [donor], fake_model(dynamic_from=126))[1] == 0
    assert lookup(prompt(100, 3, 2), [donor], fake_model(dynamic_from=116))[1] == 0


@pytest.mark.parametrize("chunk, reused", [(None, 0), (41, 0), (40, 40)])
def test_under_cp_a_prefix_is_as_long_as_the_next_chunk(chunk: int | None, reused: int):
    donor = sequence(prompt(40, 60, 1), cached=100)
    assert lookup(prompt(40, 41, 2), [donor], fake_model(cp=2), chunk)[1] == reused
    assert lookup(prompt(40, 41, 2), [donor], fake_model(cp=1), chunk)[1] == 40


@pytest.mark.parametrize("order, reused", [("contiguous", 0), ("zigzag", 40)])
def test_under_cp_no_rank_holds_much_more_than_its_share(order: str, reused: int):
    """A third of A lies on one of three ranks, if they computed it in contiguous order."""
    donor, ids = sequence(prompt(40, 80, 1), cached=120), prompt(40, 1, 2)
    max_length = len(ids) + 7
    model = fake_model(3, order)
    most = model.sequence_sharding.max_rank_positions(FirstChunk(120, 40), max_length)
    assert (most > MAX_IMBALANCE * max_length / 3) == (not reused)
    assert lookup(ids, [donor], model)[1] == reused
