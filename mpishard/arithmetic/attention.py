"""Softmax attention of queries over keys, as a pair (output, log-sum-exp).

Heads are grouped (Ainslie et al. 2023, arXiv 2305.13245): each of the ``g`` key/value heads serves
``h / g`` query heads, consecutive ones.
"""

from __future__ import annotations

import numpy as np

# Queries are taken so many at a time that one key/value head's scores stay in cache.
QUERY_BLOCK = 128


def attend(
    q_ShK: np.ndarray,
    k_gTK: np.ndarray,
    v_gTK: np.ndarray,
    scale: float,
    window: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Causal attention of the last ``S`` positions of a sequence over all its ``T``:
    ``(out_ShK, lse_Sh)``.

    The query at position ``p`` sees the keys at ``p - window + 1`` to ``p``, or from 0 without a
    window. Keys that no query of a block sees are not read.
    """
    S, h, K = q_ShK.shape
    g, T, _ = k_gTK.shape
    out_ShK = np.empty_like(q_ShK)
    lse_Sh = np.empty((S, h), q_ShK.dtype)
    for start in range(0, S, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, S)
        first, last = T - S + start, T - S + stop - 1  # positions of the block's queries
        lowest = max(0, first - window + 1) if window else 0
        for head in range(g):
            mine = slice(head * (h // g), (head + 1) * (h // g))
            out_ShK[start:stop, mine], lse_Sh[start:stop, mine] = _attend_block(
                q_ShK[start:stop, mine],
                k_gTK[head, lowest : last + 1],
                v_gTK[head, lowest : last + 1],
                scale,
                _hidden(first, last, lowest, window),
            )
    return out_ShK, lse_Sh


def _attend_block(
    q_SrK: np.ndarray,
    k_TK: np.ndarray,
    v_TK: np.ndarray,
    scale: float,
    hidden_S1T: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of the ``r`` query heads of one key/value head; `hidden_S1T` says which keys a
    query must not see (None: it sees all)."""
    S, r, K = q_SrK.shape
    scores_SrT = ((q_SrK * q_SrK.dtype.type(scale)).reshape(S * r, K) @ k_TK.T).reshape(S, r, -1)
    if hidden_S1T is not None:
        np.copyto(scores_SrT, -np.inf, where=hidden_S1T)
    peak_Sr1 = scores_SrT.max(axis=-1, keepdims=True)
    scores_SrT -= peak_Sr1
    weights_SrT = np.exp(scores_SrT, out=scores_SrT)
    total_Sr1 = weights_SrT.sum(axis=-1, keepdims=True)
    out_SrK = (weights_SrT.reshape(S * r, -1) @ v_TK).reshape(S, r, K)
    out_SrK /= total_Sr1
    return out_SrK, (peak_Sr1 + np.log(total_Sr1))[..., 0]


def _hidden(first: int, last: int, lowest: int, window: int | None) -> np.ndarray | None:
    """Which of the keys at positions ``lowest..last`` the queries at ``first..last`` must not
    see, as (S, 1, T) booleans; None for a single query, whose keys are all cut to measure."""
    if first == last:
        return None
    query_S1 = np.arange(first, last + 1)[:, np.newaxis]
    key_T = np.arange(lowest, last + 1)
    hidden_ST = key_T > query_S1
    if window:
        hidden_ST |= key_T <= query_S1 - window
    return hidden_ST[:, np.newaxis]
