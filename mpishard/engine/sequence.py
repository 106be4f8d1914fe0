"""What the engine works on: a request, the sequence that runs for it, and its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from mpishard.engine.logits_processor import LogitsProcessor
from mpishard.engine.sampling import SamplingRow
from mpishard.engine.sampling_params import SamplingParams
from mpishard.model import Decoder
from mpishard.sequences.kv_cache import KVCache
from mpishard.sequences.sharding import FirstChunk
from mpishard.sequences.step import ScheduledChunk


@dataclass(frozen=True)
class Request:
    """A prompt, `ids`, to be continued as `params` say. The decoder of a model with an encoder goes
    on from `ids`, while the encoder reads `encoder_ids`.

    `index` is the request's place in the input; its random numbers depend on it, and on `choice`,
    the number of this answer among several. Generation ends with the first token that is one of
    `eos_ids`, or after which `stop_fn` is true of all tokens generated so far. That token is the
    last of the output.
    """

    index: int
    ids: list[int]
    params: SamplingParams = SamplingParams()
    eos_ids: frozenset[int] = frozenset()
    stop_fn: Callable[[list[int]], bool] | None = None
    choice: int = 0
    encoder_ids: list[int] = field(default_factory=list)

    def max_length(self, model: Decoder) -> int:
        """The most positions that the KV cache can hold. The last token of the longest output is
        not one of them: the model never processes it."""
        return min(len(self.ids) + self.params.max_tokens - 1, model.config.max_position_embeddings)


@dataclass
class RequestOutput:
    """The tokens generated for a request. `logprobs`, if asked for, has for each of them the
    log-probabilities of the likeliest tokens and of the one chosen, by their ids.

    `finish_reason` is "stop", "length" or "error", and empty until generation has ended. `error`
    says why the scheduler rejected the request, or why its generation failed.
    """

    index: int
    ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    error: str = ""
    logprobs: list[dict[int, float]] = field(default_factory=list)


@dataclass
class Sequence:
    """A request that has been admitted, with its KV cache.

    `cache_bytes` is the memory reserved for the cache. `first_chunk` says on which ranks its first
    positions are. `process` applies bias and penalties. `rope_lengths` are the sequence lengths
    whose rotary frequencies the cached keys of each layer have, under dynamic RoPE and LongRoPE;
    empty as long as those are a short one's.
    """

    request: Request
    output: RequestOutput
    cache: KVCache
    cache_bytes: int
    first_chunk: FirstChunk
    process: LogitsProcessor | None = None
    rope_lengths: tuple[int, ...] = ()

    @property
    def is_finished(self) -> bool:
        """Whether generation has ended."""
        return bool(self.output.finish_reason)

    @property
    def token_ids(self) -> list[int]:
        """The prompt and the tokens generated so far."""
        return self.request.ids + self.output.ids

    @property
    def num_tokens(self) -> int:
        """The number of `token_ids`."""
        return len(self.request.ids) + len(self.output.ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """How many of the `token_ids` the cache does not hold yet: 1 while the sequence decodes,
        more during prefill."""
        return self.num_tokens - self.cache.length

    @property
    def sampling_row(self) -> SamplingRow:
        """How the next token is chosen."""
        request, process = self.request, None
        if self.process is not None:
            process = partial(self.process, answer=self.output.ids)
        return SamplingRow(
            request.params, request.index, self.cache.length, request.choice, process
        )

    def reset_if_rope_changed(self, model: Decoder) -> None:
        """Empty the cache if the sequence has grown so long that it has other rotary frequencies
        than the cached keys have, so that all tokens are computed again."""
        lengths = model.rope_lengths(self.num_tokens)
        if any(lengths) and self.rope_lengths != lengths:
            self.cache.clear()
            self.rope_lengths = lengths

    def next_chunk(self, num_tokens: int) -> ScheduledChunk:
        """The next `num_tokens` of the uncomputed tokens."""
        start = self.cache.length
        ids_S = np.array(self.token_ids[start : start + num_tokens], np.int64)
        remaining = self.num_uncomputed_tokens - num_tokens
        request = self.request
        return ScheduledChunk(
            ids_S,
            self.cache,
            remaining,
            request.index,
            len(request.ids),
            None if start else np.array(request.encoder_ids, np.int64),
        )
