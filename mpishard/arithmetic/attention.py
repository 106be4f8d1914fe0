"""Softmax attention as pairs (output, log-sum-exp), and the merging of such pairs.

A whole matrix of scores is never stored: under a block of queries the keys pass block by block, and
each adds to the sum of the weights and to the weighted sum of the values (FlashAttention: Dao et
al. 2022, arXiv 2205.14135). A weight is the exponential of a score less a shift, which cancels; it
only has to keep the weights within a float's range. A block of queries first goes without a shift:
the sums of its weights tell afterwards whether that was good. If not, it goes again with the peaks
of its scores so far as shift, which grows as keys pass (online softmax: Milakov and Gimelshein
2018, arXiv 1805.02867) and costs a third more time.

Query heads are grouped (GQA: Ainslie et al. 2023, arXiv 2305.13245): each of the ``g`` key/value
heads serves ``h / g`` consecutive query heads, the axis X here. P counts the (query, head) pairs of
one key/value head, query by query. A value is Y numbers wide, which need not be a key's K.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from mpishard.arithmetic.gemm import SMALL_GEMM_SIZE
from mpishard.arithmetic.ops import sigmoid, softcap
from mpishard.arithmetic.position_bias import HeadBiases, PositionBias

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


@dataclass(frozen=True)
class AttentionSpec:
    """What the scores of one layer's attention depend on beside queries and keys.

    ``score = softcap(scale * q . k)`` over the keys within the `window`, or within the query's
    `chunk` of so many positions (Llama 4), where ``softcap(x) = softcap * tanh(x / softcap)``
    (Gemma 2, arXiv 2408.00118). `sinks_h` are one more logit of each head's softmax, without a
    value (StreamingLLM, arXiv 2309.17453; gpt-oss learns it); `apply_sinks` adds them once all keys
    are merged. `values_in_keys` says that values are the first Y numbers of the keys (MLA), and
    need not be cached or sent beside them. Unless `causal`, queries see all keys, before and after.

    `biases` are added to the scores by the positions of query and key. They are those of this
    rank's query heads, and `group_biases` those of all ranks that share its key/value heads and the
    cache (flash decoding)."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks_h: np.ndarray | None = None
    values_in_keys: bool = False
    biases: HeadBiases | None = None
    group_biases: HeadBiases | None = None
    chunk: int | None = None
    causal: bool = True

    @property
    def sees_all(self) -> bool:
        """Whether queries see all earlier keys."""
        return self.window is None and self.chunk is None

    def first_keys(self, q_pos_S: np.ndarray) -> np.ndarray:
        """The position of the first key that the query at each position sees, if it exists."""
        return first_visible(q_pos_S, self.window, self.chunk)

    def of_heads(self, heads: slice) -> AttentionSpec:
        """The same for some of the query heads."""
        if self.biases is None:
            return self
        return replace(self, biases=self.biases.of_heads(heads))

    def of_group(self) -> AttentionSpec:
        """The same for the query heads of all ranks that share this rank's key/value heads."""
        return self if self.biases is None else replace(self, biases=self.group_biases)


