"""Relative position biases (T5: Raffel et al. 2020, arXiv 1910.10683): for each bucket of distances
a learned bias of each head's scores, in place of an embedding of positions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class RelativeBiases:
    """The biases of some query heads: a row of the table for each bucket of distances.

    A causal query has all `buckets` for the keys up to itself; else half of them are for the keys
    after it."""

    table_Bh: np.ndarray  # B: buckets
    max_distance: int  # from which on all keys are in the same bucket
    causal: bool

    @property
    def heads(self) -> int:
        """The number of heads."""
        return self.table_Bh.shape[1]

    def of_heads(self, heads: slice) -> RelativeBiases:
        """Those of some of the heads."""
        return replace(self, table_Bh=self.table_Bh[:, heads])

    def between(self, q_pos_S: np.ndarray, k_pos_T: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Those between queries and keys at these positions: (h, S, T)."""
        ahead_ST = k_pos_T - q_pos_S[:, np.newaxis]
        bucket_ST = buckets_of(ahead_ST, len(self.table_Bh), self.max_distance, self.causal)
        return self.table_Bh.T.astype(dtype, copy=False)[:, bucket_ST]


def buckets_of(ahead: np.ndarray, buckets: int, max_distance: int, causal: bool) -> np.ndarray:
    """The bucket of each key that lies so many positions ahead of a query; behind it, below 0.

    The first half of a direction's buckets are single distances, the others grow as the distance
    does, up to `max_distance`.

    >>> buckets_of(-np.array([0, 1, 2, 3, 4, 6, 8, 12, 16, 99]), 8, 16, causal=True).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7, 7, 7]
    >>> buckets_of(np.array([-3, -1, 0, 1, 3]), 8, 16, causal=False).tolist()
    [2, 1, 0, 5, 6]
    """
    first = np.zeros_like(ahead)
    if causal:
        distance = -np.minimum(ahead, 0)
    else:
        buckets //= 2
        first, distance = np.where(ahead > 0, buckets, 0), np.abs(ahead)
    exact = buckets // 2
    # In float32, as transformers has it: where bounds are whole numbers, rounding decides.
    logarithm = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    growth = np.float32(math.log(max_distance / exact))
    coarse = exact + (logarithm / growth * np.float32(buckets - exact)).astype(np.int64)
    return first + np.where(distance < exact, distance, np.minimum(coarse, buckets - 1))
