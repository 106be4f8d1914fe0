"""Choosing the next tokens from logits that are divided over ranks.

No rank ever sees the whole vocabulary. Each sends its best few candidates, in one all_gather:

- greedy: its largest logit.
- temperature alone: its largest ``logit / temperature + Gumbel noise``; the noise belongs to the
  token, so the largest of all ranks' is a sample of the whole softmax.
- top-k, top-p, min-p: its largest logits, enough of them to know for certain which tokens the
  filters keep (see `_pick`), which then compete with their noise.

Every rank of a replica takes the same token. For the first two that is so because all compare the
same numbers, which the owner of each token made. The filters take exponentials, and two machines
may differ in the last bit of those; then rank 0 decides and broadcasts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpishard.arithmetic.choice import gumbel, kept, log_sum_exp
from mpishard.communication.collectives import all_gather, broadcast
from mpishard.communication.mesh import Mesh
from mpishard.description.layout import block, block_sizes
from mpishard.errors import UserError
from mpishard.parallel.tensor import candidates

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
class Draw:
    """One token to choose: how, and the request and position that its random numbers belong to."""

    sampling: Sampling
    request: int
    position: int


def choose(logits_Mv: np.ndarray, draws: list[Draw], vocab: int, mesh: Mesh) -> list[int]:
    """The token chosen for each of the M draws, the same on every rank of the replica. Equal keys
    go to the lowest id; where the largest is infinite or not a number there is `NO_TOKEN`."""
    first_id = block(vocab, mesh.tp.size, mesh.tp.rank).start
    keys_Mv = _keys(logits_Mv, draws, first_id)
    if any(draw.sampling.filtered for draw in draws):
        widest = max(block_sizes(vocab, mesh.tp.size))
        tokens_M = _choose_filtered(keys_Mv, draws, first_id, widest, mesh)
        return [int(token) for token in broadcast(tokens_M, mesh.tp)]
    key_MC, id_MC = candidates(keys_Mv, 1, first_id, mesh)
    best_M = key_MC.argmax(axis=1)  # the first of equal keys is on the lowest rank: the lowest id
    return [
        int(ids[best]) if np.isfinite(keys[best]) else NO_TOKEN
        for keys, ids, best in zip(key_MC, id_MC, best_M, strict=True)
    ]


def _keys(logits_Mv: np.ndarray, draws: list[Draw], first_id: int) -> np.ndarray:
    """What candidates compete by: logits where greedy; logits over temperature, with noise unless
    filters come first, where sampled."""
    if all(draw.sampling.greedy for draw in draws):
        return logits_Mv
    keys_Mv = logits_Mv.astype(np.float64)
    ids_v = np.arange(first_id, first_id + logits_Mv.shape[1])
    for keys_v, draw in zip(keys_Mv, draws, strict=True):
        if not draw.sampling.greedy:
            keys_v /= draw.sampling.temperature
            if not draw.sampling.filtered:
                keys_v += gumbel(draw.sampling.seed, draw.request, draw.position, ids_v)
    return keys_Mv


def _choose_filtered(
    keys_Mv: np.ndarray, draws: list[Draw], first_id: int, widest: int, mesh: Mesh
) -> np.ndarray:
    """The tokens of draws of which some have filters: the ranks, of which the `widest` holds so
    many tokens, send ever more candidates until there are enough for every draw."""
    log_total_M = np.zeros(len(draws))
    if any(draw.sampling.needs_total for draw in draws):
        log_total_RM = all_gather(log_sum_exp(keys_Mv)[np.newaxis], mesh.tp)
        log_total_M = log_sum_exp(log_total_RM.T)
    asked = [draw.sampling.top_k or FIRST_CANDIDATES for draw in draws if draw.sampling.filtered]
    count = min(max(asked), widest)
    while True:
        key_MC, id_MC = candidates(keys_Mv, count, first_id, mesh)
        tokens = [
            _pick(key_C, id_C, float(log_total), draw, count, complete=count >= widest)
            for key_C, id_C, log_total, draw in zip(key_MC, id_MC, log_total_M, draws, strict=True)
        ]
        if None not in tokens:
            return np.array(tokens, np.int64)
        count = min(4 * count, widest)


def _pick(
    key_C: np.ndarray, id_C: np.ndarray, log_total: float, draw: Draw, count: int, complete: bool
) -> int | None:
    """The token of one draw from the `count` best candidates of every rank, or None if the
    filters may keep one that was not sent.

    Whatever a rank did not send comes after the last that it sent. So in the order of all
    candidates, everything up to the first such last one is certain.
    """
    if not np.isfinite(key_C.max()):
        return NO_TOKEN
    order = np.lexsort((id_C, -key_C))
    if not complete:
        last_sent = (order + 1) % count == 0
        order = order[: int(np.flatnonzero(last_sent)[0]) + 1]
    how = draw.sampling
    if not how.filtered:
        return int(id_C[order[0]])
    keys = key_C[order]
    number = kept(keys, log_total, how.top_k, how.top_p, how.min_p, complete)
    if number is None:
        return None
    ids = id_C[order[:number]]
    noise = gumbel(how.seed, draw.request, draw.position, ids)
    return int(ids[np.argmax(keys[:number] + noise)])
