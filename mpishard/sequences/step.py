"""Packed steps: the new tokens of all running sequences in one array, one after the other.

A step has no batch axis and no padding. Prompts, single tokens, sequences of different lengths
and mixtures of them are the same array with other bounds. Over context-parallel ranks its tokens
are dealt, so that ``x_ND`` holds this rank's of them; `Step.global_index` is the way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np


class FirstChunk(NamedTuple):
    """How the first positions of a sequence lie on the ranks of context parallelism: those below
    `cached` as the ones of a first step of `first` tokens; all others go round."""

    first: int
    cached: int

    def cut(self, length: int) -> FirstChunk:
        """How a sequence began that takes over the first `length` positions of this one."""
        return FirstChunk(self.first, min(self.cached, length))


@dataclass(frozen=True)
class SequenceSharding:
    """Which tokens of a sequence this rank computes, and which positions its cache keeps.

    The ``cp`` ranks of context parallelism divide a sequence's tokens. Those of a prompt's first
    step go by `order`: "zigzag" cuts it into 2 cp blocks and gives each rank one from the front and
    one from the back, so that all see about as many keys (Llama 3: arXiv 2407.21783, section
    3.3.2), "contiguous" gives each one block. Later tokens go round by position, `interleave_size`
    at a time. A token's key and value stay on the cp rank that computed it. Of the ranks that hold
    the same key/value head, each keeps the positions that are its own in turn.

    `heads` are the query heads of each of these sharers.
    """

    cp: int = 1
    cp_rank: int = 0
    order: str = "zigzag"
    heads: tuple[int, ...] = (1,)
    kv_replica_rank: int = 0
    interleave_size: int = 1

    def tokens(self, start: int, stop: int) -> list[np.ndarray]:
        """The positions that each cp rank computes of those from `start` to `stop` - 1 of a
        sequence, fed in one step: ascending arrays, disjoint, nothing left out."""
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
        sharers = len(self.heads)
        if sharers == 1:
            return slice(None)
        turns = positions // self.interleave_size // self.cp
        return np.flatnonzero(turns % sharers == self.kv_replica_rank)

    def positions_by_rank(self, first_chunk: FirstChunk, length: int) -> list[np.ndarray]:
        """The positions that each cp rank has of a sequence of `length` that began so: ascending
        arrays, disjoint, nothing left out."""
        firsts, laters = self.tokens(0, first_chunk.first), self.tokens(first_chunk.cached, length)
        return [
            np.concatenate([first[first < first_chunk.cached], later])
            for first, later in zip(firsts, laters, strict=True)
        ]

    def local_slots(self, first_chunk: FirstChunk, length: int) -> int:
        """How many positions this rank keeps of a sequence of `length` that began so."""
        part = self.positions_by_rank(first_chunk, length)[self.cp_rank]
        return len(part[self.cached_here(part)])

    def max_rank_positions(self, first_chunk: FirstChunk, length: int) -> int:
        """How many positions the cp rank that has the most has of a sequence of `length` that began
        so."""
        return max(map(len, self.positions_by_rank(first_chunk, length)))

    def max_local_slots(self, length: int, max_rank_positions: int | None = None) -> int:
        """At least as many positions as this rank keeps of a sequence of up to `length` of which no
        cp rank has more than `max_rank_positions`; unless that is given, of one that takes over
        nothing, however many of its tokens are fed in the first step."""
        sharers = len(self.heads)
        # A first step is divided to within a token or two, what follows to within a round.
        even = length // self.cp + self.interleave_size + 2
        mine = min(length, even if max_rank_positions is None else max_rank_positions)
        # Each of zigzag's two runs, and what follows, may begin and end in the middle of a round.
        return min(mine, mine // sharers + 3 * self.cp * self.interleave_size)


class KVCache:
    """The keys and values of one sequence on this rank, allocated once for all its positions.

    Values are (layers, g, room, K), keys (layers, g, K, room), each as the product with one query
    reads them fastest (for keys one and a half times as fast as by position, after 4,096). If they
    are latent, values are the first `latent` numbers of the keys, and not kept beside them. Pages
    that no position has reached take no memory. Of the sequence's `capacity` positions this rank
    keeps at most `num_slots`; which, `positions` says.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        capacity: int,
        width: int,
        dtype: np.dtype,
        num_slots: int | None = None,
        latent: int = 0,
    ):
        self.capacity, self.latent = capacity, latent
        num_slots = capacity if num_slots is None else num_slots
        self.k = np.empty((layers, kv_heads, width, num_slots), dtype)
        if latent:
            self.v = self.k[:, :, :latent].transpose(0, 1, 3, 2)
        else:
            self.v = np.empty((layers, kv_heads, num_slots, width), dtype)
        self.positions = np.empty(num_slots, np.int64)
        self.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.k.nbytes + (0 if self.latent else self.v.nbytes)

    def clear(self) -> None:
        """Forget everything: the next step feeds the sequence from its beginning."""
        self.length = 0  # positions of the sequence up to and including the present step
        self.num_local = 0  # how many of them are kept here
        self.write_offset = 0  # how many of those came before the present step

    def extend(self, positions: np.ndarray, length: int) -> None:
        """Make room for the `positions` that the present step adds here; the sequence has now
        `length`."""
        self.length = length
        self.write_offset, self.num_local = self.num_local, self.num_local + len(positions)
        self.positions[self.write_offset : self.num_local] = positions

    def copy_prefix(self, other: KVCache, length: int) -> None:
        """Begin, from nothing, with what `other` holds of the first `length` positions of its
        sequence, which are this one's as well: on every rank what it has of them. Only for
        sequences of one and the same rotary frequencies."""
        self.length = length
        self.write_offset = self.num_local = int(
            np.searchsorted(other.positions[: other.num_local], length)
        )
        cached = slice(self.num_local)
        self.positions[cached] = other.positions[cached]
        self.k[..., cached] = other.k[..., cached]
        if not self.latent:
            self.v[:, :, cached] = other.v[:, :, cached]

    def write(self, layer: int, k_SgK: np.ndarray, v_SgV: np.ndarray) -> None:
        """Put the keys and values of the positions last taken in their place."""
        self.k[layer, :, :, self.write_offset : self.num_local] = k_SgK.transpose(1, 2, 0)
        if not self.latent:
            self.v[layer, :, self.write_offset : self.num_local] = v_SgV.transpose(1, 0, 2)

    def read(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All keys and values kept here and their positions, ascending: ``(k_gTK, v_gTV,
        at_T)``."""
        cached = slice(self.num_local)
        k_gTK = self.k[layer, :, :, cached].transpose(0, 2, 1)
        return k_gTK, self.v[layer, :, cached], self.positions[cached]


class ScheduledChunk(NamedTuple):
    """What a step is to feed of a sequence: its next tokens and its cache. `remaining` more tokens
    are known and follow in later steps. `request` is the sequence's number, and its positions from
    `prompt` on, if that is given, were generated."""

    ids_S: np.ndarray
    cache: KVCache
    remaining: int = 0
    request: int = 0
    prompt: int | None = None


@dataclass(frozen=True)
class Segment:
    """One sequence's part of a step."""

    token_slice: slice  # the place of this rank's tokens on its packed axis
    cache: KVCache  # its `length` already counts the new tokens
    cached: np.ndarray | slice  # which of this rank's tokens its cache keeps
    positions_by_rank: list[np.ndarray]  # the positions of each cp rank's tokens
    first_chunks: bool  # whether the sequence begins in this step
    num_known: int  # the sequence's length once all tokens known of it are fed
    request: int  # the sequence's number
    prompt: int | None  # the positions from here on were generated, if any were


@dataclass(frozen=True)
class Step:
    """One pass through the model.

    `ids_N` are this rank's new tokens and `positions_N` their positions in their sequences;
    `logits_indices_M` are the places on the packed axis whose logits are asked for.

    `global_index` are the places of each cp rank's tokens among those of all, and
    `logits_owner_index` which of all wanted tokens are each cp rank's."""

    ids_N: np.ndarray
    positions_N: np.ndarray
    segments: list[Segment]
    logits_indices_M: np.ndarray
    global_index: list[np.ndarray]
    logits_owner_index: list[np.ndarray]
    sequence_sharding: SequenceSharding

    @cached_property
    def requests_N(self) -> np.ndarray:
        """The number of the sequence of each of this rank's tokens."""
        requests_N = np.empty(len(self.ids_N), np.int64)
        for segment in self.segments:
            requests_N[segment.token_slice] = segment.request
        return requests_N

    @cached_property
    def generated_N(self) -> np.ndarray:
        """Which of this rank's tokens were generated: the others are of prompts."""
        generated_N = np.zeros(len(self.ids_N), bool)
        for segment in self.segments:
            if segment.prompt is not None:
                generated_N[segment.token_slice] = (
                    self.positions_N[segment.token_slice] >= segment.prompt
                )
        return generated_N

    @cached_property
    def first_chunks(self) -> list[Segment]:
        """The sequences that begin in this step."""
        return [segment for segment in self.segments if segment.first_chunks]

    @cached_property
    def extends(self) -> list[Segment]:
        """The sequences of which caches already hold something."""
        return [segment for segment in self.segments if not segment.first_chunks]

    @cached_property
    def extend_token_index(self) -> np.ndarray:
        """The places of their tokens on this rank's packed axis."""
        return np.concatenate(
            [np.arange(s.token_slice.start, s.token_slice.stop) for s in self.extends]
        )

    @cached_property
    def extend_counts(self) -> tuple[int, ...]:
        """How many of their tokens each cp rank has."""
        counts = zip(
            *(map(len, segment.positions_by_rank) for segment in self.extends), strict=True
        )
        return tuple(map(sum, counts))

    @cached_property
    def extend_global_index(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each of them the places of its tokens among those of all cp ranks, which come rank by
        rank, and their positions, ascending."""
        global_index: list[list[np.ndarray]] = [[] for _ in self.extends]
        stop = 0
        for rank in range(self.sequence_sharding.cp):
            for mine, segment in zip(global_index, self.extends, strict=True):
                start, stop = stop, stop + len(segment.positions_by_rank[rank])
                mine.append(np.arange(start, stop))
        in_order = []
        for mine, segment in zip(global_index, self.extends, strict=True):
            positions = np.concatenate(segment.positions_by_rank)
            order = np.argsort(positions)
            in_order.append((np.concatenate(mine)[order], positions[order]))
        return in_order


def pack(
    chunks: Sequence[ScheduledChunk | tuple[np.ndarray, KVCache]],
    sequence_sharding: SequenceSharding = SequenceSharding(),  # noqa: B008 (immutable)
    all_logits: bool = False,
) -> Step:
    """The step that feeds each sequence's next tokens and asks for the logits after the last one
    known of it, or after every token fed.

    The caches' lengths are advanced by the new tokens.
    """
    segments: list[Segment] = []
    nothing = np.empty(0, np.int64)  # a step may feed nothing at all
    ids, positions, global_index = [nothing], [nothing], [[nothing] * sequence_sharding.cp]
    wanted: list[int] = []
    begin = stop = 0  # of a sequence's new tokens among all of the step's, and this rank's
    for chunk in chunks:
        ids_S, cache, remaining, request, prompt = ScheduledChunk(*chunk)
        start = cache.length
        tokens = sequence_sharding.tokens(start, start + len(ids_S))
        mine = tokens[sequence_sharding.cp_rank]
        cached = sequence_sharding.cached_here(mine)
        cache.extend(mine[cached], start + len(ids_S))
        token_slice = slice(stop, stop + len(mine))
        num_known = cache.length + remaining
        segments.append(
            Segment(token_slice, cache, cached, tokens, start == 0, num_known, request, prompt)
        )
        ids.append(ids_S[mine - start])
        positions.append(mine)
        global_index.append([at - start + begin for at in tokens])
        begin, stop = begin + len(ids_S), token_slice.stop
        if not remaining:
            wanted.append(begin - 1)
    all_places = [np.concatenate(one) for one in zip(*global_index, strict=True)]
    wanted_of_all = np.arange(begin) if all_logits else np.array(wanted, np.int64)
    here = [np.isin(at, wanted_of_all) for at in all_places]
    return Step(
        ids_N=np.concatenate(ids),
        positions_N=np.concatenate(positions),
        segments=segments,
        logits_indices_M=np.flatnonzero(here[sequence_sharding.cp_rank]),
        global_index=all_places,
        logits_owner_index=[
            np.searchsorted(wanted_of_all, at[mask])
            for at, mask in zip(all_places, here, strict=True)
        ],
        sequence_sharding=sequence_sharding,
    )
