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

    @property
    def heads(self) -> int:
        """The number of heads."""
        return len(self.slopes_h)

    def of_heads(self, heads: slice) -> LinearBiases:
        """Those of some of the heads."""
        return LinearBiases(self.slopes_h[heads], self.scale, self.rounded)

    def between(self, q_pos_S: np.ndarray, k_pos_T: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Those between queries and keys at these positions: (h, S, T)."""
        slopes_h11 = self.slopes_h[:, np.newaxis, np.newaxis]
        q_pos_S1 = q_pos_S[:, np.newaxis]
        if self.rounded:
            rounded = round_to_bfloat16
            slopes_h11 = rounded(slopes_h11)
            biases_hST = rounded(slopes_h11 * rounded(k_pos_T))
            biases_hST = biases_hST - rounded(slopes_h11 * rounded(q_pos_S1))
        else:
            biases_hST = slopes_h11 * (k_pos_T - q_pos_S1)
        return biases_hST.astype(dtype) * dtype.type(self.scale)


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
