"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and the ways to stretch it beyond
the length a model was trained on.

The frequencies of a head of width K are K/2 angles per position, in float64. Pairs are
``(i, i + K/2)``, as most Hugging Face checkpoints have them. J stands for K/2 in array names.
"""

from __future__ import annotations

import math

import numpy as np


def frequencies(width: int, theta: float) -> np.ndarray:
    """The K/2 angles per position of the original embedding, fastest first."""
    return theta ** (-np.arange(0, width, 2) / width)


def dynamic_theta(theta: float, factor: float, length: int, trained: int, width: int) -> float:
    """The base of the dynamic ("NTK-aware") embedding for a sequence of `length` positions: it
    grows once the sequence is longer than the `trained` one."""
    stretch = factor * max(length, trained) / trained - (factor - 1)
    return theta * stretch ** (width / (width - 2))


def llama3_frequencies(
    angles_J: np.ndarray, factor: float, low: float, high: float, trained: int
) -> np.ndarray:
    """Llama 3.1's frequencies: those that turn more than `high` times within the `trained` length
    are kept, those that turn less than `low` times divided by `factor`, the others blended."""
    turns_J = trained * angles_J / (2 * math.pi)
    kept_J = np.clip((turns_J - low) / (high - low), 0, 1)
    return kept_J * angles_J + (1 - kept_J) * angles_J / factor


def yarn_frequencies(
    angles_J: np.ndarray,
    theta: float,
    factor: float,
    fast: float,
    slow: float,
    trained: int,
    truncate: bool,
) -> np.ndarray:
    """YaRN's frequencies (Peng et al. 2023, arXiv 2309.00071): a ramp over the pairs, from kept
    (more than `fast` turns within the `trained` length) to divided by `factor` (less than `slow`).
    `truncate` widens the ramp to whole pairs."""
    width = 2 * len(angles_J)

    def pair_that_turns(times: float) -> float:
        return width * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(fast), pair_that_turns(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001  # a ramp of no length would divide by zero
    divided_J = np.clip((np.arange(len(angles_J)) - low) / (high - low), 0, 1)
    return divided_J * angles_J / factor + (1 - divided_J) * angles_J


def yarn_attention_factor(factor: float, mscale: float | None, mscale_all: float | None) -> float:
    """What YaRN multiplies cosines and sines with where the checkpoint does not say."""
    if mscale and mscale_all:
        return _yarn_temperature(factor, mscale) / _yarn_temperature(factor, mscale_all)
    return _yarn_temperature(factor, 1.0)


def _yarn_temperature(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1


def yarn_score_factor(factor: float, mscale_all: float | None) -> float:
    """What DeepSeek's models multiply attention's scores with under YaRN: its temperature once for
    the queries and once for the keys, of which only a part is turned, and so multiplied already."""
    return _yarn_temperature(factor, mscale_all) ** 2 if mscale_all else 1.0


def halves_of_neighbours(x_NhK: np.ndarray) -> np.ndarray:
    """`x_NhK` with the elements of even places first and then those of odd ones, so that pairs of
    neighbours become those that `rotate` turns. Products of queries and keys do not depend on the
    order, if it is that of both."""
    return np.concatenate([x_NhK[..., ::2], x_NhK[..., 1::2]], axis=-1)


def rotate(x_NhK: np.ndarray, cos_N11J: np.ndarray, sin_N12J: np.ndarray) -> np.ndarray:
    """`x_NhK` with each pair of each head turned by its position's angle. The sines come twice, as
    they are added to the two halves of a head: ``(-sin, sin)``."""
    N, h, K = x_NhK.shape
    halves_Nh2J = x_NhK.reshape(N, h, 2, K // 2)
    turned_Nh2J = halves_Nh2J * cos_N11J
    turned_Nh2J += halves_Nh2J[:, :, ::-1] * sin_N12J
    return turned_Nh2J.reshape(N, h, K)
