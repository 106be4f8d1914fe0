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

from collections import abc, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mpishard.engine.sampling import Sampling
from mpishard.model import Decoder
from mpishard.sequences.kv_cache import KVCache
from mpishard.sequences.sharding import FirstChunk
from mpishard.sequences.step import ScheduledChunk

# Requests that a replica has at hand beyond those that run, so that a place is taken at once.
PREFETCH = 2

# Tokens that two prompts must have in common for it to be worth a copy, or a step's wait.
MIN_PREFIX_TOKENS = 32

# How many times an even part of a sequence a context-parallel rank may have for a prefix's sake.
MAX_IMBALANCE = 2


@dataclass(frozen=True)
class SchedulerConfig:
    """What a replica takes on at once.

    A step feeds at most `max_num_batched_tokens`, of at most `max_num_seqs` sequences, whose caches
    take at most `kv_cache_memory_bytes` on any rank (None: whatever they take). Prompts enter by
    pieces of at most `chunked_prefill_size` tokens or of what a step has left; with None they enter
    whole, one of more than `max_num_batched_tokens` in a step that no other enters."""

    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 32
    chunked_prefill_size: int | None = None
    kv_cache_memory_bytes: int | None = None

    def chunk_size(self, tokens: int, left: int, first: bool = True) -> int:
        """How many of `tokens` tokens of a sequence a step feeds that has `left` left; `first` if
        no other sequence enters in it."""
        if self.chunked_prefill_size is None:
            return tokens if first or tokens <= left else 0
        return max(0, min(tokens, self.chunked_prefill_size, left))


@dataclass(frozen=True)
class Request:
    """A prompt to be continued by at most `max_tokens` (1 or more) tokens.

    `index` is its place in the input, to which its random numbers belong. A token of `eos_ids`
    ends the answer and is its last; so does any token after which `stop_fn` is true of the tokens
    so far.
    """

    index: int
    ids: list[int]
    max_tokens: int
    sampling: Sampling = Sampling()
    eos_ids: frozenset[int] = frozenset()
    stop_fn: Callable[[list[int]], bool] | None = None

    def max_length(self, model: Decoder) -> int:
        """The positions of the longest answer: all but that of its last token, which is never
        fed."""
        return min(len(self.ids) + self.max_tokens - 1, model.config.max_position_embeddings)


@dataclass
class RequestOutput:
    """The tokens that continue a request; `finish_reason` is "stop", "length" or "error". Of a
    request that cannot be taken on, or not brought to an end, `error` says why."""

    index: int
    ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    error: str = ""


@dataclass
class Sequence:
    """A sequence that has entered; its cache takes `bytes`, and `first_chunk` so."""

    request: Request
    output: RequestOutput
    cache: KVCache
    bytes: int = 0
    first_chunk: FirstChunk = FirstChunk(0, 0)
    rope_length: int = 0  # the length whose rotary frequencies the cache has

    @property
    def token_ids(self) -> list[int]:
        """The prompt and the tokens chosen."""
        return self.request.ids + self.output.ids

    def num_uncomputed_tokens(self, model: Decoder) -> int:
        """How many of the tokens known it has yet to feed: all of them again where its cache no
        longer fits the rotary frequencies of its new length."""
        length = len(self.request.ids) + len(self.output.ids)
        if model.uses_dynamic_rope(length) and self.rope_length != length:
            self.cache.clear()
            self.rope_length = length
        return length - self.cache.length

    def next_chunk(self, tokens: int) -> ScheduledChunk:
        """The next `tokens` of the tokens known."""
        ids, start = self.token_ids, self.cache.length
        if not start:
            self.first_chunk = FirstChunk(tokens, tokens)
        new = np.array(ids[start : start + tokens], np.int64)
        index, prompt = self.request.index, len(self.request.ids)
        return ScheduledChunk(new, self.cache, len(ids) - start - tokens, index, prompt)


@dataclass
class _Waiting:
    request: Request
    bytes: int


@dataclass(frozen=True)
class PrefixHit:
    """What a sequence takes over of `donor`'s cache: the first `tokens` positions, so that it
    `first_chunk` as that one did and its own cache takes `bytes`."""

    donor: Sequence
    tokens: int
    first_chunk: FirstChunk
    bytes: int


