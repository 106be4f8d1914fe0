"""Choosing the next token: candidates, filters and reproducible random numbers.

Sampling is done by the Gumbel-max trick: the token with the largest ``logit / temperature + g``,
with independent Gumbel noise ``g`` for each token of the vocabulary, is a sample of the softmax
(Maddison et al. 2014, arXiv 1411.0030). The noise of a token depends on (seed, request, position,
token id) and, where a request has several answers, on the number of the answer. It depends on
nothing else, so that every rank can make it for its own part of the vocabulary and no layout, batch
or order of work changes a sample.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15


def row_topk(scores_Mv: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest keys of each row, largest first, ties by ascending column, and their
    columns: two (M, count) arrays. A row with fewer keys is filled up with -inf and the column
    one beyond the last. Of a row with keys that are not numbers, the first is one of them."""
    rows, columns = scores_Mv.shape
    best_MC = np.full((rows, count), -np.inf, scores_Mv.dtype)
    column_MC = np.full((rows, count), columns)
    taken = min(count, columns)
    if taken == 1:
        top = scores_Mv.argmax(axis=1)  # the first of equal keys
        best_MC[:, 0], column_MC[:, 0] = scores_Mv[np.arange(rows), top], top
    elif taken:
        for row, keys_v in enumerate(scores_Mv):
            threshold = np.partition(keys_v, columns - taken)[columns - taken]
            above = np.flatnonzero(keys_v > threshold)
            level = np.flatnonzero(keys_v == threshold)[: taken - len(above)]
            found = np.concatenate([above, level])
            if len(found) < taken:  # nothing is above or at what is not a number
                column_MC[row] = np.isnan(keys_v).argmax()
                best_MC[row] = np.nan
                continue
            found = found[np.lexsort((found, -keys_v[found]))]
            best_MC[row, :taken], column_MC[row, :taken] = keys_v[found], found
    return best_MC, column_MC


def gumbel(seed: int, request: int, position: int, ids: np.ndarray, choice: int = 0) -> np.ndarray:
    """Gumbel noise for the tokens `ids`, in float64.

    Tokens are hashed with SplitMix64 (Steele et al. 2014) from a key that NumPy's SeedSequence
    makes of the numbers. `choice` tells several answers of one request apart.
    """
    numbers = [seed, request, position, *([choice] if choice else [])]
    key = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64
        z = key + (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    uniform = ((z >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # never 0, never 1
    return -np.log(-np.log(uniform))


def logsumexp(scores_Mv: np.ndarray) -> np.ndarray:
    """``log(sum(exp(scores)))`` of each row, -inf for a row without keys: (M,)."""
    peak_M1 = scores_Mv.max(axis=1, keepdims=True, initial=-np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        total_M = np.exp(scores_Mv - np.where(np.isfinite(peak_M1), peak_M1, 0)).sum(axis=1)
        return peak_M1[:, 0] + np.log(total_M)


def num_kept(
    scores: np.ndarray, log_total: float, top_k: int, top_p: float, min_p: float, complete: bool
) -> int | None:
    """How many of the largest `scores` (sorted, logits over temperature) the filters keep, or None
    if that depends on keys beyond these; with `complete` there are none beyond.

    The filters act one after the other, as in transformers: the `top_k` largest (0: all); the
    smallest number of those whose probabilities reach `top_p`; those whose probability is at least
    `min_p` times the largest. `log_total` is the log-sum-exp of the whole vocabulary.
    """
    limit, decided = len(scores), complete
    if 0 < top_k <= limit:
        limit, decided = top_k, True
        log_total = logsumexp(scores[np.newaxis, :limit])[0]
    if top_p < 1:
        reached = np.flatnonzero(np.cumsum(np.exp(scores[:limit] - log_total)) >= top_p)
        if len(reached):
            limit, decided = int(reached[0]) + 1, True
    if min_p > 0:
        improbable = np.flatnonzero(scores[:limit] < scores[0] + np.log(min_p))
        if len(improbable):
            limit, decided = int(improbable[0]), True
    return limit if decided else None
