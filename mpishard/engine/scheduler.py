"""The scheduler: which requests run, and which of their tokens the next step processes.

Continuous batching (Orca: Yu et al. 2022, OSDI) with chunked prefill (Sarathi: Agrawal et al. 2023,
arXiv 2308.16369). Requests wait in order of arrival. A step processes one token of each sequence
that decodes. What is left of the step's token budget goes to sequences in prefill, chunk by chunk,
and then to waiting requests, which are admitted as running sequences finish.

Admission reserves KV cache for the longest possible output, so a running sequence is never
preempted. A request whose prompt starts like another sequence is admitted with a copy of that
sequence's cache, or waits until there is something to copy (`mpishard.engine.prefix_cache`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from mpishard.config.layout import block
from mpishard.engine.logits_processor import LogitsProcessor
from mpishard.engine.prefix_cache import PrefixCache
from mpishard.engine.sequence import Request, RequestOutput, Sequence
from mpishard.model import Decoder
from mpishard.sequences.sharding import FirstChunk
from mpishard.sequences.step import ScheduledChunk

# Requests fetched ahead, so that one is waiting whenever a running sequence finishes.
PREFETCH = 2


@dataclass(frozen=True)
class SchedulerConfig:
    """What bounds the sequences that run at a time on one replica.

    A step processes at most `max_num_batched_tokens` tokens, those that an encoder reads included,
    of at most `max_num_seqs` sequences. Their caches take at most `kv_cache_memory_bytes` bytes on
    any rank (None: no bound). A prefill chunk has at most `chunked_prefill_size` tokens. If that is
    None, every prefill is one chunk; a prompt of more than `max_num_batched_tokens` tokens is then
    admitted in a step that admits no other. What an encoder reads is always one chunk.
    """

    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 32
    chunked_prefill_size: int | None = None
    kv_cache_memory_bytes: int | None = None

    def chunk_size(self, num_tokens: int, token_budget: int, may_exceed: bool = True) -> int:
        """How many of a sequence's `num_tokens` uncomputed tokens a step with `token_budget` tokens
        left processes. Without chunked prefill it is all or none; all may exceed the budget if
        `may_exceed`."""
        if self.chunked_prefill_size is None:
            return num_tokens if may_exceed or num_tokens <= token_budget else 0
        return max(0, min(num_tokens, self.chunked_prefill_size, token_budget))


class Scheduler:
    """The waiting and running sequences of one replica.

    Every rank of the replica keeps a scheduler of its own. All make the same decisions, because
    none depends on the rank.
    """

    def __init__(self, model: Decoder, config: SchedulerConfig) -> None:
        self.model, self.config = model, config
        self.waiting: deque[Request] = deque()
        self.running: list[Sequence] = []
        self._just_finished: list[Sequence] = []  # in the last step: their caches can be reused
        self._prefix_cache = PrefixCache(model, config.chunked_prefill_size, self._fits)

    @property
    def has_work(self) -> bool:
        """Whether there is anything to schedule."""
        return bool(self.running or self.waiting)

    @property
    def num_wanted(self) -> int:
        """How many more requests to fetch."""
        num_free = 0 if self.waiting else self.config.max_num_seqs - len(self.running)
        return max(0, num_free + PREFETCH - len(self.waiting))

    def add(self, requests: Iterable[Request]) -> list[tuple[Request, RequestOutput]]:
        """Let `requests` wait. Returns those rejected because their cache alone exceeds the memory,
        with outputs whose `error` says so."""
        rejected = []
        limit = self.config.kv_cache_memory_bytes
        for request in requests:
            cache_bytes = self._cache_bytes(request)
            if limit is None or cache_bytes <= limit:
                self.waiting.append(request)
                continue
            num_tokens = len(request.ids) + len(request.encoder_ids)
            error = (
                f"its {num_tokens} prompt tokens and up to {request.params.max_tokens} more "
                f"need {cache_bytes} bytes of KV cache on a rank, but there are {limit}; shorten "
                "it, or allow more with --kv-cache-memory-bytes"
            )
            rejected.append((request, RequestOutput(request.index, error=error)))
        return rejected

    def schedule(self) -> list[tuple[Sequence, ScheduledChunk]]:
        """The chunks that the next step processes: first those of decoding sequences, then those of
        sequences in prefill, then those of requests that it admits."""
        for sequence in self.running:
            sequence.reset_if_rope_changed(self.model)
        token_budget = self.config.max_num_batched_tokens
        scheduled: list[tuple[Sequence, ScheduledChunk]] = []
        for sequence in sorted(self.running, key=lambda one: one.num_uncomputed_tokens > 1):
            num_tokens = self.config.chunk_size(sequence.num_uncomputed_tokens, token_budget)
            if num_tokens:
                scheduled.append((sequence, sequence.next_chunk(num_tokens)))
                token_budget -= num_tokens
        may_exceed = True
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            admitted = self._admit(token_budget, may_exceed)
            if admitted is None:
                break
            sequence, chunk = admitted
            self.running.append(sequence)
            scheduled.append(admitted)
            token_budget -= len(chunk.ids_S) + len(sequence.request.encoder_ids)
            may_exceed = False
        self._just_finished = []
        return scheduled

    def pop_finished(self) -> list[tuple[Request, RequestOutput]]:
        """Remove the sequences that have finished and return their requests and outputs."""
        self._just_finished = [sequence for sequence in self.running if sequence.is_finished]
        self.running = [sequence for sequence in self.running if not sequence.is_finished]
        return [(sequence.request, sequence.output) for sequence in self._just_finished]

    def _admit(self, token_budget: int, may_exceed: bool) -> tuple[Sequence, ScheduledChunk] | None:
        """The first waiting request as a sequence, and its first chunk; None if it has to wait."""
        request = self.waiting[0]
        input_size = len(request.encoder_ids)
        if input_size:  # the encoder reads it in one step, beside the first tokens of the decoder
            if input_size >= token_budget and not may_exceed:
                return None
            token_budget = max(min(1, token_budget), token_budget - input_size)
        # Looking up a prefix takes a while: first see whether anything can be admitted at all.
        if not self._fits(request) or not self.config.chunk_size(1, token_budget, may_exceed):
            return None
        hit, longer_soon = self._prefix_cache.lookup(request, self.running + self._just_finished)
        num_cached = hit.num_tokens if hit else 0
        num_tokens = self.config.chunk_size(len(request.ids) - num_cached, token_budget, may_exceed)
        if longer_soon or not num_tokens:
            return None
        self.waiting.popleft()
        first_chunk = hit.first_chunk if hit else FirstChunk(num_tokens, num_tokens)
        cache = self.model.allocate_cache(
            request.max_length(self.model), *first_chunk, encoder_length=input_size
        )
        if hit:
            cache.copy_prefix(hit.donor.cache, num_cached)
        cache_bytes = self._cache_bytes(request, first_chunk if hit else None)
        output, process = RequestOutput(request.index), None
        if request.params.processes_logits:
            config, tp = self.model.config, self.model.mesh.tp
            own_tokens = block(config.vocab, tp.size, tp.rank)
            process = LogitsProcessor(request.params, request.ids, own_tokens)
        sequence = Sequence(request, output, cache, cache_bytes, first_chunk, process)
        return sequence, sequence.next_chunk(num_tokens)

    def _cache_bytes(self, request: Request, first_chunk: FirstChunk | None = None) -> int:
        """The bytes that the request's cache takes on the rank where it takes most; 0 if memory is
        not bounded. `first_chunk` describes a prefix that the cache starts with."""
        if self.config.kv_cache_memory_bytes is None:
            return 0
        length, input_size = request.max_length(self.model), len(request.encoder_ids)
        return self.model.cache_bytes(length, first_chunk, input_size)

    def _fits(self, request: Request, first_chunk: FirstChunk | None = None) -> bool:
        """Whether there is memory for the request's cache beside those of the running sequences."""
        limit = self.config.kv_cache_memory_bytes
        reserved = sum(sequence.cache_bytes for sequence in self.running)
        return limit is None or reserved + self._cache_bytes(request, first_chunk) <= limit