def attend(
    q_ShK: np.ndarray,
    q_pos_S: np.ndarray,
    k_gTK: np.ndarray,
    v_gTY: np.ndarray,
    k_pos_T: np.ndarray,
    spec: AttentionSpec,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of the queries at the positions `q_pos_S` of a sequence over the keys at `k_pos_T`,
    both strictly ascending: ``(out_ShY, lse_Sh)``.

    The causal query at ``p`` sees the keys at ``p - window + 1`` to ``p``, or from the beginning of
    its chunk on, or at 0 to ``p`` without both. Sinks are left out. A query that sees none gets the
    output 0 and the log-sum-exp -inf. Blocks of keys that no query of a block sees are not read."""
    S, h, K = q_ShK.shape
    g = len(k_gTK)
    q_SgXK = q_ShK.reshape(S, g, h // g, K)
    bias = None
    if spec.biases is not None:
        bias = PositionBias(spec.biases, g, q_pos_S, k_pos_T)
    if S == 1:
        seen = _seen_by_one(q_pos_S[0], k_pos_T, spec)
        out_SgXY, lse_SgX = _attend_one(q_SgXK, k_gTK, v_gTY, seen, spec, bias)
    else:
        bounds = _seen(q_pos_S, k_pos_T, spec)
        out_SgXY, lse_SgX = _attend_many(q_SgXK, k_gTK, v_gTY, *bounds, spec, bias)
    return out_SgXY.reshape(S, h, v_gTY.shape[2]), lse_SgX.reshape(S, h)


def merge_attn_states(
    out_a_ShY: np.ndarray, lse_a_Sh: np.ndarray, out_b_ShY: np.ndarray, lse_b_Sh: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Attention over two disjoint sets of keys, from the attention over each: ``(out_ShY,
    lse_Sh)``."""
    (a_Sh, b_Sh), lse_Sh = merge_weights(np.stack([lse_a_Sh, lse_b_Sh]))
    return a_Sh[..., np.newaxis] * out_a_ShY + b_Sh[..., np.newaxis] * out_b_ShY, lse_Sh


def apply_sinks(out_ShY: np.ndarray, lse_Sh: np.ndarray, spec: AttentionSpec) -> np.ndarray:
    """Attention over all keys and each head's sink, from the attention over the keys: beside a sink
    the keys weigh ``exp(lse) / (exp(lse) + exp(sink))`` together."""
    if spec.sinks_h is None:
        return out_ShY
    return out_ShY * sigmoid(lse_Sh - spec.sinks_h)[..., np.newaxis]


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


def first_visible(q_pos_S: np.ndarray, window: int | None, chunk: int | None) -> np.ndarray:
    """The first position that the query at each position sees: of its window, or of its chunk. It
    is below 0 where the window reaches further back than the sequence.

    >>> first_visible(np.arange(7), 3, None).tolist(), first_visible(np.arange(7), None, 3).tolist()
    ([-2, -1, 0, 1, 2, 3, 4], [0, 0, 0, 3, 3, 3, 6])
    """
    if chunk is not None:
        return q_pos_S // chunk * chunk
    return np.zeros_like(q_pos_S) if window is None else q_pos_S - window + 1


def _seen_by_one(q_at: int, k_pos_T: np.ndarray, spec: AttentionSpec) -> slice:
    """The keys that the query at `q_at` sees."""
    if not spec.causal or (spec.sees_all and len(k_pos_T) and k_pos_T[-1] <= q_at):
        return slice(None)
    (start,), (stop,) = _seen(np.array([q_at]), k_pos_T, spec)
    return slice(start, stop)


def _seen(
    q_pos_S: np.ndarray, k_pos_T: np.ndarray, spec: AttentionSpec
) -> tuple[np.ndarray, np.ndarray]:
    """Where among the keys those begin and end that each query sees: ``(start_S, stop_S)``."""
    if not spec.causal:
        return np.zeros_like(q_pos_S), np.full_like(q_pos_S, len(k_pos_T))
    stop_S = np.searchsorted(k_pos_T, q_pos_S, side="right")
    if spec.sees_all:
        return np.zeros_like(stop_S), stop_S
    return np.searchsorted(k_pos_T, spec.first_keys(q_pos_S)), stop_S


def _attend_one(
    q_1gXK: np.ndarray,
    k_gTK: np.ndarray,
    v_gTY: np.ndarray,
    seen: slice,
    spec: AttentionSpec,
    bias: PositionBias | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of one query over the keys that it has `seen`: ``(out_gXY, lse_gX)``.

    Products with keys and values are cut so short that OpenBLAS does not pack them: over thousands
    of keys that takes half the time, if ``k.T`` is in C order, as a cache keeps it.
    """
    k_gTK, v_gTY = k_gTK[:, seen], v_gTY[:, seen]
    _, g, X, K = q_1gXK.shape
    (_, T, Y), dtype = v_gTY.shape, q_1gXK.dtype
    if T == 0:
        return np.zeros((g, X, Y), dtype), np.full((g, X), -np.inf, dtype)
    q_gXK = q_1gXK[0] * dtype.type(spec.scale)
    k_gKT = k_gTK.transpose(0, 2, 1)
    blocks = _slices(T, SMALL_GEMM_SIZE // (X * K))
    scores_gXT = np.empty((g, X, T), dtype)
    for keys in blocks:
        np.matmul(q_gXK, k_gKT[:, :, keys], out=scores_gXT[:, :, keys])
    if spec.softcap is not None:
        softcap(scores_gXT, spec.softcap)
    if bias is not None:
        bias.add(scores_gXT, slice(None), seen)
    peak_gX1 = scores_gXT.max(axis=-1, keepdims=True)
    scores_gXT -= peak_gX1
    weights_gXT = np.exp(scores_gXT, out=scores_gXT)
    total_gX1 = weights_gXT.sum(axis=-1, keepdims=True)
    out_gXY = weights_gXT[:, :, blocks[0]] @ v_gTY[:, blocks[0]]
    for keys in blocks[1:]:
        out_gXY += weights_gXT[:, :, keys] @ v_gTY[:, keys]
    out_gXY /= total_gX1
    return out_gXY, (peak_gX1 + np.log(total_gX1))[..., 0]


def _attend_many(
    q_SgXK: np.ndarray,
    k_gTK: np.ndarray,
    v_gTY: np.ndarray,
    start_S: np.ndarray,
    stop_S: np.ndarray,
    spec: AttentionSpec,
    bias: PositionBias | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of each query over its keys, block by block of heads and queries: ``(out_SgXY,
    lse_SgX)``."""
    (S, g, X, K), Y = q_SgXK.shape, v_gTY.shape[2]
    out_SgXY = np.empty((S, g, X, Y), q_SgXK.dtype)
    lse_SgX = np.empty(q_SgXK.shape[:-1], q_SgXK.dtype)
    height = max(1, QUERY_ROWS // X)
    scores_of_a_head = min(S, height) * X * min(k_gTK.shape[1], KEY_BLOCK)
    for heads in _slices(g, CACHED_SCORES // max(1, scores_of_a_head)):
        shifted = False
        for queries in _slices(S, height):
            q_gSXK = q_SgXK[queries, heads].transpose(1, 0, 2, 3)
            q_gPK = q_gSXK.reshape(len(q_gSXK), -1, K) * q_SgXK.dtype.type(spec.scale)
            keys = k_gTK[heads], v_gTY[heads], start_S[queries], stop_S[queries]
            biases = bias.select(heads, queries) if bias is not None else None
            out_gPY, lse_gP, shifted = _attend_block(q_gPK, *keys, spec.softcap, biases, shifted)
            out_gSXY = out_gPY.reshape(*q_gSXK.shape[:-1], Y)
            out_SgXY[queries, heads] = out_gSXY.transpose(1, 0, 2, 3)
            lse_SgX[queries, heads] = lse_gP.reshape(q_gSXK.shape[:-1]).transpose(1, 0, 2)
    return out_SgXY, lse_SgX


def _attend_block(
    q_gPK: np.ndarray,
    k_gTK: np.ndarray,
    v_gTY: np.ndarray,
    start_S: np.ndarray,
    stop_S: np.ndarray,
    cap: float | None,
    bias: PositionBias | None,
    shifted: bool,
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Attention of a block of scaled queries and whether its scores had to be shifted, which those
    of the same heads' next block will then be from the start: ``(out_gPY, lse_gP, shifted)``."""
    block = q_gPK, k_gTK, v_gTY, start_S, stop_S, cap, bias
    if not shifted:
        with np.errstate(over="ignore", invalid="ignore"):
            sum_gPY, total_gP1, peak_gP1 = _sums(*block, shifted=False)
        sees_P1 = np.repeat(stop_S > start_S, q_gPK.shape[1] // len(stop_S))[:, np.newaxis]
        good_gP1 = (total_gP1 > SMALLEST_SUM) & (total_gP1 < LARGEST_SUM)
        shifted = not (good_gP1 | ~sees_P1).all()
    if shifted:
        sum_gPY, total_gP1, peak_gP1 = _sums(*block, shifted=True)
    sum_gPY /= np.where(total_gP1 > 0, total_gP1, 1)
    return sum_gPY, (peak_gP1 + _log(total_gP1))[..., 0], shifted


def _sums(
    q_gPK: np.ndarray,
    k_gTK: np.ndarray,
    v_gTY: np.ndarray,
    start_S: np.ndarray,
    stop_S: np.ndarray,
    cap: float | None,
    bias: PositionBias | None,
    shifted: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums over the keys that each query sees of ``weight * value`` and of ``weight``, where a
    weight is the exponential of a score less the query's peak, or 0 if not `shifted`:
    ``(sum_gPY, total_gP1, peak_gP1)``."""
    (g, P, _), Y = q_gPK.shape, v_gTY.shape[2]
    X, dtype = P // len(stop_S), q_gPK.dtype
    sum_gPY, total_gP1 = np.zeros((g, P, Y), dtype), np.zeros((g, P, 1), dtype)
    peak_gP1 = np.full((g, P, 1), np.finfo(dtype).min if shifted else 0, dtype)
    for start, stop in _key_blocks(start_S[0], stop_S[0], stop_S[-1]):
        first, last = np.searchsorted(stop_S, start, side="right"), np.searchsorted(start_S, stop)
        if first >= last:
            continue  # the queries see none of these keys
        rows = slice(first * X, last * X)
        weights_gPT = q_gPK[:, rows] @ k_gTK[:, start:stop].transpose(0, 2, 1)
        if cap is not None:
            softcap(weights_gPT, cap)
        if bias is not None:
            bias.add(weights_gPT, slice(first, last), slice(start, stop))
        _hide(weights_gPT, start, stop, start_S[first:last], stop_S[first:last])
        if shifted:
            before_gP1 = peak_gP1[:, rows].copy()
            np.maximum(before_gP1, weights_gPT.max(-1, keepdims=True), out=peak_gP1[:, rows])
            kept_gP1 = np.exp(before_gP1 - peak_gP1[:, rows])
            sum_gPY[:, rows] *= kept_gP1
            total_gP1[:, rows] *= kept_gP1
            weights_gPT -= peak_gP1[:, rows]
        np.exp(weights_gPT, out=weights_gPT)
        total_gP1[:, rows] += weights_gPT @ np.ones((stop - start, 1), dtype)
        sum_gPY[:, rows] += weights_gPT @ v_gTY[:, start:stop]
    return sum_gPY, total_gP1, peak_gP1


def _key_blocks(first: int, diagonal: int, end: int) -> Iterator[tuple[int, int]]:
    """Where the blocks of the keys from `first` to `end` begin and end: long ones up to `diagonal`,
    the first key that some query must not see yet, and short ones from there."""
    starts = [*range(first, diagonal, KEY_BLOCK), *range(diagonal, end, DIAGONAL_BLOCK)]
    return pairwise([*starts, end])


def _hide(
    scores_gPT: np.ndarray, start: int, stop: int, start_S: np.ndarray, stop_S: np.ndarray
) -> None:
    """Sets the scores of keys `start` to `stop` that lie before or behind what a query sees to
    -inf. Only the queries for which there are any are touched."""
    scores_gSXT = scores_gPT.reshape(len(scores_gPT), len(stop_S), -1, stop - start)
    key_T = np.arange(start, stop)
    late = slice(0, np.searchsorted(stop_S, stop))
    early = slice(np.searchsorted(start_S, start, side="right"), None)
    for queries, hidden_ST in (
        (late, key_T >= stop_S[late, np.newaxis]),
        (early, key_T < start_S[early, np.newaxis]),
    ):
        np.copyto(scores_gSXT[:, queries], -np.inf, where=hidden_ST[:, np.newaxis])


def _slices(length: int, step: int) -> list[slice]:
    """The indices below `length` in runs of `step`, at least 1."""
    step = max(1, step)
    return [slice(start, start + step) for start in range(0, length, step)]


def _log(total: np.ndarray) -> np.ndarray:
    """The logarithm of sums of weights, -inf for an empty one, without a warning."""
    return np.log(total, out=np.full_like(total, -np.inf), where=total > 0)
