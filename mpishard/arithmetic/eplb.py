"""EPLB: replicas of much-used experts, placed so that ranks have about equally much to do.

The global policy of DeepSeek's expert-parallel load balancer (arXiv 2412.19437, section 3.4;
github.com/deepseek-ai/EPLB). It first adds replicas one at a time, each to the expert with the
highest load per replica. It then packs the replicas onto ranks, heaviest first, each onto the least
loaded rank that has room. All ranks hold equally many experts. Unlike there, no rank holds an
expert twice: the second replica would do nothing for it.
"""

from __future__ import annotations

from collections.abc import Sequence


def rebalance_experts(loads_E: Sequence[float], ranks: int, slots: int) -> list[list[int]]:
    """The experts of each of `ranks` ranks, ascending, `slots` on each.

    Raises ValueError unless all experts fit without one twice on a rank.
    """
    E = len(loads_E)
    if not E <= ranks * slots or not slots <= E:
        raise ValueError(f"{ranks} times {slots} slots do not fit {E} experts")
    replica_count_E = replicate_experts(loads_E, ranks * slots, most=ranks)
    held: list[list[int]] = [[] for _ in range(ranks)]
    filled = [0.0] * ranks
    share_E = [load / replicas for load, replicas in zip(loads_E, replica_count_E, strict=True)]
    for expert in sorted(range(E), key=lambda e: (-share_E[e], e)):
        for _ in range(replica_count_E[expert]):
            _pack(expert, held, filled, share_E, slots)
    return [sorted(experts) for experts in held]


def replicate_experts(loads_E: Sequence[float], total: int, most: int) -> list[int]:
    """How many of `total` replicas each expert has: at least one, at most `most`, and more the more
    load it has.

    >>> replicate_experts([8, 2, 5, 1], total=7, most=4)
    [3, 1, 2, 1]
    """
    replica_count_E = [1] * len(loads_E)
    for _ in range(total - len(loads_E)):
        below = [e for e, replicas in enumerate(replica_count_E) if replicas < most]
        busiest = max(
            below, key=lambda e: (loads_E[e] / replica_count_E[e], -replica_count_E[e], -e)
        )
        replica_count_E[busiest] += 1
    return replica_count_E


def rank_loads(loads_E: Sequence[float], held: Sequence[Sequence[int]]) -> list[float]:
    """The load of each rank if the replicas of an expert share its load evenly."""
    replica_count_E = [sum(expert in experts for experts in held) for expert in range(len(loads_E))]
    return [
        sum(loads_E[expert] / replica_count_E[expert] for expert in experts) for experts in held
    ]


def _pack(
    expert: int, held: list[list[int]], filled: list[float], share_E: list[float], slots: int
) -> None:
    """Put a replica of `expert` where there is room and none yet."""
    free = [rank for rank, experts in enumerate(held) if len(experts) < slots]
    without = [rank for rank in free if expert not in held[rank]]
    if not without:
        # Every rank with room has it. A full rank without it holds an expert that such a rank lacks
        # and can take over: the lightest, which moves least.
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
