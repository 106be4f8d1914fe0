"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and the ways to stretch it beyond
the length a model was trained on.

The frequencies of a head of which 2J elements are rotated are J angles per position, in float64.
Pairs are ``(i, i + J)``, as most Hugging Face checkpoints have them, or neighbours.
"""

from __future__ import annotations

import math

import numpy as np


def inverse_frequencies(width: int, theta: float) -> np.ndarray:
    """The angles per position, (J,), of the original embedding of `width` elements, fastest
    first."""
    return theta ** (-np.arange(0, width, 2) / width)


def dynamic_theta(
    theta: float, factor: float, length: int, original_max_position: int, width: int
) -> float:
    """The base of the dynamic ("NTK-aware") embedding for a sequence of `length` positions: it
    grows once the sequence is longer than the `original_max_position` one."""
    stretch = factor * max(length, original_max_position) / original_max_position - (factor - 1)
    return ntk_theta(theta, stretch, width)


def ntk_theta(theta: float, stretch: float, width: int) -> float:
    """The base with which the slowest pair turns `stretch` times more slowly."""
    return theta * stretch ** (width / (width - 2))


def llama3_frequencies(
    inv_freq_J: np.ndarray, factor: float, low: float, high: float, original_max_position: int
) -> np.ndarray:
    """Llama 3.1's frequencies: those that turn more than `high` times within the
    `original_max_position` length are kept, those that turn less than `low` times divided by
    `factor`, the others blended. There are no others if `low` is `high`."""
    turns_J = original_max_position * inv_freq_J / (2 * math.pi)
    kept_J = np.clip((turns_J - low) / max(high - low, 1e-9), 0, 1)
    return kept_J * inv_freq_J + (1 - kept_J) * inv_freq_J / factor


def yarn_frequencies(
    inv_freq_J: np.ndarray,
    theta: float,
    factor: float,
    fast: float,
    slow: float,
    original_max_position: int,
    truncate: bool,
) -> np.ndarray:
    """YaRN's frequencies (Peng et al. 2023, arXiv 2309.00071): a ramp over the pairs, from kept
    (more than `fast` turns within the `original_max_position` length) to divided by `factor` (less
    than `slow`). `truncate` widens the ramp to whole pairs."""
    width = 2 * len(inv_freq_J)

    def find_correction_dim(times: float) -> float:
        return (
            width * math.log(original_max_position / (times * 2 * math.pi)) / (2 * math.log(theta))
        )

    low, high = find_correction_dim(fast), find_correction_dim(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001  # a ramp of no length would divide by zero
    divided_J = np.clip((np.arange(len(inv_freq_J)) - low) / (high - low), 0, 1)
    return divided_J * inv_freq_J / factor + (1 - divided_J) * inv_freq_J


def yarn_attention_factor(factor: float, mscale: float | None, mscale_all: float | None) -> float:
    """What YaRN multiplies cosines and sines with where the checkpoint does not say."""
    if mscale and mscale_all:
        return yarn_get_mscale(factor, mscale) / yarn_get_mscale(factor, mscale_all)
    return yarn_get_mscale(factor, 1.0)


def yarn_get_mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1


def yarn_softmax_scale(factor: float, mscale_all: float | None) -> float:
    """What DeepSeek's models multiply attention's scores with under YaRN: its temperature once for
    the queries and once for the keys, of which only a part is turned, and so multiplied already."""
    return yarn_get_mscale(factor, mscale_all) ** 2 if mscale_all else 1.0


def longrope_attention_factor(factor: float, original_max_position: int) -> float:
    """What LongRoPE multiplies cosines and sines with where the checkpoint does not say (Ding et
    al. 2024, arXiv 2402.13753). `factor` is the ratio of the two lengths."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_max_position))


def position_query_scale(
    positions_N: np.ndarray, beta: float, original_max_position: int, offset: int = 0
) -> np.ndarray:
    """What the query at each position is multiplied with (Ministral 3; Llama 4 with an `offset` of
    1): 1 within the original length, and more by the logarithm of how many such lengths lie before
    the position."""
    return 1 + beta * np.log(1 + np.floor((positions_N + offset) / original_max_position))


def deinterleave(x_NhK: np.ndarray) -> np.ndarray:
    """`x_NhK` with the elements of even places first and then those of odd ones, so that pairs of
    neighbours become those that `apply_rotary` turns. Products of queries and keys do not depend on
    the order, if it is that of both."""
    return np.concatenate([x_NhK[..., ::2], x_NhK[..., 1::2]], axis=-1)


def apply_rotary(
    x_NhK: np.ndarray, cos_N11J: np.ndarray, sin_N12J: np.ndarray, interleaved: bool = False
) -> np.ndarray:
    """`x_NhK` with each pair of the first 2J elements of each head turned by its position's angle;
    the other elements stay as they are. Pairs are ``(i, i + J)``, or neighbours if `interleaved`.
    The sines come twice, as they are added to the two elements of a pair: ``(-sin, sin)``."""
    N, h, K = x_NhK.shape
    J = cos_N11J.shape[-1]
    rotated_NhX = x_NhK[..., : 2 * J]  # X: 2J
    if interleaved:
        pairs_Nh2J = rotated_NhX.reshape(N, h, J, 2).swapaxes(2, 3)
    else:
        pairs_Nh2J = rotated_NhX.reshape(N, h, 2, J)
    turned_Nh2J = pairs_Nh2J * cos_N11J
    turned_Nh2J += pairs_Nh2J[:, :, ::-1] * sin_N12J
    if interleaved:
        turned_Nh2J = turned_Nh2J.swapaxes(2, 3)
    turned_NhX = turned_Nh2J.reshape(N, h, 2 * J)
    return turned_NhX if 2 * J == K else np.concatenate([turned_NhX, x_NhK[..., 2 * J :]], axis=2)
