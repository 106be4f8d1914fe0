"""Attention against explicit loops, over positions, windows and groups of heads."""

from __future__ import annotations

import numpy as np
import pytest

from mpishard.arithmetic import attention
from mpishard.arithmetic.attention import attend


def plain(q_ShK, k_gTK, v_gTK, scale, window):
    """One query, one head, one key at a time."""
    S, h, _ = q_ShK.shape
    g, T, _ = k_gTK.shape
    out_ShK, lse_Sh = np.zeros_like(q_ShK), np.zeros((S, h))
    for s in range(S):
        position = T - S + s
        seen = [t for t in range(T) if t <= position and (not window or t > position - window)]
        for head in range(h):
            group = head // (h // g)
            scores = np.array([scale * q_ShK[s, head] @ k_gTK[group, t] for t in seen])
            weights = np.exp(scores)
            out_ShK[s, head] = weights @ v_gTK[group, seen] / weights.sum()
            lse_Sh[s, head] = np.log(weights.sum())
    return out_ShK, lse_Sh


@pytest.mark.parametrize("block", [1, 3, 128])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 100])
@pytest.mark.parametrize("S, T", [(1, 1), (1, 9), (7, 7), (4, 11), (10, 10)])
@pytest.mark.parametrize("h, g", [(4, 4), (6, 2), (3, 1)])
def test_attend(monkeypatch, block, window, S, T, h, g):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    random = np.random.RandomState(0)
    q_ShK = random.standard_normal((S, h, 5))
    k_gTK, v_gTK = random.standard_normal((2, g, T, 5))
    found = attend(q_ShK, k_gTK, v_gTK, 0.4, window)
    for array, expected in zip(found, plain(q_ShK, k_gTK, v_gTK, 0.4, window), strict=True):
        np.testing.assert_allclose(array, expected, rtol=0, atol=1e-12)


def test_large_scores_do_not_overflow():
    q_ShK = np.full((2, 1, 4), 200, np.float32)
    k_gTK = np.full((1, 3, 4), 200, np.float32)
    out_ShK, lse_Sh = attend(q_ShK, k_gTK, np.ones_like(k_gTK), 1.0)
    np.testing.assert_allclose(out_ShK, 1, rtol=1e-6)
    assert np.isfinite(lse_Sh).all()
