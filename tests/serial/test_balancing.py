"""Copies of experts and their places: what must hold of any loads, and the published greedy rules
as plainly as they can be written."""

from __future__ import annotations

import numpy as np
import pytest

from mpishard.arithmetic.eplb import rank_loads, rebalance_experts, replicate_experts

CASES = [(6, 2, 3), (6, 2, 4), (6, 4, 2), (7, 4, 4), (9, 3, 9), (12, 6, 3), (5, 5, 1), (4, 1, 4)]


def random_loads(experts: int, seed: int) -> list[float]:
    """A few experts have most to do, and some nothing."""
    return np.random.RandomState(seed).geometric(0.05, experts).clip(5).astype(float).tolist()


@pytest.mark.parametrize("experts, ranks, slots", CASES)
def test_every_rank_is_full_has_no_expert_twice_and_none_is_missing(experts, ranks, slots):
    for seed in range(20):
        held = rebalance_experts(random_loads(experts, seed), ranks, slots)
        assert [len(numbers) for numbers in held] == [slots] * ranks
        assert all(numbers == sorted(set(numbers)) for numbers in held)
        assert set().union(*held) == set(range(experts))


def test_as_published():
    """The heaviest share is halved, and so on; then the heaviest goes to the lightest with room.
    Where that puts no expert twice on a rank, it is what comes out."""
    compared = 0
    for experts, ranks, slots in CASES:
        for seed in range(20):
            loads = random_loads(experts, seed)
            copies = [1] * experts
            while sum(copies) < ranks * slots:
                share = [load / n for load, n in zip(loads, copies, strict=True)]
                heaviest = max(share)
                tied = [e for e in range(experts) if share[e] == heaviest]
                copies[min(tied, key=lambda e: (copies[e], e))] += 1
            items = [e for e in range(experts) for _ in range(copies[e])]
            items.sort(key=lambda e: -loads[e] / copies[e])
            packs: list[list[int]] = [[] for _ in range(ranks)]
            for expert in items:
                sums = [sum(loads[e] / copies[e] for e in pack) for pack in packs]
                room = [rank for rank in range(ranks) if len(packs[rank]) < slots]
                packs[min(room, key=lambda rank: sums[rank])].append(expert)
            if all(len(set(pack)) == slots for pack in packs):
                assert rebalance_experts(loads, ranks, slots) == [sorted(pack) for pack in packs]
                compared += 1
    assert compared > 60


def test_copies_go_to_those_that_have_most_to_do_each():
    assert replicate_experts([8, 2, 5, 1], total=7, most=4) == [3, 1, 2, 1]
    assert replicate_experts([8, 2, 5, 1], total=7, most=2) == [2, 2, 2, 1]
    assert replicate_experts([0, 0, 0], total=5, most=3) == [2, 2, 1]


def test_a_copy_moves_where_only_ranks_with_room_have_the_expert():
    held = rebalance_experts([100, 1, 1, 1], ranks=3, slots=2)
    assert [numbers[0] for numbers in held] == [0, 0, 0]
    assert sorted(numbers[1] for numbers in held) == [1, 2, 3]
    for seed in range(200):
        loads = random_loads(5, seed)
        for slots in (2, 3, 4):
            held = rebalance_experts(loads, 4, slots)
            assert all(len(set(numbers)) == slots for numbers in held)


def test_copies_and_places_level_the_loads():
    before, after = [], []
    for seed in range(50):
        loads = random_loads(16, seed)
        before.append(max(rank_loads(loads, np.arange(16).reshape(4, 4).tolist())))
        after.append(max(rank_loads(loads, rebalance_experts(loads, 4, 6))))
        assert sum(rank_loads(loads, rebalance_experts(loads, 4, 6))) == pytest.approx(sum(loads))
    assert np.mean(after) < 0.75 * np.mean(before)


@pytest.mark.parametrize("experts, ranks, slots", [(6, 2, 2), (3, 2, 4)])
def test_slots_that_do_not_fit(experts, ranks, slots):
    with pytest.raises(ValueError, match=f"{ranks} times {slots} slots do not fit {experts} exp"):
        rebalance_experts([1.0] * experts, ranks, slots)
