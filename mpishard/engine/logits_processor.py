"""Bias and penalties: what changes the logits of a sequence before its next token is chosen.

Every change is to single logits, and depends on token ids alone. So each rank changes its block of
the vocabulary, nothing is sent, and no layout changes a bit of the result. Definitions and order
are vLLM's, whose penalties are OpenAI's, beside CTRL's (Keskar et al. 2019, arXiv 1909.05858), as
in transformers:

logit_bias          is added
repetition_penalty  divides logits above 0 of the tokens in prompt and answer, multiplies the others
frequency_penalty   is subtracted as often as the answer has the token
presence_penalty    is subtracted if the answer has the token
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpishard.engine.sampling_params import SamplingParams


class LogitsProcessor:
    """Bias and penalties of one sequence on this rank, which holds the tokens of the `vocab_block`.
    It counts the sequence's tokens once each, as they come."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocab_block: slice) -> None:
        self._params, self._block = params, vocab_block
        self._prompt_v = self._count(prompt) > 0
        self._answer_v = self._count([])
        self._counted = 0  # tokens of the answer
        biased = [(token, bias) for token, bias in params.bias_pairs if self._holds(token)]
        self._bias_v = np.zeros(len(self._prompt_v))
        for token, bias in biased:
            self._bias_v[token - vocab_block.start] = bias

    def __call__(self, logits_v: np.ndarray, answer: Sequence[int]) -> np.ndarray:
        """The logits of this rank's tokens after prompt and `answer`, changed: (v,). The answer is
        that of the last call, and more."""
        self._answer_v += self._count(answer[self._counted :])
        self._counted = len(answer)
        params, number = self._params, logits_v.dtype.type
        answered_v = self._answer_v > 0
        logits_v = logits_v + self._bias_v.astype(logits_v.dtype)
        penalty = number(params.repetition_penalty)
        penalized_v = np.where(logits_v > 0, logits_v / penalty, logits_v * penalty)
        logits_v = np.where(self._prompt_v | answered_v, penalized_v, logits_v)
        logits_v = logits_v - number(params.frequency_penalty) * self._answer_v.astype(number)
        return logits_v - number(params.presence_penalty) * answered_v.astype(number)

    def _holds(self, token: int) -> bool:
        return self._block.start <= token < self._block.stop

    def _count(self, ids: Sequence[int]) -> np.ndarray:
        """How often `ids` have each token of this rank: (v,)."""
        token = np.asarray(ids, np.int64) - self._block.start
        size = self._block.stop - self._block.start
        return np.bincount(token[(0 <= token) & (token < size)], minlength=size)
