"""Log-probabilities of chosen and of likely tokens, from logits that are sharded by vocabulary.

They are those of the model, ahead of bias, penalties and temperature, as vLLM's and OpenAI's. They
need the sum of exponentials over the whole vocabulary. The candidates of all ranks have its largest
logit, relative to which each rank sums its own; so one small all_reduce makes the sum whole.

step_logprobs     the rows that ask for them -> sampled_logprobs -> gather_sequence(cp)
sampled_logprobs  logits_Mv, tokens -> local_top_k_candidates, partial_M2 -> all_reduce(tp)

A step in which no sequence asks for them sends nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpishard.communication.collectives import all_reduce
from mpishard.communication.mesh import Mesh
from mpishard.config.layout import block
from mpishard.engine.sampling import NO_TOKEN, SamplingRow, local_top_k_candidates
from mpishard.parallel import context


def step_logprobs(
    logits_Mv: np.ndarray,
    tokens_M: np.ndarray,
    rows: list[SamplingRow],
    owner_index: Sequence[np.ndarray],
    vocab: int,
    mesh: Mesh,
) -> dict[int, dict[int, float]]:
    """The log-probabilities by token id of each of the `rows` that asks for them, under the row's
    place; the same on all ranks of the replica. This cp rank has the logits and chosen tokens of
    some rows: `owner_index` has the places of each one's."""
    asked = {place: row.params.logprobs for place, row in enumerate(rows)}
    counts = {place: count for place, count in asked.items() if count is not None}
    if not counts:
        return {}
    places, most = np.array(list(counts)), max(counts.values())
    wanted = [np.isin(index, places) for index in owner_index]
    mine_M = wanted[mesh.cp.rank]
    scored_MX = sampled_logprobs(logits_Mv[mine_M], tokens_M[mine_M], most, vocab, mesh)
    index_of_wanted = [
        np.searchsorted(places, index[mask])
        for index, mask in zip(owner_index, wanted, strict=True)
    ]
    scored_MX = context.gather_sequence(scored_MX, index_of_wanted, mesh)
    return {
        place: _by_id(scored_X.tolist(), most, counts[place])
        for place, scored_X in zip(counts, scored_MX, strict=True)
    }


def sampled_logprobs(
    logits_Mv: np.ndarray, tokens_M: np.ndarray, count: int, vocab: int, mesh: Mesh
) -> np.ndarray:
    """Of each of the M tokens its id and its log-probability in the softmax of its row; then the
    ids of the `count` likeliest tokens of the row, `NO_TOKEN` where the vocabulary has fewer; then
    their log-probabilities: (M, 2 + 2 * count), in float64."""
    vocab_start = block(vocab, mesh.tp.size, mesh.tp.rank).start
    score_MC, id_MC = local_top_k_candidates(logits_Mv, max(count, 1), vocab_start, mesh)
    order_MC = np.lexsort((id_MC, -score_MC))
    top_MC = np.take_along_axis(score_MC, order_MC, 1).astype(np.float64)
    id_MC = np.take_along_axis(id_MC, order_MC, 1)[:, :count]
    peak_M1, top_MC = top_MC[:, :1], top_MC[:, :count]

    column_M = tokens_M - vocab_start
    here_M = (0 <= column_M) & (column_M < logits_Mv.shape[1])
    partial_M2 = np.zeros((len(tokens_M), 2))  # the sum of exponentials, the token's own logit
    partial_M2[:, 0] = np.exp(logits_Mv - peak_M1).sum(axis=1)
    partial_M2[here_M, 1] = logits_Mv[here_M, column_M[here_M]]
    sum_M2 = all_reduce(partial_M2, mesh.tp)
    log_total_M1 = peak_M1 + np.log(sum_M2[:, :1])

    token_M1, logit_M1 = tokens_M[:, np.newaxis], sum_M2[:, 1:]
    id_MC = np.where(id_MC < vocab, id_MC, NO_TOKEN)
    return np.concatenate([token_M1, logit_M1 - log_total_M1, id_MC, top_MC - log_total_M1], axis=1)


def _by_id(scored: list[float], most: int, count: int) -> dict[int, float]:
    """The log-probabilities of the `count` likeliest tokens and, unless it is one of them, of the
    chosen one, from a row of `sampled_logprobs` with the `most` likeliest."""
    token, logprob, *top = scored
    pairs = zip(top[:count], top[most : most + count], strict=True)
    by_id = {int(one): value for one, value in pairs if one != NO_TOKEN}
    return {**by_id, int(token): logprob} if int(token) not in by_id else by_id
