"""The rotary embedding of a model, for the tokens of a step."""

from __future__ import annotations

import numpy as np

from mpishard.arithmetic import rotary
from mpishard.config.model_config import ModelConfig
from mpishard.parallel.qkv import Rope
from mpishard.sequences.step import Step


class RotaryEmbedding:
    """Rotary cosines and sines of a model's kind of RoPE (Su et al. 2021, arXiv 2104.09864)."""

    def __init__(self, config: ModelConfig, dtype: np.dtype) -> None:
        self.config, self.dtype = config, dtype
        self._inv_freq_J, self._attention_scaling = inverse_frequencies(config)

    def uses_dynamic_rope(self, length: int) -> bool:
        """Whether a sequence of `length` positions has other frequencies than a shorter one, so
        that what its cache holds does not fit any more."""
        rope = self.config.rope
        return rope.kind == "dynamic" and length > rope.original_positions

    def __call__(self, step: Step) -> Rope:
        """Cosines, (N, 1, 1, J), and sines, (N, 1, 2, J), of the step's tokens, as
        `mpishard.arithmetic.rotary.apply_rotary` takes them."""
        angles_NJ = step.positions_N[:, np.newaxis] * self._inv_freq_J
        for segment in step.segments:
            if self.uses_dynamic_rope(segment.num_known):
                new = segment.token_slice
                inv_freq_J = _dynamic_inverse_frequencies(self.config, segment.num_known)
                angles_NJ[new] = step.positions_N[new, np.newaxis] * inv_freq_J
        angles_N11J = angles_NJ[:, np.newaxis, np.newaxis]
        sin_N11J = np.sin(angles_N11J) * self._attention_scaling
        return (
            (np.cos(angles_N11J) * self._attention_scaling).astype(self.dtype),
            np.concatenate([-sin_N11J, sin_N11J], axis=2, dtype=self.dtype, casting="same_kind"),
        )


def inverse_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """A model's angles per position, (J,), and the factor on cosines and sines (Hugging Face:
    attention_scaling)."""
    rope = config.rope
    inv_freq_J = rotary.inverse_frequencies(config.rotary_dim, rope.theta)
    if rope.kind == "linear":
        return inv_freq_J / rope.factor, 1.0
    if rope.kind == "llama3":
        low, high = rope.low_freq_factor, rope.high_freq_factor
        return (
            rotary.llama3_frequencies(inv_freq_J, rope.factor, low, high, rope.original_positions),
            1.0,
        )
    if rope.kind == "yarn":
        scaling = rope.attention_factor
        if scaling is None:
            scaling = rotary.yarn_attention_factor(rope.factor, rope.mscale, rope.mscale_all_dim)
        ramp = rope.beta_fast, rope.beta_slow, rope.original_positions, rope.truncate
        return rotary.yarn_frequencies(inv_freq_J, rope.theta, rope.factor, *ramp), scaling
    return inv_freq_J, 1.0


def _dynamic_inverse_frequencies(config: ModelConfig, length: int) -> np.ndarray:
    rope, width = config.rope, config.rotary_dim
    theta = rotary.dynamic_theta(rope.theta, rope.factor, length, rope.original_positions, width)
    return rotary.inverse_frequencies(width, theta)
