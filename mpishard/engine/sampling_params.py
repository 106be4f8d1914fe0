"""How the tokens of a request are generated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mpishard.errors import UserError

# The most log-probabilities per token, as vLLM's default of --max-logprobs.
MAX_LOGPROBS = 20
# The most answers to one prompt, as in OpenAI's API.
MAX_N = 128


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are sampled, and when they end. Fields are named as in vLLM's class of
    this name; the defaults are greedy and 128 tokens, and `stop` is a sequence of strings.

    `temperature` 0 is greedy, and then `top_k`, `top_p`, `min_p` and `seed` have no effect. `top_k`
    0 or -1, `top_p` 1 and `min_p` 0 filter nothing; `top_p` 0 leaves the likeliest token alone.
    `seed` -1 is none, as 0. Generation ends after `max_tokens` tokens, with one of the `stop`
    strings in the text, with one of the `stop_token_ids` or, unless `ignore_eos`, with an
    end-of-sequence token. The text ends before what ended it, or behind it if
    `include_stop_str_in_output`. Special tokens are in the text only if `skip_special_tokens` is
    false, but a `stop` string is found in them in any case.

    `logit_bias`, a mapping of token ids to numbers or pairs of them, is added to the logits. Then
    `repetition_penalty` (1: none) divides the logits above 0 of tokens that prompt or answer have
    and multiplies those below; `frequency_penalty` is subtracted for each time that the answer has
    a token, `presence_penalty` once. `logprobs` asks for the log-probability of each chosen token
    and of so many of the likeliest, before all of the above. `n` is the number of answers.

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
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = ()
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.stop, str) or "" in self.stop:
            raise UserError(f"stop {self.stop!r} must be a list of texts, none of them empty")
        for name in ("stop", "stop_token_ids"):  # a list is as good
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "logit_bias", self.bias_pairs)
        for name in ("top_k", "seed"):
            if getattr(self, name) == -1:
                object.__setattr__(self, name, 0)
        bias = next((one for _, one in self.bias_pairs if not abs(one) <= 100), 0.0)
        logprobs = self.logprobs
        limits = [
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, self._can_divide(), "0 (greedy) or at least 1e-6"),
            ("top_k", self.top_k, self.top_k >= 0, "0 or -1 (no filter), or more"),
            ("top_p", self.top_p, 0 <= self.top_p <= 1, "0 to 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1"),
            ("seed", self.seed, 0 <= self.seed < 2**64, "0 to 2**64 - 1, or -1 for none"),
            *(("stop_token_ids", token, token >= 0, "0 or more") for token in self.stop_token_ids),
            (
                "repetition_penalty",
                self.repetition_penalty,
                1e-6 <= self.repetition_penalty <= 1e6,
                "1e-6 to 1e6 (1: none)",
            ),
            ("presence_penalty", self.presence_penalty, abs(self.presence_penalty) <= 2, "-2 to 2"),
            (
                "frequency_penalty",
                self.frequency_penalty,
                abs(self.frequency_penalty) <= 2,
                "-2 to 2",
            ),
            ("a logit_bias of", bias, bias == 0, "-100 to 100"),
            (
                "logprobs",
                logprobs,
                logprobs is None or 0 <= logprobs <= MAX_LOGPROBS,
                f"0 (of the chosen token alone) to {MAX_LOGPROBS}",
            ),
            ("n", self.n, 1 <= self.n <= MAX_N, f"1 to {MAX_N}"),
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
        return self.temperature == 0 or self.top_p == 0

    @property
    def filtered(self) -> bool:
        """Whether some tokens are excluded before one is sampled."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def needs_total(self) -> bool:
        """Whether the filters depend on the probabilities of the whole vocabulary."""
        return not self.greedy and self.top_k == 0 and self.top_p < 1

    @property
    def bias_pairs(self) -> tuple[tuple[int, float], ...]:
        """The token ids of `logit_bias` in their order, and what is added to each."""
        bias = self.logit_bias
        pairs = bias.items() if isinstance(bias, Mapping) else bias
        return tuple(sorted((int(token), float(value)) for token, value in pairs))

    @property
    def processes_logits(self) -> bool:
        """Whether logits change before a token is chosen, by bias or penalties."""
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        return bool(self.logit_bias) or penalties != (1, 0, 0)
