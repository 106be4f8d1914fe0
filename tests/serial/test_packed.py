"""Packed steps: who computes which tokens, who keeps which positions, and the way back."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from mpishard.sequences.kv_cache import KVCache
from mpishard.sequences.sharding import FirstChunk, SequenceSharding
from mpishard.sequences.step import ScheduledChunk, pack

CP_ORDERS = ("zigzag", "contiguous")


def divisions(cp: int, sharers: int, order: str, interleave_size: int) -> list[SequenceSharding]:
    """What each rank of a replica knows, by (cp, sharer)."""
    heads = tuple(range(1, sharers + 1))
    return [
        SequenceSharding(cp, rank, order, heads, kv_replica_rank, interleave_size)
        for rank, kv_replica_rank in product(range(cp), range(sharers))
    ]


@pytest.mark.parametrize("order", CP_ORDERS)
@pytest.mark.parametrize("interleave_size", [1, 3])
@pytest.mark.parametrize("cp", [1, 2, 3, 4])
@pytest.mark.parametrize("start, stop", [(0, 0), (0, 1), (0, 3), (0, 16), (0, 29), (7, 8), (5, 22)])
def test_each_token_is_computed_once(cp, order, interleave_size, start, stop):
    for sequence_sharding in divisions(cp, 1, order, interleave_size):
        tokens = sequence_sharding.tokens(start, stop)
        assert len(tokens) == cp
        assert sorted(np.concatenate(tokens).tolist()) == list(range(start, stop))
        assert all((np.diff(mine) > 0).all() for mine in tokens)
        assert max(map(len, tokens)) - min(map(len, tokens)) <= max(2, interleave_size)


def test_zigzag_gives_each_rank_as_many_keys_to_see():
    tokens = SequenceSharding(cp=4).tokens(0, 64)
    assert [mine.tolist() for mine in tokens][0] == [*range(8), *range(56, 64)]
    assert len({int((mine + 1).sum()) for mine in tokens}) == 1
    contiguous = SequenceSharding(cp=4, order="contiguous").tokens(0, 64)
    assert [mine[0] for mine in contiguous] == [0, 16, 32, 48]


@pytest.mark.parametrize("order", CP_ORDERS)
@pytest.mark.parametrize(
    "cp, sharers, interleave_size", list(product([1, 2, 3], [1, 2, 3], [1, 2, 5]))
)
def test_each_position_is_kept_by_one_rank(cp, sharers, interleave_size, order):
    """By one of all the ranks that hold the same heads, whatever is fed when; and as evenly as the
    interleave allows."""
    first, length = 13, 61
    held = []
    for sequence_sharding in divisions(cp, sharers, order, interleave_size):
        kept = []
        for start, stop in [(0, first), (first, first + 1), (first + 1, 30), (30, length)]:
            mine = sequence_sharding.tokens(start, stop)[sequence_sharding.cp_rank]
            kept += mine[sequence_sharding.cached_here(mine)].tolist()
        assert kept == sorted(kept)
        assert len(kept) == sequence_sharding.local_slots(FirstChunk(first, first), length)
        held.append(kept)
    assert sorted(sum(held, [])) == list(range(length))
    lengths = [len(kept) for kept in held]
    assert max(lengths) - min(lengths) <= 4 + 2 * interleave_size


@pytest.mark.parametrize("order", CP_ORDERS)
@pytest.mark.parametrize("cp, sharers, interleave_size", list(product([1, 2, 3], [1, 2], [1, 3])))
@pytest.mark.parametrize("prefixes", [(29,), (8,), (31, 20), (10, 40), (30, 20, 5)])
def test_prefixes_of_prefixes(cp, sharers, interleave_size, order, prefixes):
    """Each sequence takes over so much of the one before: together the ranks have all of it, and
    each exactly as much as it has room for."""
    found = []
    for sequence_sharding in divisions(cp, sharers, order, interleave_size):
        began, length = FirstChunk(13, 13), 45
        cache = cache_of(sequence_sharding, began, length)
        for new in (13, 20, 12):
            pack([(np.zeros(new, int), cache)], sequence_sharding)
        for prefix in prefixes:
            donor, began, length = cache, began.cut(prefix), length + 7
            cache = cache_of(sequence_sharding, began, length)
            cache.copy_prefix(donor, prefix)
            for new in (1, length - prefix - 1):
                pack([(np.zeros(new, int), cache)], sequence_sharding)
        assert cache.num_local == len(cache.positions)
        assert cache.num_local <= sequence_sharding.max_local_slots(
            length, sequence_sharding.max_rank_positions(began, length)
        )
        assert (np.diff(cache.positions) > 0).all()
        found += cache.positions.tolist()
    assert sorted(found) == list(range(length))


def cache_of(sequence_sharding: SequenceSharding, began: FirstChunk, length: int) -> KVCache:
    """A cache with the room of a sequence that began so."""
    return KVCache(1, 1, length, 2, np.dtype(float), sequence_sharding.local_slots(began, length))


def test_the_cache_keeps_what_it_took():
    cache = KVCache(2, 1, 20, 3, np.dtype(float), num_slots=7)
    random = np.random.RandomState(0)
    k_SgK, v_SgK = random.standard_normal((2, 7, 1, 3))
    for layer in range(2):
        cache.clear()
        for new, length in (([0, 3, 6], 8), ([9], 10), ([], 11), ([12, 15, 18], 20)):
            cache.extend(np.array(new, int), length)
            rows = slice(cache.write_offset, cache.num_local)
            cache.write(layer, k_SgK[rows], v_SgK[rows])
        k_gTK, v_gTK, at_T = cache.read(layer)
        assert at_T.tolist() == [0, 3, 6, 9, 12, 15, 18] and cache.length == 20
        np.testing.assert_array_equal(k_gTK[0], k_SgK[:, 0])
        np.testing.assert_array_equal(v_gTK[0], v_SgK[:, 0])


@pytest.mark.parametrize("all_logits", [False, True])
@pytest.mark.parametrize("cp", [1, 2, 3])
@pytest.mark.parametrize("order", CP_ORDERS)
def test_places_and_answers_lead_back(cp, order, all_logits):
    """What the ranks have of a step's tokens and of its wanted ones, put at their places, is the
    whole step; a sequence with tokens yet to come wants nothing."""
    ids = [np.array([5, 6, 7, 8, 9, 10, 11]), np.array([3]), np.array([20, 21, 22]), np.array([4])]
    before, remaining = [0, 6, 0, 2], [0, 0, 5, 0]
    whole_W, stops = np.concatenate(ids), np.cumsum([len(ids_S) for ids_S in ids])
    wanted = np.arange(len(whole_W)) if all_logits else stops[np.array(remaining) == 0] - 1
    found_W, found_M = np.zeros_like(whole_W), np.zeros(len(wanted), int)
    for sequence_sharding in divisions(cp, 1, order, 1):
        feeds = []
        for ids_S, length, more in zip(ids, before, remaining, strict=True):
            cache = KVCache(1, 1, 20, 2, np.dtype(float))
            cache.length = length
            feeds.append(ScheduledChunk(ids_S, cache, more))
        step = pack(feeds, sequence_sharding, all_logits)
        rank = sequence_sharding.cp_rank
        found_W[step.global_index[rank]] = step.ids_N
        found_M[step.logits_owner_index[rank]] = step.ids_N[step.logits_indices_M]
        for segment, length in zip(step.segments, before, strict=True):
            positions_S = step.positions_N[segment.token_slice]
            np.testing.assert_array_equal(positions_S, segment.positions_by_rank[rank])
            assert segment.is_first_chunk == (length == 0)
        assert [segment.num_known for segment in step.segments] == [7, 7, 8, 3]
    np.testing.assert_array_equal(found_W, whole_W)
    np.testing.assert_array_equal(found_M, whole_W[wanted])
