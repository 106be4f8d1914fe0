"""The rotary embeddings of a model's layers, for the tokens of a step."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy

import numpy as np

from mpishard.arithmetic import rotary
from mpishard.config.model_config import ModelConfig
from mpishard.config.model_config import Rope as RopeConfig
from mpishard.parallel.qkv import Rope
from mpishard.sequences.step import Step


class RotaryEmbedding:
    """Rotary cosines and sines (Su et al. 2021, arXiv 2104.09864) of some `layers` of a model.
    Layers of the same kind of RoPE share them."""

    def __init__(self, config: ModelConfig, layers: Iterable[int], dtype: np.dtype) -> None:
        self.ropes = [config.ropes[layer] for layer in layers]
        self._kinds = list(dict.fromkeys(self.ropes))
        self._kind_of_layer = [self._kinds.index(rope) for rope in self.ropes]
        self.width, self.dtype = config.rotary_dim, dtype
        # By kind of RoPE and the length that its frequencies depend on.
        self._frequencies: dict[tuple[RopeConfig, int], tuple[np.ndarray, float]] = {}

    def of(self, places: list[int]) -> RotaryEmbedding:
        """The same for some of the layers."""
        some = copy(self)
        some.ropes = [self.ropes[place] for place in places]
        some._kind_of_layer = [self._kind_of_layer[place] for place in places]
        return some

    def frequency_lengths(self, length: int) -> tuple[int, ...]:
        """What the frequencies of a sequence of `length` positions depend on: where it differs from
        a shorter one's, what a cache holds of that does not fit any more."""
        return tuple(rope.frequency_length(length) for rope in self._kinds)

    def __call__(self, step: Step) -> list[Rope]:
        """The rotation of the step's tokens in each layer."""
        made = [self._rotation(rope, step) for rope in self._kinds]
        return [made[kind] for kind in self._kind_of_layer]

    def _rotation(self, rope: RopeConfig, step: Step) -> Rope:
        inv_freq_J, scaling = self._of_length(rope, 0)
        angles_NJ = step.positions_N[:, np.newaxis] * inv_freq_J
        scaling_N = np.full(len(step.positions_N), scaling)
        for segment in step.segments:
            length = rope.frequency_length(segment.num_known)
            if length:
                new = segment.token_slice
                inv_freq_J, scaling_N[new] = self._of_length(rope, length)
                angles_NJ[new] = step.positions_N[new, np.newaxis] * inv_freq_J
        angles_N11J = angles_NJ[:, np.newaxis, np.newaxis]
        scaling_N111 = scaling_N[:, np.newaxis, np.newaxis, np.newaxis]
        sin_N11J = np.sin(angles_N11J) * scaling_N111
        return Rope(
            (np.cos(angles_N11J) * scaling_N111).astype(self.dtype),
            np.concatenate([-sin_N11J, sin_N11J], axis=2, dtype=self.dtype, casting="same_kind"),
            self._query_scale(rope, step.positions_N),
        )

    def _query_scale(self, rope: RopeConfig, positions_N: np.ndarray) -> np.ndarray | None:
        if not rope.query_scale_beta:
            return None
        beta, offset = rope.query_scale_beta, rope.query_scale_offset
        scale_N = rotary.position_query_scale(positions_N, beta, rope.original_positions, offset)
        return scale_N[:, np.newaxis, np.newaxis].astype(self.dtype)

    def _of_length(self, rope: RopeConfig, length: int) -> tuple[np.ndarray, float]:
        if length and rope.kind == "dynamic":
            return inverse_frequencies(rope, self.width, length)  # another one for each length
        key = rope, length
        if key not in self._frequencies:
            self._frequencies[key] = inverse_frequencies(rope, self.width, length)
        return self._frequencies[key]


def inverse_frequencies(rope: RopeConfig, width: int, length: int = 0) -> tuple[np.ndarray, float]:
    """The angles per position, (J,), of heads of which `width` elements are rotated, and the factor
    on cosines and sines (Hugging Face: attention_scaling). `length` is the sequence's
    `frequency_length`."""
    if rope.kind == "none":
        return np.empty(0), 1.0
    theta = rope.theta
    if rope.kind == "dynamic":
        trained = rope.original_positions
        theta = rotary.dynamic_theta(theta, rope.factor, length, trained, width)
    if rope.kind == "ntk_alpha":
        theta = rotary.ntk_theta(theta, rope.factor, width)
    inv_freq_J = rotary.inverse_frequencies(width, theta)
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
    if rope.kind == "longrope":
        scaling = rope.attention_factor
        if scaling is None:
            scaling = rotary.longrope_attention_factor(rope.factor, rope.original_positions)
        if rope.mscales is not None:
            scaling = rope.mscales[length > 0]
        return inv_freq_J / np.array(rope.long_factors if length else rope.short_factors), scaling
    return inv_freq_J, 1.0
