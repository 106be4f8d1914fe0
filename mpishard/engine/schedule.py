"""What a step feeds: the sequences of a replica that run, those that wait, and what bounds them.

Continuous batching (Orca: Yu et al. 2022, OSDI) with prompts in pieces (Sarathi: arXiv 2308.16369):
the next sequence enters in the step after one has ended, and pieces of prompts fill up the steps
of sequences that only add a token. A sequence reserves the cache of its longest possible answer
when it enters, so that none is ever put out again for want of memory.

A prompt that begins as another sequence's does takes over what that one's cache holds of it
(prefix sharing, as in vLLM and SGLang: arXiv 2312.07104, by copying), and waits for it where that
sequence is about to compute it. Over context-parallel ranks each copies what it has of the prefix,
so that nothing is sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mpishard.arithmetic.packed import Began, Feed, KVCache
from mpishard.engine.sampling import Sampling
from mpishard.model import Decoder

# Requests that a replica has at hand beyond those that run, so that a place is taken at once.
AHEAD = 2

# Tokens that two prompts must have in common for it to be worth a copy, or a step's wait.
WORTH_SHARING = 32

# How many times an even part of a sequence a context-parallel rank may have for a prefix's sake.
UNEVEN = 2


@dataclass(frozen=True)
class Limits:
    """What a replica takes on at once.

    A step feeds at most `step_tokens`, of at most `sequences` sequences, whose caches take at most
    `kv_bytes` on any rank (None: whatever they take). Prompts enter by pieces of at most `chunk`
    tokens or of what a step has left; with None they enter whole, one of more than `step_tokens`
    in a step that no other enters.
    """

    step_tokens: int = 2048
    sequences: int = 32
    chunk: int | None = None
    kv_bytes: int | None = None

    def piece(self, tokens: int, left: int, first: bool = True) -> int:
        """How many of `tokens` tokens of a sequence a step feeds that has `left` left; `first` if
        no other sequence enters in it."""
        if self.chunk is None:
            return tokens if first or tokens <= left else 0
        return max(0, min(tokens, self.chunk, left))


@dataclass(frozen=True)
class Request:
    """A prompt to be continued by at most `max_tokens` (1 or more) tokens.

    `index` is its place in the input, to which its random numbers belong. A token of `eos_ids`
    ends the answer and is its last; so does any token after which `stopped` is true of the tokens
    so far.
    """

    index: int
    ids: list[int]
    max_tokens: int
    sampling: Sampling = Sampling()
    eos_ids: frozenset[int] = frozenset()
    stopped: Callable[[list[int]], bool] | None = None

    def capacity(self, model: Decoder) -> int:
        """The positions of the longest answer: all but that of its last token, which is never
        fed."""
        return min(len(self.ids) + self.max_tokens - 1, model.config.max_positions)


@dataclass
class Answer:
    """The tokens that continue a request; `finish_reason` is "stop", "length" or "error". Of a
    request that cannot be taken on, or not brought to an end, `refused` says why."""

    index: int
    ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    refused: str = ""


@dataclass
class Running:
    """A sequence that has entered; its cache takes `bytes`, and `began` so."""

    request: Request
    answer: Answer
    cache: KVCache
    bytes: int = 0
    began: Began = Began(0, 0)
    fitted: int = 0  # the length whose rotary frequencies the cache has

    @property
    def known(self) -> list[int]:
        """The prompt and the tokens chosen."""
        return self.request.ids + self.answer.ids

    def unfed(self, model: Decoder) -> int:
        """How many of the tokens known it has yet to feed: all of them again where its cache no
        longer fits the rotary frequencies of its new length."""
        length = len(self.request.ids) + len(self.answer.ids)
        if model.depends_on_length(length) and self.fitted != length:
            self.cache.clear()
            self.fitted = length
        return length - self.cache.length

    def feed(self, tokens: int) -> Feed:
        """The next `tokens` of the tokens known."""
        ids, start = self.known, self.cache.length
        if not start:
            self.began = Began(tokens, tokens)
        new = np.array(ids[start : start + tokens], np.int64)
        index, prompt = self.request.index, len(self.request.ids)
        return Feed(new, self.cache, len(ids) - start - tokens, index, prompt)


@dataclass
class _Waiting:
    request: Request
    bytes: int


@dataclass(frozen=True)
class _Prefix:
    """What a sequence takes over of `donor`'s cache: the first `tokens` positions, so that it
    `began` as that one did and its own cache takes `bytes`."""

    donor: Running
    tokens: int
    began: Began
    bytes: int


class Schedule:
    """The sequences of one replica. Every rank of it keeps the same, without asking the others."""

    def __init__(self, model: Decoder, limits: Limits) -> None:
        self.model, self.limits = model, limits
        self.running: list[Running] = []
        self._waiting: deque[_Waiting] = deque()
        self._ended: list[Running] = []  # in the last step: what their caches hold is still there

    @property
    def busy(self) -> bool:
        """Whether there is something to feed."""
        return bool(self.running or self._waiting)

    @property
    def wanted(self) -> int:
        """How many more requests it could do with."""
        free = 0 if self._waiting else self.limits.sequences - len(self.running)
        return max(0, free + AHEAD - len(self._waiting))

    def add(self, requests: Sequence[Request]) -> list[tuple[Request, Answer]]:
        """Let `requests` wait for their turns; those that can never have one, with the answers
        that say so."""
        refused = []
        limit = self.limits.kv_bytes
        for request in requests:
            size = self._bytes(request)
            if limit is None or size <= limit:
                self._waiting.append(_Waiting(request, size))
                continue
            reason = (
                f"its {len(request.ids)} prompt tokens and up to {request.max_tokens} more need "
                f"{size} bytes of KV cache on a rank, but there are {limit}; shorten it, or allow "
                "more with --kv-memory"
            )
            refused.append((request, Answer(request.index, refused=reason)))
        return refused

    def _bytes(self, request: Request, began: Began | None = None) -> int:
        """What the cache of a request, which `began` so if it takes over a prefix, takes on the
        rank of the replica where it takes most; 0 where that does not matter."""
        if self.limits.kv_bytes is None:
            return 0
        return self.model.cache_bytes(request.capacity(self.model), began)

    def _fits(self, size: int) -> bool:
        """Whether there is room for a cache of `size` bytes beside those of what runs."""
        limit = self.limits.kv_bytes
        return limit is None or sum(one.bytes for one in self.running) + size <= limit

    def next(self) -> list[tuple[Running, Feed]]:
        """What the next step feeds of each of the sequences that take part in it: those that only
        add a token come first, then the rest of prompts, then the sequences that enter."""
        model, limits = self.model, self.limits
        left = limits.step_tokens
        step: list[tuple[Running, Feed]] = []
        for sequence in sorted(self.running, key=lambda one: one.unfed(model) > 1):
            if tokens := limits.piece(sequence.unfed(model), left):
                step.append((sequence, sequence.feed(tokens)))
                left -= tokens
        entered = 0
        while self._waiting and len(self.running) < limits.sequences:
            entering = self._enter(left, first=not entered)
            if entering is None:
                break
            sequence, feed = entering
            self.running.append(sequence)
            step.append(entering)
            left -= len(feed.ids_S)
            entered += 1
        self._ended = []
        return step

    def leave(self) -> list[tuple[Request, Answer]]:
        """The requests whose answers are complete; their sequences take part no longer."""
        self._ended = [one for one in self.running if one.answer.finish_reason]
        self.running = [one for one in self.running if not one.answer.finish_reason]
        return [(one.request, one.answer) for one in self._ended]

    def _enter(self, left: int, first: bool) -> tuple[Running, Feed] | None:
        """The sequence that has waited longest, off the queue, and what a step feeds of it that
        has `left` tokens left; None if it has to go on waiting."""
        waiting = self._waiting[0]
        request = waiting.request
        if not self._fits(waiting.bytes) or not self.limits.piece(1, left, first):
            return None
        prefix, coming = self._prefix(request)
        shared = prefix.tokens if prefix else 0
        if coming - shared >= WORTH_SHARING:
            return None
        tokens = self.limits.piece(len(request.ids) - shared, left, first)
        if not tokens:
            return None
        self._waiting.popleft()
        began = prefix.began if prefix else Began(tokens, tokens)
        cache = self.model.new_cache(request.capacity(self.model), *began)
        if prefix:
            cache.take_over(prefix.donor.cache, shared)
        size = prefix.bytes if prefix else waiting.bytes
        sequence = Running(request, Answer(request.index), cache, size, began)
        return sequence, sequence.feed(tokens)

    def _prefix(self, request: Request) -> tuple[_Prefix | None, int]:
        """The most of the request's prompt that it can take over of a sequence's cache, None if
        that is nothing, and how many tokens it could before long.

        Nothing where rotary frequencies go by the length.
        """
        model = self.model
        most = len(request.ids) - 1  # the last one is fed, for its logits
        best, coming = None, 0
        if model.depends_on_length(request.capacity(model)):
            return best, coming
        for other in [*self.running, *self._ended]:
            if model.depends_on_length(other.request.capacity(model)):
                continue
            common = _common(request.ids[:most], other.known)
            held = min(common, other.cache.length)
            if held > (best.tokens if best else 0):
                best = self._shared(request, other, held) or best
            goes_on = not other.answer.finish_reason
            if goes_on and common > max(held, coming) and self._shared(request, other, common):
                coming = common
        return best, coming

    def _shared(self, request: Request, donor: Running, tokens: int) -> _Prefix | None:
        """The first `tokens` positions of the donor's cache, as the beginning of the request's;
        None where they are not worth it or have no room.

        Context-parallel ranks have the parts of a prefix that fell to them, which may be uneven,
        and attend to the rest of the prompt by flash decoding, for which each needs the queries of
        all. So the prefix has to be at least as long as what a step feeds of that rest, and no rank
        may come to have much more than the others.
        """
        division, limits = self.model.division, self.limits
        if tokens < WORTH_SHARING:
            return None
        began, capacity = donor.began.cut(tokens), request.capacity(self.model)
        rest = len(request.ids) - tokens
        piece = rest if limits.chunk is None else min(rest, limits.chunk)
        if division.cp > 1:
            even = -(-capacity // division.cp)
            if piece > tokens or division.fullest(began, capacity) > UNEVEN * even:
                return None
        size = self._bytes(request, began)
        return _Prefix(donor, tokens, began, size) if self._fits(size) else None


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """The number of tokens with which both begin."""
    length = min(len(left), len(right))
    if left[:length] == right[:length]:
        return length
    differ = np.not_equal(left[:length], right[:length])
    return int(differ.argmax())
