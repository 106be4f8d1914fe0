"""Packed steps: the new tokens of all running sequences in one array, one after the other.

A step has no batch axis and no padding. Prompts, single tokens, sequences of different lengths
and mixtures of them are the same array with other bounds. Over context-parallel ranks its tokens
are dealt, so that ``x_ND`` holds this rank's of them; `Step.places` is the way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np


class Began(NamedTuple):
    """How the first positions of a sequence lie on the ranks of context parallelism: those below
    `kept` as the ones of a first step of `first` tokens; all others go round."""

    first: int
    kept: int

    def cut(self, length: int) -> Began:
        """How a sequence began that takes over the first `length` positions of this one."""
        return Began(self.first, min(self.kept, length))


@dataclass(frozen=True)
class Division:
    """Which tokens of a sequence this rank computes, and which positions its cache keeps.

    The ``cp`` ranks of context parallelism divide a sequence's tokens. Those of a prompt's first
    step go by `order`: "zigzag" cuts it into 2 cp blocks and gives each rank one from the front and
    one from the back, so that all see about as many keys (Llama 3: arXiv 2407.21783, section
    3.3.2), "contiguous" gives each one block. Later tokens go round by position, `interleave` at a
    time. A token's key and value stay on the cp rank that computed it. Of the ranks that hold the
    same key/value head, each keeps the positions that are its own in turn.

    `heads` are the query heads of each of these sharers.
    """

    cp: int = 1
    cp_rank: int = 0
    order: str = "zigzag"
    heads: tuple[int, ...] = (1,)
    sharer: int = 0
    interleave: int = 1

    def tokens(self, start: int, stop: int) -> list[np.ndarray]:
        """The positions that each cp rank computes of those from `start` to `stop` - 1 of a
        sequence, fed in one step: ascending arrays, disjoint, nothing left out."""
        positions = np.arange(start, stop)
        if self.cp == 1:
            return [positions]
        if start > 0:
            owners = positions // self.interleave % self.cp
            return [positions[owners == rank] for rank in range(self.cp)]
        if self.order == "contiguous":
            return np.array_split(positions, self.cp)
        blocks = np.array_split(positions, 2 * self.cp)
        return [np.concatenate([blocks[r], blocks[-1 - r]]) for r in range(self.cp)]

    def kept(self, positions: np.ndarray) -> np.ndarray | slice:
        """Which of the `positions` that its cp rank computes this rank's cache keeps."""
        sharers = len(self.heads)
        if sharers == 1:
            return slice(None)
        turns = positions // self.interleave // self.cp
        return np.flatnonzero(turns % sharers == self.sharer)

    def parts(self, began: Began, length: int) -> list[np.ndarray]:
        """The positions that each cp rank has of a sequence of `length` that began so: ascending
        arrays, disjoint, nothing left out."""
        firsts, laters = self.tokens(0, began.first), self.tokens(began.kept, length)
        return [
            np.concatenate([first[first < began.kept], later])
            for first, later in zip(firsts, laters, strict=True)
        ]

    def room(self, began: Began, length: int) -> int:
        """How many positions this rank keeps of a sequence of `length` that began so."""
        part = self.parts(began, length)[self.cp_rank]
        return len(part[self.kept(part)])

    def fullest(self, began: Began, length: int) -> int:
        """How many positions the cp rank that has the most has of a sequence of `length` that began
        so."""
        return max(map(len, self.parts(began, length)))

    def most_room(self, length: int, fullest: int | None = None) -> int:
        """At least as many positions as this rank keeps of a sequence of up to `length` of which no
        cp rank has more than `fullest`; unless that is given, of one that takes over nothing,
        however many of its tokens are fed in the first step."""
        sharers = len(self.heads)
        # A first step is divided to within a token or two, what follows to within a round.
        even = length // self.cp + self.interleave + 2
        mine = min(length, even if fullest is None else fullest)
        # Each of zigzag's two runs, and what follows, may begin and end in the middle of a round.
        return min(mine, mine // sharers + 3 * self.cp * self.interleave)


class KVCache:
    """The keys and values of one sequence on this rank, allocated once for all its positions.

    Values are (layers, g, room, K), keys (layers, g, K, room), each as the product with one query
    reads them fastest (for keys one and a half times as fast as by position, after 4,096). If they
    are latent, values are the first `latent` numbers of the keys, and not kept beside them. Pages
    that no position has reached take no memory. Of the sequence's `capacity` positions this rank
    keeps at most `room`; which, `positions` says.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        capacity: int,
        width: int,
        dtype: np.dtype,
        room: int | None = None,
        latent: int = 0,
    ):
        self.capacity, self.latent = capacity, latent
        room = capacity if room is None else room
        self.k = np.empty((layers, kv_heads, width, room), dtype)
        if latent:
            self.v = self.k[:, :, :latent].transpose(0, 1, 3, 2)
        else:
            self.v = np.empty((layers, kv_heads, room, width), dtype)
        self.positions = np.empty(room, np.int64)
        self.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.k.nbytes + (0 if self.latent else self.v.nbytes)

    def clear(self) -> None:
        """Forget everything: the next step feeds the sequence from its beginning."""
        self.length = 0  # positions of the sequence up to and including the present step
        self.held = 0  # how many of them are kept here
        self.stored = 0  # how many of those came before the present step

    def take(self, positions: np.ndarray, length: int) -> None:
        """Make room for the `positions` that the present step adds here; the sequence has now
        `length`."""
        self.length = length
        self.stored, self.held = self.held, self.held + len(positions)
        self.positions[self.stored : self.held] = positions

    def take_over(self, other: KVCache, length: int) -> None:
        """Begin, from nothing, with what `other` holds of the first `length` positions of its
        sequence, which are this one's as well: on every rank what it has of them. Only for
        sequences of one and the same rotary frequencies."""
        self.length = length
        self.stored = self.held = int(np.searchsorted(other.positions[: other.held], length))
        kept = slice(self.held)
        self.positions[kept] = other.positions[kept]
        self.k[..., kept] = other.k[..., kept]
        if not self.latent:
            self.v[:, :, kept] = other.v[:, :, kept]

    def store(self, layer: int, k_SgK: np.ndarray, v_SgV: np.ndarray) -> None:
        """Put the keys and values of the positions last taken in their place."""
        self.k[layer, :, :, self.stored : self.held] = k_SgK.transpose(1, 2, 0)
        if not self.latent:
            self.v[layer, :, self.stored : self.held] = v_SgV.transpose(1, 0, 2)

    def read(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All keys and values kept here and their positions, ascending: ``(k_gTK, v_gTV,
        at_T)``."""
        kept = slice(self.held)
        k_gTK = self.k[layer, :, :, kept].transpose(0, 2, 1)
        return k_gTK, self.v[layer, :, kept], self.positions[kept]


class Feed(NamedTuple):
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

    new: slice  # the place of this rank's tokens on its packed axis
    cache: KVCache  # its `length` already counts the new tokens
    kept: np.ndarray | slice  # which of this rank's tokens its cache keeps
    tokens: list[np.ndarray]  # the positions of each cp rank's tokens
    fresh: bool  # whether the sequence begins in this step
    known: int  # the sequence's length once all tokens known of it are fed
    request: int  # the sequence's number
    prompt: int | None  # the positions from here on were generated, if any were


@dataclass(frozen=True)
class Step:
    """One pass through the model.

    `ids_N` are this rank's new tokens and `positions_N` their positions in their sequences;
    `wanted_M` are the places on the packed axis whose logits are asked for.

    `places` are the places of each cp rank's tokens among those of all, and `answers` which of all
    wanted tokens are each cp rank's.
    """

    ids_N: np.ndarray
    positions_N: np.ndarray
    segments: list[Segment]
    wanted_M: np.ndarray
    places: list[np.ndarray]
    answers: list[np.ndarray]
    division: Division

    @cached_property
    def requests_N(self) -> np.ndarray:
        """The number of the sequence of each of this rank's tokens."""
        requests_N = np.empty(len(self.ids_N), np.int64)
        for segment in self.segments:
            requests_N[segment.new] = segment.request
        return requests_N

    @cached_property
    def generated_N(self) -> np.ndarray:
        """Which of this rank's tokens were generated: the others are of prompts."""
        generated_N = np.zeros(len(self.ids_N), bool)
        for segment in self.segments:
            if segment.prompt is not None:
                generated_N[segment.new] = self.positions_N[segment.new] >= segment.prompt
        return generated_N

    @cached_property
    def fresh(self) -> list[Segment]:
        """The sequences that begin in this step."""
        return [segment for segment in self.segments if segment.fresh]

    @cached_property
    def continued(self) -> list[Segment]:
        """The sequences of which caches already hold something."""
        return [segment for segment in self.segments if not segment.fresh]

    @cached_property
    def continued_here(self) -> np.ndarray:
        """The places of their tokens on this rank's packed axis."""
        return np.concatenate([np.arange(s.new.start, s.new.stop) for s in self.continued])

    @cached_property
    def continued_counts(self) -> tuple[int, ...]:
        """How many of their tokens each cp rank has."""
        counts = zip(*(map(len, segment.tokens) for segment in self.continued), strict=True)
        return tuple(map(sum, counts))

    @cached_property
    def continued_places(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each of them the places of its tokens among those of all cp ranks, which come rank by
        rank, and their positions, ascending."""
        places: list[list[np.ndarray]] = [[] for _ in self.continued]
        stop = 0
        for rank in range(self.division.cp):
            for mine, segment in zip(places, self.continued, strict=True):
                start, stop = stop, stop + len(segment.tokens[rank])
                mine.append(np.arange(start, stop))
        in_order = []
        for mine, segment in zip(places, self.continued, strict=True):
            positions = np.concatenate(segment.tokens)
            order = np.argsort(positions)
            in_order.append((np.concatenate(mine)[order], positions[order]))
        return in_order


def pack(
    feeds: Sequence[Feed | tuple[np.ndarray, KVCache]],
    division: Division = Division(),  # noqa: B008 (immutable)
    all_logits: bool = False,
) -> Step:
    """The step that feeds each sequence's next tokens and asks for the logits after the last one
    known of it, or after every token fed.

    The caches' lengths are advanced by the new tokens.
    """
    segments: list[Segment] = []
    nothing = np.empty(0, np.int64)  # a step may feed nothing at all
    ids, positions, places = [nothing], [nothing], [[nothing] * division.cp]
    wanted: list[int] = []
    begin = stop = 0  # of a sequence's new tokens among all of the step's, and this rank's
    for feed in feeds:
        ids_S, cache, remaining, request, prompt = Feed(*feed)
        start = cache.length
        tokens = division.tokens(start, start + len(ids_S))
        mine = tokens[division.cp_rank]
        kept = division.kept(mine)
        cache.take(mine[kept], start + len(ids_S))
        new = slice(stop, stop + len(mine))
        known = cache.length + remaining
        segments.append(Segment(new, cache, kept, tokens, start == 0, known, request, prompt))
        ids.append(ids_S[mine - start])
        positions.append(mine)
        places.append([at - start + begin for at in tokens])
        begin, stop = begin + len(ids_S), new.stop
        if not remaining:
            wanted.append(begin - 1)
    all_places = [np.concatenate(one) for one in zip(*places, strict=True)]
    wanted_of_all = np.arange(begin) if all_logits else np.array(wanted, np.int64)
    here = [np.isin(at, wanted_of_all) for at in all_places]
    return Step(
        ids_N=np.concatenate(ids),
        positions_N=np.concatenate(positions),
        segments=segments,
        wanted_M=np.flatnonzero(here[division.cp_rank]),
        places=all_places,
        answers=[
            np.searchsorted(wanted_of_all, at[mask])
            for at, mask in zip(all_places, here, strict=True)
        ],
        division=division,
    )
