"""How the tokens of a request are generated."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mpishard.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are sampled, and when they end. Fields are named as in vLLM's class of
    this name; the defaults are greedy and 128 tokens, and `stop` is a sequence of strings.

    `temperature` 0 is greedy, and then `top_k`, `top_p`, `min_p` and `seed` have no effect. `top_k`
    0, `top_p` 1 and `min_p` 0 filter nothing. Generation ends after `max_tokens` tokens, with one
    of the `stop` strings in the text, with one of the `stop_token_ids` or, unless `ignore_eos`,
    with an end-of-sequence token. The text ends before what ended it, or behind it if
    `include_stop_str_in_output`. Special tokens are in the text only if `skip_special_tokens` is
    false, but a `stop` string is found in them in any case.

    Raises UserError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str) or "" in self.stop:
            raise UserError(f"stop {self.stop!r} must be a list of texts, none of them empty")
        for name in ("stop", "stop_token_ids"):  # a list is as good
            object.__setattr__(self, name, tuple(getattr(self, name)))
        limits = [
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, self._can_divide(), "0 (greedy) or at least 1e-6"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (no filter) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1"),
            ("seed", self.seed, 0 <= self.seed < 2**64, "0 to 2**64 - 1"),
            *(("stop_token_ids", token, token >= 0, "0 or more") for token in self.stop_token_ids),
        ]
        for name, value, valid, range_ in limits:
            if not valid:
                raise UserError(f"{name} {value} is out of range: it must be {range_}")

    def _can_divide(self) -> bool:
        """Whether logits over the temperature stay finite."""
        return self.temperature == 0 or 1e-6 <= self.temperature < math.inf

    def end_ids(self, eos_ids: Iterable[int]) -> frozenset[int]:
        """The tokens that end generation, for a model whose end-of-sequence tokens are
        `eos_ids`."""
        return frozenset(self.stop_token_ids) | frozenset(() if self.ignore_eos else eos_ids)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    @property
    def filtered(self) -> bool:
        """Whether some tokens are excluded before one is sampled."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def needs_total(self) -> bool:
        """Whether the filters depend on the probabilities of the whole vocabulary."""
        return not self.greedy and self.top_k == 0 and self.top_p < 1
