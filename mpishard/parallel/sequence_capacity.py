"""A limit on the tokens of a sequence that an expert takes (Switch Transformers, arXiv 2101.03961).

Of the tokens of a sequence that choose an expert, it takes the first so many; later ones pass the
layer by in the residual stream. Which those are depends on all earlier tokens, wherever they were
routed: each rank needs the choices of all, one number for each token and expert of it:

keep_mask  ids_nA -> all_gather(tp) -> ids_NA -> all_gather(cp) -> ids_WA -> keep_nA

How many tokens chose each expert so far is kept in the sequence's cache, so that chunks of a prompt
and generated tokens count on. What is dropped depends on the sequence alone: not on the batch, the
layout or the chunks, as it does with `ExpertCapacity`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpishard.arithmetic.routing import position_in_expert
from mpishard.communication.collectives import all_gather
from mpishard.communication.mesh import Mesh
from mpishard.config.layout import block
from mpishard.parallel import context
from mpishard.sequences.step import Step


@dataclass(frozen=True)
class SequenceCapacity:
    """The capacity of each expert of an MoE layer, the `layer`-th that has experts."""

    max_tokens: int
    layer: int


def keep_mask(
    topk_ids_nA: np.ndarray, capacity: SequenceCapacity, step: Step, mesh: Mesh
) -> np.ndarray:
    """Which of the choices of this rank's tokens their experts take: (n, A), of type bool. The
    counts of the step's sequences are advanced."""
    tp, N = mesh.tp, len(step.ids_N)
    ids_NA = all_gather(topk_ids_nA, tp, sizes=step.tokens_by_tp_rank(tp.size))
    ids_WA = context.gather_sequence(ids_NA, step.global_index, mesh)  # all_gather(cp)
    keep_WA = np.empty(ids_WA.shape, bool)
    stop = 0
    for segment in step.segments:
        start, stop = stop, stop + sum(map(len, segment.positions_by_rank))
        ids_SA = ids_WA[start:stop]
        counts_E = segment.cache.expert_counts_LE[capacity.layer]
        place_SA = counts_E[ids_SA] + position_in_expert(ids_SA)
        keep_WA[start:stop] = place_SA < capacity.max_tokens
        counts_E += np.bincount(ids_SA.reshape(-1), minlength=len(counts_E))
    keep_NA = keep_WA[step.global_index[mesh.cp.rank]]
    return keep_NA[block(N, tp.size, tp.rank)]
