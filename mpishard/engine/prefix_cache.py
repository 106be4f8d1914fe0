"""Prefix caching: a prompt that starts like another sequence reuses part of its KV cache.

vLLM and SGLang (RadixAttention: Zheng et al. 2023, arXiv 2312.07104) let sequences share the blocks
of one cache. Here every sequence has a cache of its own, and the common positions are copied. Each
rank copies the positions that it holds, so nothing is sent.

Example: two requests arrive together. A is a document of 100 tokens with a question of 10, B is the
same document with a question of 12.

step 1  A is admitted; its prefill has 110 tokens. B has 100 tokens in common with A. A is about to
        compute them, so B waits.
step 2  A decodes. B is admitted with a copy of A's first 100 positions; its prefill has 12 tokens.

Under context parallelism a copied position stays on the rank that computed it. Let cp = 2, and let
A's first chunk be its whole prompt of 16 tokens. In zigzag order the ranks compute

    position  0  1  2  3   4  5  6  7   8  9 10 11  12 13 14 15
    rank      0  0  0  0   1  1  1  1   1  1  1  1   0  0  0  0

B has the first 12 tokens in common with A. Its later tokens alternate between the ranks:

    position  0  1  2  3   4  5  6  7   8  9 10 11  12 13 14 15
    rank      0  0  0  0   1  1  1  1   1  1  1  1   0  1  0  1

`FirstChunk(length=16, inherited=12)` says so: the positions below 12 lie where a first chunk of 16
tokens puts them. Rank 1 holds 10 of these 16 positions and rank 0 holds 6. The imbalance costs rank
1 memory and time. It is larger in contiguous order, where all of a prefix of 8 tokens is on rank 0.
Therefore no rank may hold more than `MAX_IMBALANCE` times its even share of a sequence.

Under context parallelism the prefix must also be at least as long as the next chunk. A first chunk
exchanges keys and values (`mpishard.parallel.context`). A chunk after a prefix attends by flash
decoding, which gathers the queries of the whole chunk instead. For a chunk longer than the prefix,
that would cost more than the copy saves.

Dynamic RoPE rules prefix caching out: the cached keys depend on the length of their sequence. So
does linear attention: its state is the one after the last token, and none is kept of earlier ones.
So does an encoder: all that a decoder's cache holds depends on the whole of its input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mpishard.engine.sequence import Request, Sequence
from mpishard.model import Decoder
from mpishard.sequences.sharding import FirstChunk

# The shortest prefix that is worth a copy, and the least gain that is worth waiting for.
MIN_PREFIX_TOKENS = 32

# How many times its even share of a sequence a context-parallel rank may hold.
MAX_IMBALANCE = 2


@dataclass(frozen=True)
class PrefixHit:
    """The first `num_tokens` positions of `donor`'s cache, to be copied. `first_chunk` says on
    which ranks the copies lie."""

    donor: Sequence
    num_tokens: int
    first_chunk: FirstChunk


class PrefixCache:
    """Finds prefixes in the caches of one replica's sequences. All its ranks find the same.

    `fits` says whether there is memory for the cache of a request whose first positions lie as in
    the `FirstChunk`. `chunked_prefill_size` bounds the chunks of a prefill (None: unbounded).
    """

    def __init__(
        self,
        model: Decoder,
        chunked_prefill_size: int | None,
        fits: Callable[[Request, FirstChunk], bool],
    ) -> None:
        self.model, self.fits = model, fits
        self.chunked_prefill_size = chunked_prefill_size

    def lookup(self, request: Request, sequences: list[Sequence]) -> tuple[PrefixHit | None, bool]:
        """The longest usable prefix that one of the `sequences` holds (None: there is none), and
        whether waiting is worthwhile because one of them is about to compute a longer one."""
        config = self.model.config
        if self._uses_dynamic_rope(request) or config.linear_attention or config.encoder:
            return None, False
        prompt = request.ids[:-1]  # the last token is always computed: its logits are needed
        common = [
            (donor, _num_common(prompt, donor.token_ids))
            for donor in sequences
            if not self._uses_dynamic_rope(donor.request)
        ]
        held = [(donor, min(num_tokens, donor.cache.length)) for donor, num_tokens in common]
        soon = [(donor, num_tokens) for donor, num_tokens in common if not donor.is_finished]
        hit, hit_soon = self._longest(request, held), self._longest(request, soon)
        gain = (hit_soon.num_tokens if hit_soon else 0) - (hit.num_tokens if hit else 0)
        return hit, gain >= MIN_PREFIX_TOKENS

    def _uses_dynamic_rope(self, request: Request) -> bool:
        """Whether the rotary frequencies of the request's sequence may ever change."""
        return self.model.uses_dynamic_rope(request.max_length(self.model))

    def _longest(
        self, request: Request, candidates: list[tuple[Sequence, int]]
    ) -> PrefixHit | None:
        """The longest usable prefix among `candidates`: (donor, number of tokens)."""
        for donor, num_tokens in sorted(candidates, key=lambda one: one[1], reverse=True):
            if num_tokens < MIN_PREFIX_TOKENS:
                break
            first_chunk = donor.first_chunk.cut(num_tokens)
            if self._suits_cp(request, num_tokens, first_chunk) and self.fits(request, first_chunk):
                return PrefixHit(donor, num_tokens, first_chunk)
        return None

    def _suits_cp(self, request: Request, num_tokens: int, first_chunk: FirstChunk) -> bool:
        """Whether the ranks of context parallelism may reuse a prefix of `num_tokens`: it is as
        long as the next chunk and divided evenly enough."""
        sharding = self.model.sequence_sharding
        if sharding.cp == 1:
            return True
        next_chunk = len(request.ids) - num_tokens
        if self.chunked_prefill_size is not None:
            next_chunk = min(next_chunk, self.chunked_prefill_size)
        if next_chunk > num_tokens:
            return False
        max_length = request.max_length(self.model)
        even_share = -(-max_length // sharding.cp)
        most = sharding.max_rank_positions(first_chunk, max_length)
        return most <= MAX_IMBALANCE * even_share


def _num_common(left: list[int], right: list[int]) -> int:
    """With how many tokens in common both lists begin."""
    length = min(len(left), len(right))
    if left[:length] == right[:length]:
        return length
    differ = np.not_equal(left[:length], right[:length])
    return int(differ.argmax())
