"""Copies of much-used experts, and ranks that have about equally much to do.

The global policy of EPLB, which DeepSeek-V3 is served with (arXiv 2412.19437, section 3.4;
github.com/deepseek-ai/EPLB): further copies go one by one to the expert whose copies have most to
do each, and then the copies, the heaviest first, to the least loaded rank that has room. All ranks
have as many slots. Unlike there, no rank has an expert twice: the second would do nothing for it.
"""

from __future__ import annotations

from collections.abc import Sequence


def rebalance_experts(loads_E: Sequence[float], ranks: int, slots: int) -> list[list[int]]:
    """The experts of each of so many ranks, ascending, in `slots` on each.

    Raises ValueError unless all experts fit, and so that no rank must have one twice.
    """
    E = len(loads_E)
    if not E <= ranks * slots or not slots <= E:
        raise ValueError(f"{ranks} times {slots} slots do not fit {E} experts")
    replica_count_E = replicate_experts(loads_E, ranks * slots, most=ranks)
    held: list[list[int]] = [[] for _ in range(ranks)]
    filled = [0.0] * ranks
    share_E = [load / copies for load, copies in zip(loads_E, replica_count_E, strict=True)]
    for expert in sorted(range(E), key=lambda e: (-share_E[e], e)):
        for _ in range(replica_count_E[expert]):
            _place(expert, held, filled, share_E, slots)
    return [sorted(experts) for experts in held]


def replicate_experts(loads_E: Sequence[float], total: int, most: int) -> list[int]:
    """How many copies each expert has of `total`: one, and more of the busiest, `most` at most.

    >>> copies_of([8, 2, 5, 1], total=7, most=4)
    [3, 1, 2, 1]
    """
    replica_count_E = [1] * len(loads_E)
    for _ in range(total - len(loads_E)):
        below = [e for e, copies in enumerate(replica_count_E) if copies < most]
        busiest = max(
            below, key=lambda e: (loads_E[e] / replica_count_E[e], -replica_count_E[e], -e)
        )
        replica_count_E[busiest] += 1
    return replica_count_E


def rank_loads(loads_E: Sequence[float], held: Sequence[Sequence[int]]) -> list[float]:
    """What each rank has to do if the copies of an expert share its load evenly."""
    replica_count_E = [sum(expert in experts for experts in held) for expert in range(len(loads_E))]
    return [
        sum(loads_E[expert] / replica_count_E[expert] for expert in experts) for experts in held
    ]


def _place(
    expert: int, held: list[list[int]], filled: list[float], share_E: list[float], slots: int
) -> None:
    """Put a copy of `expert` where there is room and none yet."""
    free = [rank for rank, experts in enumerate(held) if len(experts) < slots]
    without = [rank for rank in free if expert not in held[rank]]
    if not without:
        # All with room have it. A full rank without it has more experts than such a rank, and so
        # one that this rank lacks and can take over: the lightest, which moves least.
        taker = min(free, key=lambda rank: filled[rank])
        giver = min(
            (rank for rank, experts in enumerate(held) if expert not in experts),
            key=lambda rank: filled[rank],
        )
        moved = min(set(held[giver]) - set(held[taker]), key=lambda e: (share_E[e], e))
        held[giver].remove(moved)
        held[taker].append(moved)
        filled[giver] -= share_E[moved]
        filled[taker] += share_E[moved]
        without = [giver]
    rank = min(without, key=lambda rank: filled[rank])
    held[rank].append(expert)
    filled[rank] += share_E[expert]
