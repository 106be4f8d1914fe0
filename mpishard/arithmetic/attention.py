"""Softmax attention of queries over keys, as a pair (output, log-sum-exp).

Heads are grouped (Ainslie et al. 2023, arXiv 2305.13245): each of the ``g`` key/value heads serves
``r = h / g`` query heads, consecutive ones.
"""

from __future__ import annotations

import numpy as np

# Queries are taken so many at a time, and heads so few that their scores stay in cache.
QUERY_BLOCK = 256
CACHED_SCORES = 128 * 1024


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
    q_SgrK = (q_ShK * q_ShK.dtype.type(scale)).reshape(S, g, h // g, K)
    blocks = []
    for start in range(0, S, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, S)
        first, last = T - S + start, T - S + stop - 1  # positions of the queries
        lowest = max(0, first - window + 1) if window else 0
        seen = slice(lowest, last + 1)
        hidden_ST = _hidden(first, last, lowest, window)
        scores_of_a_head = (stop - start) * (h // g) * (last + 1 - lowest)
        together = max(1, CACHED_SCORES // scores_of_a_head)
        parts = [
            _attend_block(
                q_SgrK[start:stop, head : head + together],
                k_gTK[head : head + together, seen],
                v_gTK[head : head + together, seen],
                hidden_ST,
            )
            for head in range(0, g, together)
        ]
        blocks.append(_joined(parts, axis=1))
    out_SgrK, lse_Sgr = _joined(blocks, axis=0)
    return out_SgrK.reshape(S, h, K), lse_Sgr.reshape(S, h)


def _joined(parts: list[tuple[np.ndarray, np.ndarray]], axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Outputs and log-sum-exps of several parts as one array each; a single part as it is."""
    if len(parts) == 1:
        return parts[0]
    outs, lses = zip(*parts, strict=True)
    return np.concatenate(outs, axis), np.concatenate(lses, axis)


def _attend_block(
    q_SgrK: np.ndarray, k_gTK: np.ndarray, v_gTK: np.ndarray, hidden_ST: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of some scaled queries over some keys; `hidden_ST` says which keys a query must
    not see (None: it sees all)."""
    S, g, r, K = q_SgrK.shape
    q_gQK = q_SgrK.transpose(1, 2, 0, 3).reshape(g, r * S, K)  # Q: the queries of a key/value head
    scores_gQT = q_gQK @ k_gTK.transpose(0, 2, 1)
    if hidden_ST is not None:
        np.copyto(scores_gQT.reshape(g, r, S, -1), -np.inf, where=hidden_ST)
    peak_gQ1 = scores_gQT.max(axis=-1, keepdims=True)
    scores_gQT -= peak_gQ1
    weights_gQT = np.exp(scores_gQT, out=scores_gQT)
    total_gQ1 = weights_gQT.sum(axis=-1, keepdims=True)
    out_gQK = weights_gQT @ v_gTK
    out_gQK /= total_gQ1
    lse_gQ = (peak_gQ1 + np.log(total_gQ1))[..., 0]
    return (
        out_gQK.reshape(g, r, S, K).transpose(2, 0, 1, 3),
        lse_gQ.reshape(g, r, S).transpose(2, 0, 1),
    )


def _hidden(first: int, last: int, lowest: int, window: int | None) -> np.ndarray | None:
    """Which of the keys at positions ``lowest..last`` the queries at ``first..last`` must not
    see, as (S, T) booleans; None for a single query, whose keys are all cut to measure."""
    if first == last:
        return None
    query_S1 = np.arange(first, last + 1)[:, np.newaxis]
    key_T = np.arange(lowest, last + 1)
    hidden_ST = key_T > query_S1
    if window:
        hidden_ST |= key_T <= query_S1 - window
    return hidden_ST
