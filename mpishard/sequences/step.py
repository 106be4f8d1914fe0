"""Packed steps: the new tokens of all running sequences in one array, one after the other.

A step (vLLM: an iteration; SGLang: a ForwardBatch) has no batch axis and no padding. Prompts,
single tokens, sequences of different lengths and mixtures of them are the same array with other
bounds. With context parallelism the step's W tokens are sharded over the ``cp`` ranks: ``x_ND``
holds the N of this rank, and `Step.global_index` says where they belong among the W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from mpishard.config.layout import block_sizes
from mpishard.sequences.kv_cache import KVCache
from mpishard.sequences.sharding import SequenceSharding


class ScheduledChunk(NamedTuple):
    """What a step is to process of a sequence: its next tokens and its cache. `remaining` more
    tokens are known and follow in later steps. `request` is the sequence's number, and its
    positions from `prompt` on, if that is given, are decode tokens. `encoder_ids_T` is the input
    that the encoder reads for a sequence that begins."""

    ids_S: np.ndarray
    cache: KVCache
    remaining: int = 0
    request: int = 0
    prompt: int | None = None
    encoder_ids_T: np.ndarray | None = None


@dataclass(frozen=True)
class Segment:
    """One sequence's part of a step."""

    token_slice: slice  # where this rank's tokens are on its packed axis
    cache: KVCache  # its `length` already counts the new tokens
    cached: np.ndarray | slice  # which of this rank's tokens its cache keeps
    positions_by_rank: list[np.ndarray]  # the positions of each cp rank's tokens
    is_first_chunk: bool  # whether the sequence begins in this step
    num_known: int  # the sequence's length once all tokens known of it are processed
    request: int  # the sequence's number
    prompt: int | None  # the positions from here on are decode tokens, if any are


