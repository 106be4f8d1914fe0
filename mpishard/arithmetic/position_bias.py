"""Biases of attention's scores that depend on the positions of query and key.

A kind of bias, as `LinearBiases` and `RelativeBiases` are, has the biases of some query heads and
makes those between any positions. `PositionBias` adds them to scores, block by block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


class HeadBiases(Protocol):
    """The biases of the scores of some query heads."""

    @property
    def heads(self) -> int:
        """The number of heads."""

    def of_heads(self, heads: slice) -> HeadBiases:
        """Those of some of the heads."""

    def between(self, q_pos_S: np.ndarray, k_pos_T: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Those between queries and keys at these positions: (h, S, T)."""


@dataclass(frozen=True)
class PositionBias:
    """The biases between queries at `q_pos_S` and keys at `k_pos_T`, in the heads of `biases`; g of
    them are key/value heads that serve X query heads each."""

    biases: HeadBiases
    g: int
    q_pos_S: np.ndarray
    k_pos_T: np.ndarray

    def select(self, heads: slice, queries: slice) -> PositionBias:
        """Those of some of the key/value heads and of the queries."""
        start, stop, _ = heads.indices(self.g)
        X = self.biases.heads // self.g
        own = self.biases.of_heads(slice(start * X, stop * X))
        return PositionBias(own, stop - start, self.q_pos_S[queries], self.k_pos_T)

    def add(self, scores_gPT: np.ndarray, queries: slice, keys: slice) -> None:
        """Add the biases to the scores of these queries and keys."""
        q_pos_S, k_pos_T = self.q_pos_S[queries], self.k_pos_T[keys]
        biases_hST = self.biases.between(q_pos_S, k_pos_T, scores_gPT.dtype)
        biases_gXST = biases_hST.reshape(self.g, -1, len(q_pos_S), len(k_pos_T))
        scores_gSXT = scores_gPT.reshape(self.g, len(q_pos_S), -1, len(k_pos_T))
        scores_gSXT[...] += biases_gXST.transpose(0, 2, 1, 3)
