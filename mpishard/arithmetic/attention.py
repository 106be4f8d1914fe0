"""Causal softmax attention as pairs (output, log-sum-exp), and the merging of such pairs.

A whole matrix of scores is never stored: under a block of queries the keys pass block by block, and
each adds to the sum of the weights and to the weighted sum of the values (FlashAttention: Dao et
al. 2022, arXiv 2205.14135). A weight is the exponential of a score less a shift, which cancels; it
only has to keep the weights within a float's range. A block of queries first goes without a shift:
the sums of its weights tell afterwards whether that was good. If not, it goes again with the peaks
of its scores so far as shift, which grows as keys pass (online softmax: Milakov and Gimelshein
2018, arXiv 1805.02867) and costs a third more time.

Heads are grouped (Ainslie et al. 2023, arXiv 2305.13245): each of the ``g`` key/value heads serves
``r = h / g`` query heads, consecutive ones. ``Q`` counts the queries of a key/value head, query by
query and for each its ``r`` heads. A value is V numbers wide, which need not be a key's K.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from mpishard.arithmetic.gemm import SMALL_GEMM_SIZE

# A block of scores has so many rows, one for each query and head, and so many keys: 1 MiB, which
# the second-level cache of a core holds.
QUERY_ROWS = 1024
KEY_BLOCK = 256
# Keys that only some of the queries see come in fewer, so that fewer scores are made and hidden.
DIAGONAL_BLOCK = 128
# Key/value heads are taken together as long as their scores are no more than these.
CACHED_SCORES = 128 * 1024
# Between these, a sum of weights without shift has lost nothing to overflow or underflow.
SMALLEST_SUM, LARGEST_SUM = 1e-20, 1e20


def attend(
    q_ShK: np.ndarray,
    q_pos_S: np.ndarray,
    k_gTK: np.ndarray,
    v_gTV: np.ndarray,
    k_pos_T: np.ndarray,
    scale: float,
    window: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of the queries at the positions `q_pos_S` of a sequence over the keys at `k_pos_T`,
    both strictly ascending: ``(out_ShV, lse_Sh)``.

    The query at ``p`` sees the keys at ``p - window + 1`` to ``p``, or at 0 to ``p`` without a
    window. A query that sees none gets the output 0 and the log-sum-exp -inf. Blocks of keys that
    no query of a block sees are not read.
    """
    S, h, K = q_ShK.shape
    g = len(k_gTK)
    q_SgrK = q_ShK.reshape(S, g, h // g, K)
    if S == 1:
        seen = _seen_by_one(q_pos_S[0], k_pos_T, window)
        out_SgrV, lse_Sgr = _attend_one(q_SgrK, k_gTK[:, seen], v_gTV[:, seen], scale)
    else:
        bounds = _seen(q_pos_S, k_pos_T, window)
        out_SgrV, lse_Sgr = _attend_many(q_SgrK, k_gTK, v_gTV, *bounds, scale)
    return out_SgrV.reshape(S, h, v_gTV.shape[2]), lse_Sgr.reshape(S, h)


def merge_attn_states(
    out_a_ShV: np.ndarray, lse_a_Sh: np.ndarray, out_b_ShV: np.ndarray, lse_b_Sh: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Attention over two disjoint sets of keys, from the attention over each: ``(out_ShV,
    lse_Sh)``."""
    (a_Sh, b_Sh), lse_Sh = merge_weights(np.stack([lse_a_Sh, lse_b_Sh]))
    return a_Sh[..., np.newaxis] * out_a_ShV + b_Sh[..., np.newaxis] * out_b_ShV, lse_Sh


def merge_weights(lse_RSh: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the attention over each of ``R`` disjoint sets of keys contributes to the attention over
    all of them, and the log-sum-exp of that: ``(share_RSh, lse_Sh)``.

    The shares of a query sum to 1. That of a set without keys for it, log-sum-exp -inf, is 0.
    """
    peak_Sh = np.maximum(lse_RSh.max(axis=0), np.finfo(lse_RSh.dtype).min)  # finite, for -inf too
    share_RSh = np.exp(lse_RSh - peak_Sh)
    total_Sh = share_RSh.sum(axis=0)
    share_RSh /= np.where(total_Sh > 0, total_Sh, 1)
    return share_RSh, peak_Sh + _log(total_Sh)


def _seen_by_one(q_at: int, k_pos_T: np.ndarray, window: int | None) -> slice:
    """The keys that the query at `q_at` sees."""
    if window is None and len(k_pos_T) and k_pos_T[-1] <= q_at:
        return slice(None)
    (start,), (stop,) = _seen(np.array([q_at]), k_pos_T, window)
    return slice(start, stop)


def _seen(
    q_pos_S: np.ndarray, k_pos_T: np.ndarray, window: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Where among the keys those begin and end that each query sees: ``(start_S, stop_S)``."""
    stop_S = np.searchsorted(k_pos_T, q_pos_S, side="right")
    if window is None:
        return np.zeros_like(stop_S), stop_S
    return np.searchsorted(k_pos_T, q_pos_S - window, side="right"), stop_S


def _attend_one(
    q_1grK: np.ndarray, k_gTK: np.ndarray, v_gTV: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of one query over all the keys: ``(out_grV, lse_gr)``.

    Products with keys and values are cut so short that OpenBLAS does not pack them: over thousands
    of keys that takes half the time, if ``k.T`` is in C order, as a cache keeps it.
    """
    _, g, r, K = q_1grK.shape
    (_, T, V), dtype = v_gTV.shape, q_1grK.dtype
    if T == 0:
        return np.zeros((g, r, V), dtype), np.full((g, r), -np.inf, dtype)
    q_grK = q_1grK[0] * dtype.type(scale)
    k_gKT = k_gTK.transpose(0, 2, 1)
    blocks = _slices(T, SMALL_GEMM_SIZE // (r * K))
    scores_grT = np.empty((g, r, T), dtype)
    for keys in blocks:
        np.matmul(q_grK, k_gKT[:, :, keys], out=scores_grT[:, :, keys])
    peak_gr1 = scores_grT.max(axis=-1, keepdims=True)
    scores_grT -= peak_gr1
    weights_grT = np.exp(scores_grT, out=scores_grT)
    total_gr1 = weights_grT.sum(axis=-1, keepdims=True)
    out_grV = weights_grT[:, :, blocks[0]] @ v_gTV[:, blocks[0]]
    for keys in blocks[1:]:
        out_grV += weights_grT[:, :, keys] @ v_gTV[:, keys]
    out_grV /= total_gr1
    return out_grV, (peak_gr1 + np.log(total_gr1))[..., 0]


def _attend_many(
    q_SgrK: np.ndarray,
    k_gTK: np.ndarray,
    v_gTV: np.ndarray,
    start_S: np.ndarray,
    stop_S: np.ndarray,
    scale: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of each query over its keys, block by block of heads and queries: ``(out_SgrV,
    lse_Sgr)``."""
    (S, g, r, K), V = q_SgrK.shape, v_gTV.shape[2]
    out_SgrV = np.empty((S, g, r, V), q_SgrK.dtype)
    lse_Sgr = np.empty(q_SgrK.shape[:-1], q_SgrK.dtype)
    height = max(1, QUERY_ROWS // r)
    scores_of_a_head = min(S, height) * r * min(k_gTK.shape[1], KEY_BLOCK)
    for heads in _slices(g, CACHED_SCORES // max(1, scores_of_a_head)):
        shifted = False
        for queries in _slices(S, height):
            q_gSrK = q_SgrK[queries, heads].transpose(1, 0, 2, 3)
            q_gQK = q_gSrK.reshape(len(q_gSrK), -1, K) * q_SgrK.dtype.type(scale)
            keys = k_gTK[heads], v_gTV[heads], start_S[queries], stop_S[queries]
            out_gQV, lse_gQ, shifted = _attend_block(q_gQK, *keys, shifted)
            out_gSrV = out_gQV.reshape(*q_gSrK.shape[:-1], V)
            out_SgrV[queries, heads] = out_gSrV.transpose(1, 0, 2, 3)
            lse_Sgr[queries, heads] = lse_gQ.reshape(q_gSrK.shape[:-1]).transpose(1, 0, 2)
    return out_SgrV, lse_Sgr


def _attend_block(
    q_gQK: np.ndarray,
    k_gTK: np.ndarray,
    v_gTV: np.ndarray,
    start_S: np.ndarray,
    stop_S: np.ndarray,
    shifted: bool,
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Attention of a block of scaled queries and whether its scores had to be shifted, which those
    of the same heads' next block will then be from the start: ``(out_gQV, lse_gQ, shifted)``."""
    block = q_gQK, k_gTK, v_gTV, start_S, stop_S
    if not shifted:
        with np.errstate(over="ignore", invalid="ignore"):
            sum_gQV, total_gQ1, peak_gQ1 = _sums(*block, shifted=False)
        sees_Q1 = np.repeat(stop_S > start_S, q_gQK.shape[1] // len(stop_S))[:, np.newaxis]
        good_gQ1 = (total_gQ1 > SMALLEST_SUM) & (total_gQ1 < LARGEST_SUM)
        shifted = not (good_gQ1 | ~sees_Q1).all()
    if shifted:
        sum_gQV, total_gQ1, peak_gQ1 = _sums(*block, shifted=True)
    sum_gQV /= np.where(total_gQ1 > 0, total_gQ1, 1)
    return sum_gQV, (peak_gQ1 + _log(total_gQ1))[..., 0], shifted


def _sums(
    q_gQK: np.ndarray,
    k_gTK: np.ndarray,
    v_gTV: np.ndarray,
    start_S: np.ndarray,
    stop_S: np.ndarray,
    shifted: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums over the keys that each query sees of ``weight * value`` and of ``weight``, where a
    weight is the exponential of a score less the query's peak, or 0 if not `shifted`:
    ``(sum_gQV, total_gQ1, peak_gQ1)``."""
    (g, Q, _), V = q_gQK.shape, v_gTV.shape[2]
    r, dtype = Q // len(stop_S), q_gQK.dtype
    sum_gQV, total_gQ1 = np.zeros((g, Q, V), dtype), np.zeros((g, Q, 1), dtype)
    peak_gQ1 = np.full((g, Q, 1), np.finfo(dtype).min if shifted else 0, dtype)
    for start, stop in _key_blocks(start_S[0], stop_S[0], stop_S[-1]):
        first, last = np.searchsorted(stop_S, start, side="right"), np.searchsorted(start_S, stop)
        if first >= last:
            continue  # the queries see none of these keys
        rows = slice(first * r, last * r)
        weights_gQT = q_gQK[:, rows] @ k_gTK[:, start:stop].transpose(0, 2, 1)
        _hide(weights_gQT, start, stop, start_S[first:last], stop_S[first:last])
        if shifted:
            before_gQ1 = peak_gQ1[:, rows].copy()
            np.maximum(before_gQ1, weights_gQT.max(-1, keepdims=True), out=peak_gQ1[:, rows])
            kept_gQ1 = np.exp(before_gQ1 - peak_gQ1[:, rows])
            sum_gQV[:, rows] *= kept_gQ1
            total_gQ1[:, rows] *= kept_gQ1
            weights_gQT -= peak_gQ1[:, rows]
        np.exp(weights_gQT, out=weights_gQT)
        total_gQ1[:, rows] += weights_gQT @ np.ones((stop - start, 1), dtype)
        sum_gQV[:, rows] += weights_gQT @ v_gTV[:, start:stop]
    return sum_gQV, total_gQ1, peak_gQ1


def _key_blocks(first: int, diagonal: int, end: int) -> Iterator[tuple[int, int]]:
    """Where the blocks of the keys from `first` to `end` begin and end: long ones up to `diagonal`,
    the first key that some query must not see yet, and short ones from there."""
    starts = [*range(first, diagonal, KEY_BLOCK), *range(diagonal, end, DIAGONAL_BLOCK)]
    return pairwise([*starts, end])


def _hide(
    scores_gQT: np.ndarray, start: int, stop: int, start_S: np.ndarray, stop_S: np.ndarray
) -> None:
    """Sets the scores of keys `start` to `stop` that lie before or behind what a query sees to
    -inf. Only the queries for which there are any are touched."""
    scores_gSrT = scores_gQT.reshape(len(scores_gQT), len(stop_S), -1, stop - start)
    key_T = np.arange(start, stop)
    late = slice(0, np.searchsorted(stop_S, stop))
    early = slice(np.searchsorted(start_S, start, side="right"), None)
    for queries, hidden_ST in (
        (late, key_T >= stop_S[late, np.newaxis]),
        (early, key_T < start_S[early, np.newaxis]),
    ):
        np.copyto(scores_gSrT[:, queries], -np.inf, where=hidden_ST[:, np.newaxis])


def _slices(length: int, step: int) -> list[slice]:
    """The indices below `length` in runs of `step`, at least 1."""
    step = max(1, step)
    return [slice(start, start + step) for start in range(0, length, step)]


def _log(total: np.ndarray) -> np.ndarray:
    """The logarithm of sums of weights, -inf for an empty one, without a warning."""
    return np.log(total, out=np.full_like(total, -np.inf), where=total > 0)
