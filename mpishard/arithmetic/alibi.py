"""ALiBi, attention with linear biases (Press et al. 2021, arXiv 2108.12409): a score falls with the
distance of the key, for each head by its own slope, in place of an embedding of positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Alibi:
    """The biases between queries at `q_pos_S` and keys at `k_pos_T`, of heads with these slopes."""

    slopes_gX: np.ndarray  # by key/value head, of its query heads
    q_pos_S: np.ndarray
    k_pos_T: np.ndarray

    def select(self, heads: slice, queries: slice) -> Alibi:
        """Those of some of the key/value heads and of the queries."""
        return Alibi(self.slopes_gX[heads], self.q_pos_S[queries], self.k_pos_T)

    def add(self, scores_gPT: np.ndarray, queries: slice, keys: slice) -> None:
        """Add ``slope * (key's position - query's position)`` to the scores of these queries and
        keys."""
        dtype = scores_gPT.dtype
        behind_ST = self.k_pos_T[keys] - self.q_pos_S[queries, np.newaxis]
        (g, X), (S, T) = self.slopes_gX.shape, behind_ST.shape
        scores_gSXT = scores_gPT.reshape(g, S, X, T)  # a view
        slopes_g1X1 = self.slopes_gX[:, np.newaxis, :, np.newaxis]
        scores_gSXT += slopes_g1X1 * behind_ST[:, np.newaxis].astype(dtype)
