"""Choosing the next tokens from logits that are divided over ranks.

No rank ever sees the whole vocabulary. Each sends its best few candidates, in one all_gather:

- greedy: its largest logit.
- temperature alone: its largest ``logit / temperature + Gumbel noise``; the noise belongs to the
  token, so the largest of all ranks' is a sample of the whole softmax.
- top-k, top-p, min-p: its largest logits, enough of them to know for certain which tokens the
  filters keep (see `_sample_filtered`), which then compete with their noise.

Every rank of a replica takes the same token. For the first two that is so because all compare the
same numbers, which the owner of each token made. The filters take exponentials, and two machines
may differ in the last bit of those; then rank 0 decides and broadcasts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpishard.arithmetic.sampling import gumbel, logsumexp, num_kept
from mpishard.communication.collectives import all_gather, broadcast
from mpishard.communication.mesh import Mesh
from mpishard.config.layout import block, block_sizes
from mpishard.errors import UserError
from mpishard.parallel.tensor import local_top_k_candidates

# Candidates that each rank sends at first when the filters do not say how many are needed.
FIRST_CANDIDATES = 64
# Instead of a token id, where there are no logits to choose by.
NO_TOKEN = -1


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen. `temperature` 0 is greedy, and then nothing else has an
    effect; `top_k` 0, `top_p` 1 and `min_p` 0 filter nothing.

    Raises UserError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        limits = [
            ("temperature", self.temperature, self._can_divide(), "0 (greedy) or at least 1e-6"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (no filter) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1"),
            ("seed", self.seed, 0 <= self.seed < 2**64, "0 to 2**64 - 1"),
        ]
        for name, value, valid, range_ in limits:
            if not valid:
                raise UserError(f"{name} {value} is out of range: it must be {range_}")

    def _can_divide(self) -> bool:
        """Whether logits over the temperature stay finite."""
        return self.temperature == 0 or 1e-6 <= self.temperature < np.inf

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    @property
    def filtered(self) -> bool:
        """Whether some tokens are excluded before one is drawn."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def needs_total(self) -> bool:
        """Whether the filters depend on the probabilities of the whole vocabulary."""
        return not self.greedy and self.top_k == 0 and self.top_p < 1


@dataclass(frozen=True)
class SamplingRow:
    """One token to choose: how, and the request and position that its random numbers belong to."""

    sampling: Sampling
    request: int
    position: int


def sample(logits_Mv: np.ndarray, rows: list[SamplingRow], vocab: int, mesh: Mesh) -> list[int]:
    """The token chosen for each of the M draws, the same on every rank of the replica. Equal keys
    go to the lowest id; where the largest is infinite or not a number there is `NO_TOKEN`."""
    vocab_start = block(vocab, mesh.tp.size, mesh.tp.rank).start
    scores_Mv = _scores(logits_Mv, rows, vocab_start)
    if any(row.sampling.filtered for row in rows):
        widest = max(block_sizes(vocab, mesh.tp.size))
        tokens_M = _sample_rows_filtered(scores_Mv, rows, vocab_start, widest, mesh)
        return [int(token) for token in broadcast(tokens_M, mesh.tp)]
    score_MC, id_MC = local_top_k_candidates(scores_Mv, 1, vocab_start, mesh)
    best_M = score_MC.argmax(axis=1)  # the first of equal keys is on the lowest rank: the lowest id
    return [
        int(ids[best]) if np.isfinite(scores[best]) else NO_TOKEN
        for scores, ids, best in zip(score_MC, id_MC, best_M, strict=True)
    ]


def _scores(logits_Mv: np.ndarray, rows: list[SamplingRow], vocab_start: int) -> np.ndarray:
    """What candidates compete by: logits where greedy; logits over temperature, with noise unless
    filters come first, where sampled."""
    if all(row.sampling.greedy for row in rows):
        return logits_Mv
    scores_Mv = logits_Mv.astype(np.float64)
    ids_v = np.arange(vocab_start, vocab_start + logits_Mv.shape[1])
    for scores_v, row in zip(scores_Mv, rows, strict=True):
        if not row.sampling.greedy:
            scores_v /= row.sampling.temperature
            if not row.sampling.filtered:
                scores_v += gumbel(row.sampling.seed, row.request, row.position, ids_v)
    return scores_Mv


def _sample_rows_filtered(
    scores_Mv: np.ndarray, rows: list[SamplingRow], vocab_start: int, widest: int, mesh: Mesh
) -> np.ndarray:
    """The tokens of draws of which some have filters: the ranks, of which the `widest` holds so
    many tokens, send ever more candidates until there are enough for every draw."""
    log_total_M = np.zeros(len(rows))
    if any(row.sampling.needs_total for row in rows):
        log_total_RM = all_gather(logsumexp(scores_Mv)[np.newaxis], mesh.tp)
        log_total_M = logsumexp(log_total_RM.T)
    asked = [row.sampling.top_k or FIRST_CANDIDATES for row in rows if row.sampling.filtered]
    count = min(max(asked), widest)
    while True:
        score_MC, id_MC = local_top_k_candidates(scores_Mv, count, vocab_start, mesh)
        tokens = [
            _sample_filtered(score_C, id_C, float(log_total), row, count, complete=count >= widest)
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
    """The token of one draw from the `count` best candidates of every rank, or None if the
    filters may keep one that was not sent.

    Whatever a rank did not send comes after the last that it sent. So in the order of all
    candidates, everything up to the first such last one is certain.
    """
    if not np.isfinite(score_C.max()):
        return NO_TOKEN
    order = np.lexsort((id_C, -score_C))
    if not complete:
        last_sent = (order + 1) % count == 0
        order = order[: int(np.flatnonzero(last_sent)[0]) + 1]
    how = row.sampling
    if not how.filtered:
        return int(id_C[order[0]])
    scores = score_C[order]
    number = num_kept(scores, log_total, how.top_k, how.top_p, how.min_p, complete)
    if number is None:
        return None
    ids = id_C[order[:number]]
    noise = gumbel(how.seed, row.request, row.position, ids)
    return int(ids[np.argmax(scores[:number] + noise)])
