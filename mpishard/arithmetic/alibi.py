"""ALiBi, attention with linear biases (Press et al. 2021, arXiv 2108.12409): a score falls with the
distance of the key, for each head by its own slope, in place of an embedding of positions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LinearBiases:
    """The biases of some query heads' scores: ``scale * slope * (key's position - query's)``.

    Falcon computes ``slope * position`` in bfloat16, which `rounded` does as well."""

    slopes_h: np.ndarray
    scale: float = 1.0
    rounded: bool = False

    def of_heads(self, heads: slice) -> LinearBiases:
        """Those of some of the heads."""
        return LinearBiases(self.slopes_h[heads], self.scale, self.rounded)


@dataclass(frozen=True)
class Alibi:
    """The biases between queries at `q_pos_S` and keys at `k_pos_T`, in the heads of `biases`; g of
    them are key/value heads that serve X query heads each."""

    biases: LinearBiases
    g: int
    q_pos_S: np.ndarray
    k_pos_T: np.ndarray

    def select(self, heads: slice, queries: slice) -> Alibi:
        """Those of some of the key/value heads and of the queries."""
        start, stop, _ = heads.indices(self.g)
        X = len(self.biases.slopes_h) // self.g
        own = self.biases.of_heads(slice(start * X, stop * X))
        return Alibi(own, stop - start, self.q_pos_S[queries], self.k_pos_T)

    def add(self, scores_gPT: np.ndarray, queries: slice, keys: slice) -> None:
        """Add the biases to the scores of these queries and keys."""
        q_pos_S, k_pos_T, dtype = self.q_pos_S[queries], self.k_pos_T[keys], scores_gPT.dtype
        q_pos_S11 = q_pos_S[:, np.newaxis, np.newaxis]
        slopes_g1X1 = self.biases.slopes_h.reshape(self.g, 1, -1, 1)
        if self.biases.rounded:
            rounded = round_to_bfloat16
            slopes_g1X1 = rounded(slopes_g1X1)
            biases_gSXT = rounded(slopes_g1X1 * rounded(k_pos_T))
            biases_gSXT = biases_gSXT - rounded(slopes_g1X1 * rounded(q_pos_S11))
        else:
            biases_gSXT = slopes_g1X1 * (k_pos_T - q_pos_S11)
        biases_gSXT = biases_gSXT.astype(dtype) * dtype.type(self.biases.scale)
        scores_gPT.reshape(self.g, len(q_pos_S), -1, len(k_pos_T))[...] += biases_gSXT


def alibi_slopes(heads: int) -> np.ndarray:
    """The slopes of all heads, as the paper has them: a geometric sequence that ends with 1/256
    and, if the number of heads is no power of two, every second one of the sequence twice as long.
    """
    power = 2 ** math.floor(math.log2(heads))
    longer = _geometric(2 * power)[::2]
    return np.concatenate([_geometric(power), longer[: heads - power]])


def _geometric(length: int) -> np.ndarray:
    return 2.0 ** (-8 * np.arange(1, length + 1) / length)


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """`x` rounded to the 8 significant bits of bfloat16, halves to even."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(mantissa * 256), exponent - 8)
