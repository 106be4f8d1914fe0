"""Sampling: the next tokens, from logits that are sharded by vocabulary over the ranks.

No rank ever has the logits of the whole vocabulary. Each sends its best candidates, in one
all_gather:

- greedy: its largest logit.
- temperature alone: its largest ``logit / temperature + Gumbel noise``. The noise belongs to the
  token, so the largest value of all ranks is a sample of the whole softmax.
- top-k, top-p, min-p: its largest logits. They are enough if they decide which tokens the filters
  keep; otherwise every rank sends four times as many. Those kept then compete with their noise.

Every rank of a replica chooses the same token. In the first two cases all ranks compare the same
numbers, which the owner of each token computed. The filters take exponentials, of which the last
bit may differ between two machines; therefore rank 0 decides and broadcasts.

sample                   logits_Mv -> local_top_k_candidates -> one token for each row
local_top_k_candidates   scores_Mv -> the best of each row -> all_gather(tp) -> score_MC, id_MC
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mpishard.arithmetic.sampling import gumbel, logsumexp, num_kept, row_topk
from mpishard.communication.collectives import all_gather, broadcast
from mpishard.communication.mesh import Mesh
from mpishard.config.layout import block, block_sizes
from mpishard.engine.sampling_params import SamplingParams

# Candidates that each rank sends first if no top-k says how many are needed.
FIRST_CANDIDATES = 64
# In place of a token id where the logits are not finite.
NO_TOKEN = -1


@dataclass(frozen=True)
class SamplingRow:
    """How to choose the token of one row of logits (one row of vLLM's SamplingMetadata). The random
    numbers depend on `request`, `position` and `choice`, the number of this answer among several of
    the request. `process` changes the logits of this rank, (v,), beforehand."""

    params: SamplingParams
    request: int
    position: int
    choice: int = 0
    process: Callable[[np.ndarray], np.ndarray] | None = None


def sample(logits_Mv: np.ndarray, rows: list[SamplingRow], vocab: int, mesh: Mesh) -> list[int]:
    """One token for each of the M rows, the same on every rank of the replica. Among equal scores
    the lowest id wins. A row whose largest logit is infinite or not a number gets `NO_TOKEN`."""
    vocab_start = block(vocab, mesh.tp.size, mesh.tp.rank).start
    scores_Mv = _scores(_process(logits_Mv, rows), rows, vocab_start)
    if any(row.params.filtered for row in rows):
        widest = max(block_sizes(vocab, mesh.tp.size))
        tokens_M = _sample_rows_filtered(scores_Mv, rows, vocab_start, widest, mesh)
        return [int(token) for token in broadcast(tokens_M, mesh.tp)]
    score_MC, id_MC = local_top_k_candidates(scores_Mv, 1, vocab_start, mesh)
    best_M = score_MC.argmax(axis=1)  # the first maximum is the lowest rank's: the lowest id
    return [
        int(id_C[best]) if np.isfinite(score_C[best]) else NO_TOKEN
        for score_C, id_C, best in zip(score_MC, id_MC, best_M, strict=True)
    ]


def local_top_k_candidates(
    scores_Mv: np.ndarray, count: int, vocab_start: int, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` best candidates of every rank, on every rank: their scores and their token ids,
    two (M, tp * count) arrays. They are in order of rank, then of descending score, then of id.

    A rank with fewer than `count` tokens sends -inf and an id beyond any vocabulary for the rest.
    """
    best_MC, column_MC = row_topk(scores_Mv, count)
    pair = np.dtype([("score", scores_Mv.dtype), ("id", np.int64)])
    pair_MC = np.empty(best_MC.shape, pair)
    pair_MC["score"] = best_MC
    is_token_MC = column_MC < scores_Mv.shape[1]
    pair_MC["id"] = np.where(is_token_MC, column_MC + vocab_start, np.iinfo(np.int64).max)
    packed = pair_MC.view(np.uint8)  # one message for scores and ids: (M, count * bytes of a pair)
    pairs_of_all = all_gather(packed, mesh.tp, axis=1).view(pair)
    return pairs_of_all["score"], pairs_of_all["id"]


def _process(logits_Mv: np.ndarray, rows: list[SamplingRow]) -> np.ndarray:
    """The logits after bias and penalties; the same array where no row has any."""
    if all(row.process is None for row in rows):
        return logits_Mv
    processed_Mv = logits_Mv.copy()
    for logits_v, row in zip(processed_Mv, rows, strict=True):
        if row.process is not None:
            logits_v[:] = row.process(logits_v)
    return processed_Mv


def _scores(logits_Mv: np.ndarray, rows: list[SamplingRow], vocab_start: int) -> np.ndarray:
    """What tokens are ranked by. A greedy row keeps its logits. A sampled row has logits over
    temperature, with noise unless a filter comes first."""
    if all(row.params.greedy for row in rows):
        return logits_Mv
    scores_Mv = logits_Mv.astype(np.float64)
    id_v = np.arange(vocab_start, vocab_start + logits_Mv.shape[1])
    for scores_v, row in zip(scores_Mv, rows, strict=True):
        if not row.params.greedy:
            scores_v /= row.params.temperature
            if not row.params.filtered:
                scores_v += _noise(row, id_v)
    return scores_Mv


def _sample_rows_filtered(
    scores_Mv: np.ndarray, rows: list[SamplingRow], vocab_start: int, widest: int, mesh: Mesh
) -> np.ndarray:
    """The tokens of rows of which at least one has filters: (M,). Every rank sends candidates,
    four times as many each time, until they decide every row. `widest` is the largest number of
    tokens that a rank has, so that many candidates are all there are."""
    log_total_M = np.zeros(len(rows))
    if any(row.params.needs_total for row in rows):
        log_total_RM = all_gather(logsumexp(scores_Mv)[np.newaxis], mesh.tp)
        log_total_M = logsumexp(log_total_RM.T)
    top_ks = [row.params.top_k or FIRST_CANDIDATES for row in rows if row.params.filtered]
    count = min(max(top_ks), widest)
    while True:
        score_MC, id_MC = local_top_k_candidates(scores_Mv, count, vocab_start, mesh)
        complete = count >= widest
        tokens = [
            _sample_filtered(score_C, id_C, float(log_total), row, count, complete)
            for score_C, id_C, log_total, row in zip(
                score_MC, id_MC, log_total_M, rows, strict=True
            )
        ]
        if None not in tokens:
            return np.array(tokens, np.int64)
        count = min(4 * count, widest)


def _sample_filtered(
    score_C: np.ndarray,
    id_C: np.ndarray,
    log_total: float,
    row: SamplingRow,
    count: int,
    complete: bool,
) -> int | None:
    """The token of one row from the `count` best candidates of every rank, or None if the filters
    may keep a token that was not sent. `complete` says that all were sent.

    A token that a rank did not send ranks after the last one that it sent. So the ranking of all
    candidates is certain up to the first of these last ones.
    """
    if not np.isfinite(score_C.max()):
        return NO_TOKEN
    ranking = np.lexsort((id_C, -score_C))
    if not complete:
        is_last_sent = (ranking + 1) % count == 0
        ranking = ranking[: int(np.flatnonzero(is_last_sent)[0]) + 1]
    params = row.params
    if not params.filtered:
        return int(id_C[ranking[0]])
    scores, ids = score_C[ranking], id_C[ranking]
    kept = num_kept(scores, log_total, params.top_k, params.top_p, params.min_p, complete)
    if kept is None:
        return None
    return int(ids[np.argmax(scores[:kept] + _noise(row, ids[:kept]))])


def _noise(row: SamplingRow, ids: np.ndarray) -> np.ndarray:
    """The Gumbel noise of the tokens `ids` in a row."""
    return gumbel(row.params.seed, row.request, row.position, ids, row.choice)
