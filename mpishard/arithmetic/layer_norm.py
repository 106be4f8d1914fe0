"""LayerNorm (Ba et al. 2016, arXiv 1607.06450) in its two parts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LayerNorm:
    """Rows of mean 0 and variance 1, times `weight`, plus `bias`; None is a norm without it. A unit
    offset, as Nemotron has it, is in the weight."""

    weight: np.ndarray | None  # (D,)
    bias: np.ndarray | None  # (D,)
    eps: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return Affine(self.weight, self.bias)(standardize(x, self.eps))


@dataclass(frozen=True)
class Standardize:
    """What all norms of the same rows share."""

    eps: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return standardize(x, self.eps)


@dataclass(frozen=True)
class Affine:
    """``x * weight + bias``: what norms of the same rows differ in."""

    weight: np.ndarray | None
    bias: np.ndarray | None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        if self.weight is not None:
            x = x * self.weight
        return x if self.bias is None else x + self.bias


def standardize(x: np.ndarray, eps: float) -> np.ndarray:
    """`x` less its mean and divided by its standard deviation along its last axis."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.vecdot(centred, centred) / x.shape[-1]
    centred /= np.sqrt(variance + eps)[..., np.newaxis]
    return centred
