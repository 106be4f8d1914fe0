"""How the positions of a sequence are sharded over the ranks of a replica.

Two groups of ranks take part. The ``cp`` ranks of context parallelism share the computation of a
sequence's tokens. The ``tp`` ranks that hold the same key/value head (flash decoding) share its
cache. This is arithmetic alone, which every rank does for itself.

>>> ranks = [SequenceSharding(cp=2, cp_rank=rank) for rank in range(2)]
>>> [positions.tolist() for positions in ranks[0].tokens(0, 8)]  # a prompt's first chunk: zigzag
[[0, 1, 6, 7], [2, 3, 4, 5]]
>>> [positions.tolist() for positions in ranks[0].tokens(8, 12)]  # later tokens: round robin
[[8, 10], [9, 11]]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class FirstChunk(NamedTuple):
    """How the first positions of a sequence were sharded over ``cp``.

    Positions below `inherited` lie where a first chunk of `length` tokens puts them; all later ones
    go round robin. `inherited` is the whole chunk, or the prefix of another sequence that this one
    reuses.
    """

    length: int
    inherited: int

    def cut(self, length: int) -> FirstChunk:
        """That of a sequence which reuses the first `length` positions of this one."""
        return FirstChunk(self.length, min(self.inherited, length))


@dataclass(frozen=True)
class SequenceSharding:
    """Which tokens of a sequence this rank computes, and which positions its cache keeps.

    The ``cp`` ranks shard a sequence's tokens. A prompt's first chunk goes by `order`: "zigzag"
    cuts it into 2 cp blocks and gives each rank one from the front and one from the back, so that
    all ranks attend to about as many keys (Llama 3: arXiv 2407.21783, section 3.3.2); "contiguous"
    gives each rank one block. Later tokens go round robin by position, `interleave_size` at a time.
    A token's key and value stay on the cp rank that computed it. The tp ranks that hold the same
    key/value head, `kv_replica_rank` of which is this one, keep its positions in turn.

    `heads` are the query heads of each of these tp ranks.
    """

    cp: int = 1
    cp_rank: int = 0
    order: str = "zigzag"
    heads: tuple[int, ...] = (1,)
    kv_replica_rank: int = 0
    interleave_size: int = 1

    def tokens(self, start: int, stop: int) -> list[np.ndarray]:
        """The positions from `start` to `stop` - 1, processed in one step, that each cp rank
        computes: ascending arrays, disjoint, nothing left out."""
        positions = np.arange(start, stop)
        if self.cp == 1:
            return [positions]
        if start > 0:
            owners = positions // self.interleave_size % self.cp
            return [positions[owners == rank] for rank in range(self.cp)]
        if self.order == "contiguous":
            return np.array_split(positions, self.cp)
        blocks = np.array_split(positions, 2 * self.cp)
        return [np.concatenate([blocks[r], blocks[-1 - r]]) for r in range(self.cp)]

    def cached_here(self, positions: np.ndarray) -> np.ndarray | slice:
        """Which of the `positions` that its cp rank computes this rank's cache keeps."""
        replicas = len(self.heads)
        if replicas == 1:
            return slice(None)
        rounds = positions // self.interleave_size // self.cp
        return np.flatnonzero(rounds % replicas == self.kv_replica_rank)

    def positions_by_rank(self, first_chunk: FirstChunk, length: int) -> list[np.ndarray]:
        """The positions that each cp rank has of a sequence of `length`: ascending arrays,
        disjoint, nothing left out."""
        first = self.tokens(0, first_chunk.length)
        later = self.tokens(first_chunk.inherited, length)
        return [
            np.concatenate([one[one < first_chunk.inherited], other])
            for one, other in zip(first, later, strict=True)
        ]

    def local_slots(self, first_chunk: FirstChunk, length: int) -> int:
        """How many positions this rank's cache keeps of a sequence of `length`."""
        own = self.positions_by_rank(first_chunk, length)[self.cp_rank]
        return len(own[self.cached_here(own)])

    def max_rank_positions(self, first_chunk: FirstChunk, length: int) -> int:
        """How many positions of a sequence of `length` the cp rank that has most has."""
        return max(map(len, self.positions_by_rank(first_chunk, length)))

    def max_local_slots(self, length: int, max_rank_positions: int | None = None) -> int:
        """Upper bound on the cache slots that this rank needs for up to `length` positions.

        `max_rank_positions` caps the share of any cp rank. Without it, a first chunk of any length
        is assumed, and no reused prefix.
        """
        replicas = len(self.heads)
        # A first chunk is sharded to within a token or two, what follows to within a round.
        even = length // self.cp + self.interleave_size + 2
        mine = min(length, even if max_rank_positions is None else max_rank_positions)
        # Each of zigzag's two runs, and what follows, may begin and end in the middle of a round.
        return min(mine, mine // replicas + 3 * self.cp * self.interleave_size)