class Scheduler:
    """The sequences of one replica. Every rank of it keeps the same, without asking the others."""

    def __init__(self, model: Decoder, config: SchedulerConfig) -> None:
        self.model, self.config = model, config
        self.running: list[Sequence] = []
        self._waiting: deque[_Waiting] = deque()
        self._ended: list[Sequence] = []  # in the last step: what their caches hold is still there

    @property
    def has_work(self) -> bool:
        """Whether there is something to feed."""
        return bool(self.running or self._waiting)

    @property
    def num_wanted(self) -> int:
        """How many more requests it could do with."""
        free = 0 if self._waiting else self.config.max_num_seqs - len(self.running)
        return max(0, free + PREFETCH - len(self._waiting))

    def add(self, requests: abc.Sequence[Request]) -> list[tuple[Request, RequestOutput]]:
        """Let `requests` wait for their turns; those that can never have one, with the answers
        that say so."""
        error = []
        limit = self.config.kv_cache_memory_bytes
        for request in requests:
            size = self._bytes(request)
            if limit is None or size <= limit:
                self._waiting.append(_Waiting(request, size))
                continue
            reason = (
                f"its {len(request.ids)} prompt tokens and up to {request.max_tokens} more need "
                f"{size} bytes of KV cache on a rank, but there are {limit}; shorten it, or allow "
                "more with --kv-cache-memory-bytes"
            )
            error.append((request, RequestOutput(request.index, error=reason)))
        return error

    def _bytes(self, request: Request, first_chunk: FirstChunk | None = None) -> int:
        """What the cache of a request, which `first_chunk` so if it takes over a prefix, takes on
        the rank of the replica where it takes most; 0 where that does not matter."""
        if self.config.kv_cache_memory_bytes is None:
            return 0
        return self.model.cache_bytes(request.max_length(self.model), first_chunk)

    def _fits(self, size: int) -> bool:
        """Whether there is room for a cache of `size` bytes beside those of what runs."""
        limit = self.config.kv_cache_memory_bytes
        return limit is None or sum(one.bytes for one in self.running) + size <= limit

    def schedule(self) -> list[tuple[Sequence, ScheduledChunk]]:
        """What the next step feeds of each of the sequences that take part in it: those that only
        add a token come first, then the rest of prompts, then the sequences that enter."""
        model, config = self.model, self.config
        left = config.max_num_batched_tokens
        step: list[tuple[Sequence, ScheduledChunk]] = []
        for sequence in sorted(self.running, key=lambda one: one.num_uncomputed_tokens(model) > 1):
            if tokens := config.chunk_size(sequence.num_uncomputed_tokens(model), left):
                step.append((sequence, sequence.next_chunk(tokens)))
                left -= tokens
        entered = 0
        while self._waiting and len(self.running) < config.max_num_seqs:
            entering = self._admit(left, first=not entered)
            if entering is None:
                break
            sequence, next_chunk = entering
            self.running.append(sequence)
            step.append(entering)
            left -= len(next_chunk.ids_S)
            entered += 1
        self._ended = []
        return step

    def pop_finished(self) -> list[tuple[Request, RequestOutput]]:
        """The requests whose answers are complete; their sequences take part no longer."""
        self._ended = [one for one in self.running if one.output.finish_reason]
        self.running = [one for one in self.running if not one.output.finish_reason]
        return [(one.request, one.output) for one in self._ended]

    def _admit(self, left: int, first: bool) -> tuple[Sequence, ScheduledChunk] | None:
        """The sequence that has waited longest, off the queue, and what a step feeds of it that
        has `left` tokens left; None if it has to go on waiting."""
        waiting = self._waiting[0]
        request = waiting.request
        if not self._fits(waiting.bytes) or not self.config.chunk_size(1, left, first):
            return None
        prefix, coming = self._prefix_hit(request)
        shared = prefix.tokens if prefix else 0
        if coming - shared >= MIN_PREFIX_TOKENS:
            return None
        tokens = self.config.chunk_size(len(request.ids) - shared, left, first)
        if not tokens:
            return None
        self._waiting.popleft()
        first_chunk = prefix.first_chunk if prefix else FirstChunk(tokens, tokens)
        cache = self.model.allocate_cache(request.max_length(self.model), *first_chunk)
        if prefix:
            cache.copy_prefix(prefix.donor.cache, shared)
        size = prefix.bytes if prefix else waiting.bytes
        sequence = Sequence(request, RequestOutput(request.index), cache, size, first_chunk)
        return sequence, sequence.next_chunk(tokens)

    def _prefix_hit(self, request: Request) -> tuple[PrefixHit | None, int]:
        """The most of the request's prompt that it can take over of a sequence's cache, None if
        that is nothing, and how many tokens it could before long.

        Nothing where rotary frequencies go by the length.
        """
        model = self.model
        most = len(request.ids) - 1  # the last one is fed, for its logits
        best, coming = None, 0
        if model.uses_dynamic_rope(request.max_length(model)):
            return best, coming
        for other in [*self.running, *self._ended]:
            if model.uses_dynamic_rope(other.request.max_length(model)):
                continue
            common = _common(request.ids[:most], other.token_ids)
            held = min(common, other.cache.length)
            if held > (best.tokens if best else 0):
                best = self._usable_prefix(request, other, held) or best
            goes_on = not other.output.finish_reason
            if (
                goes_on
                and common > max(held, coming)
                and self._usable_prefix(request, other, common)
            ):
                coming = common
        return best, coming

    def _usable_prefix(self, request: Request, donor: Sequence, tokens: int) -> PrefixHit | None:
        """The first `tokens` positions of the donor's cache, as the beginning of the request's;
        None where they are not worth it or have no room.

        Context-parallel ranks have the parts of a prefix that fell to them, which may be uneven,
        and attend to the rest of the prompt by flash decoding, for which each needs the queries of
        all. So the prefix has to be at least as long as what a step feeds of that rest, and no rank
        may come to have much more than the others.
        """
        sequence_sharding, config = self.model.sequence_sharding, self.config
        if tokens < MIN_PREFIX_TOKENS:
            return None
        first_chunk, max_length = donor.first_chunk.cut(tokens), request.max_length(self.model)
        rest = len(request.ids) - tokens
        chunk_size = (
            rest if config.chunked_prefill_size is None else min(rest, config.chunked_prefill_size)
        )
        if sequence_sharding.cp > 1:
            even = -(-max_length // sequence_sharding.cp)
            if (
                chunk_size > tokens
                or sequence_sharding.max_rank_positions(first_chunk, max_length)
                > MAX_IMBALANCE * even
            ):
                return None
        size = self._bytes(request, first_chunk)
        return PrefixHit(donor, tokens, first_chunk, size) if self._fits(size) else None


def _common(left: abc.Sequence[int], right: abc.Sequence[int]) -> int:
    """The number of tokens with which both begin."""
    length = min(len(left), len(right))
    if left[:length] == right[:length]:
        return length
    differ = np.not_equal(left[:length], right[:length])
    return int(differ.argmax())