@dataclass(frozen=True)
class Step:
    """One pass through the model.

    `ids_N` are this rank's new tokens, `positions_N` their positions in their sequences, and
    `logits_indices_M` the indices on the packed axis of those whose logits are wanted.

    `global_index` has the indices of each cp rank's tokens among the W of all ranks.
    `logits_owner_index` has, for each cp rank, which of all wanted tokens are its own.

    `encoding` is the encoder's step, of the inputs of all sequences that begin; None if it has
    nothing to read.
    """

    ids_N: np.ndarray
    positions_N: np.ndarray
    segments: list[Segment]
    logits_indices_M: np.ndarray
    global_index: list[np.ndarray]
    logits_owner_index: list[np.ndarray]
    sequence_sharding: SequenceSharding
    encoding: Step | None = None

    def tokens_by_tp_rank(self, tp: int) -> list[int]:
        """How many of this cp rank's tokens each of `tp` ranks has under sequence parallelism:
        consecutive blocks.

        Of N = 5 tokens on 2 ranks, rank 0 has 3 and rank 1 has 2.
        """
        return block_sizes(len(self.ids_N), tp)

    @cached_property
    def requests_N(self) -> np.ndarray:
        """The number of the sequence of each of this rank's tokens."""
        requests_N = np.empty(len(self.ids_N), np.int64)
        for segment in self.segments:
            requests_N[segment.token_slice] = segment.request
        return requests_N

    @cached_property
    def is_decode_N(self) -> np.ndarray:
        """Which of this rank's tokens were generated: the others belong to prompts."""
        is_decode_N = np.zeros(len(self.ids_N), bool)
        for segment in self.segments:
            if segment.prompt is not None:
                positions_S = self.positions_N[segment.token_slice]
                is_decode_N[segment.token_slice] = positions_S >= segment.prompt
        return is_decode_N

    @cached_property
    def over_memory(self) -> Step:
        """This step as attention over the encoder's outputs sees it, where all keys and values are
        there before: every sequence is extended, and its cache is its memory."""
        segments = []
        for segment in self.segments:
            assert segment.cache.memory is not None, "a sequence beside an encoder has a memory"
            own = replace(segment, cache=segment.cache.memory, is_first_chunk=False)
            segments.append(own)
        return replace(self, segments=segments)

    @cached_property
    def first_chunks(self) -> list[Segment]:
        """The sequences that begin in this step: their keys and values are all new."""
        return [segment for segment in self.segments if segment.is_first_chunk]

    @cached_property
    def extends(self) -> list[Segment]:
        """The sequences whose caches already hold something: later chunks and decode (SGLang's
        word: extend)."""
        return [segment for segment in self.segments if not segment.is_first_chunk]

    @cached_property
    def extend_token_index(self) -> np.ndarray:
        """The indices of the extended sequences' tokens on this rank's packed axis.

        Of a step with a first chunk of 4 tokens, an extend of 2 and one of 1: 4, 5 and 6.
        """
        return np.concatenate(
            [np.arange(s.token_slice.start, s.token_slice.stop) for s in self.extends]
        )

    @cached_property
    def extend_counts(self) -> tuple[int, ...]:
        """How many tokens of extended sequences each cp rank has."""
        counts = zip(*(map(len, s.positions_by_rank) for s in self.extends), strict=True)
        return tuple(map(sum, counts))

    @cached_property
    def extend_global_index(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each extended sequence the indices of its tokens among those of all cp ranks, which
        come rank by rank, and their positions, ascending.

        Two sequences on cp = 2: the first extends by positions 8 (rank 0) and 9 (rank 1), the
        second by position 5 (rank 1). Rank by rank that is 8 | 9, 5, so that the first sequence has
        the indices 0 and 1 and the second the index 2.
        """
        indices: list[list[np.ndarray]] = [[] for _ in self.extends]
        stop = 0
        for rank in range(self.sequence_sharding.cp):
            for mine, segment in zip(indices, self.extends, strict=True):
                start, stop = stop, stop + len(segment.positions_by_rank[rank])
                mine.append(np.arange(start, stop))
        in_order = []
        for mine, segment in zip(indices, self.extends, strict=True):
            positions = np.concatenate(segment.positions_by_rank)
            order = np.argsort(positions)
            in_order.append((np.concatenate(mine)[order], positions[order]))
        return in_order


def pack(
    chunks: Sequence[ScheduledChunk | tuple[np.ndarray, KVCache]],
    sequence_sharding: SequenceSharding = SequenceSharding(),  # noqa: B008 (immutable)
    all_logits: bool = False,
) -> Step:
    """The step that processes each sequence's next tokens and asks for the logits after the last
    one known of it, or after every token.

    The caches' lengths are advanced by the new tokens.
    """
    segments: list[Segment] = []
    nothing = np.empty(0, np.int64)  # a step may have no tokens at all
    ids, positions, indices = [nothing], [nothing], [[nothing] * sequence_sharding.cp]
    wanted: list[int] = []
    inputs: list[ScheduledChunk] = []
    begin = stop = 0  # of a sequence's new tokens among all of the step's, and this rank's
    for chunk in chunks:
        ids_S, cache, remaining, request, prompt, encoder_ids_T = ScheduledChunk(*chunk)
        start, memory = cache.length, cache.memory
        if encoder_ids_T is not None and memory is not None:
            inputs.append(ScheduledChunk(encoder_ids_T, memory, request=request))
        by_rank = sequence_sharding.tokens(start, start + len(ids_S))
        mine = by_rank[sequence_sharding.cp_rank]
        cached = sequence_sharding.cached_here(mine)
        cache.extend(mine[cached], start + len(ids_S))
        new = slice(stop, stop + len(mine))
        known = cache.length + remaining
        segments.append(Segment(new, cache, cached, by_rank, start == 0, known, request, prompt))
        ids.append(ids_S[mine - start])
        positions.append(mine)
        indices.append([one - start + begin for one in by_rank])
        begin, stop = begin + len(ids_S), new.stop
        if not remaining:
            wanted.append(begin - 1)
    global_index = [np.concatenate(one) for one in zip(*indices, strict=True)]
    wanted_of_all = np.arange(begin) if all_logits else np.array(wanted, np.int64)
    here = [np.isin(one, wanted_of_all) for one in global_index]
    return Step(
        ids_N=np.concatenate(ids),
        positions_N=np.concatenate(positions),
        segments=segments,
        logits_indices_M=np.flatnonzero(here[sequence_sharding.cp_rank]),
        global_index=global_index,
        logits_owner_index=[
            np.searchsorted(wanted_of_all, one[mask])
            for one, mask in zip(global_index, here, strict=True)
        ],
        sequence_sharding=sequence_sharding,
        encoding=pack(inputs, sequence_sharding) if inputs else None,
    )
