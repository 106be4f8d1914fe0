"""Flash decoding: attention over a cache whose positions are divided over ranks.

The ranks of the ``kv`` group hold the same key/value heads of a replica: the ``cp`` ranks of
context parallelism, times the ``G`` tensor-parallel ranks that share a head. Each has its own query
heads, its own new tokens and its own part of the cache. All attend for all, and merge:

gather the queries            q_NhK -> all_gather(kv) -> q_WHK
attend to this rank's keys    -> partial out_WHV and its log-sum-exp, lse_WH
merge, in one of three forms  -> out_NhV and lse_Nh, of this rank's tokens and heads

by_reduce_scatter   all_gather(kv) of lse_WH, each scales its partial, reduce_scatter(kv): as in
                    NxD Inference (which gathers maximum and denominator) and vLLM's decode context
                    parallelism
by_all_to_all       partials and their log-sum-exps to whose queries they answer, in one all_to_all;
                    the owner merges: vLLM's second form, TensorRT-LLM's Helix (arXiv 2507.07120)
by_all_reduce       all_reduce(kv) of the maximum, then of numerator and denominator: tree attention
                    (Shyam et al. 2024, arXiv 2408.04093)

Here H are the query heads of the ``kv`` group and W the tokens of all its ranks. What is sent does
not depend on the length of the context. A rank that keeps no position yet has log-sum-exp -inf and
contributes exactly nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np

from mpishard.arithmetic.attention import attend, merge_weights
from mpishard.communication.collectives import (
    MAX,
    all_gather,
    all_reduce,
    all_to_all,
    reduce_scatter,
)
from mpishard.communication.mesh import Mesh
from mpishard.parallel.qkv import QKV
from mpishard.sequences.step import Step


@dataclass(frozen=True)
class PairLayout:
    """The (token, head) pairs of a ``kv`` group as one block for each rank: `tokens` of each cp
    rank times `qkv` of each sharer, in the order of the ranks."""

    tokens: tuple[int, ...]
    qkv: tuple[int, ...]

    @property
    def sizes(self) -> list[int]:
        """The number of pairs in each rank's block."""
        return [n * h for n, h in product(self.tokens, self.qkv)]

    def flatten(self, x_WHK: np.ndarray) -> np.ndarray:
        """The blocks one after the other: (pairs, K)."""
        return np.concatenate(self._each(x_WHK))

    def local(self, rank: int, x_WHK: np.ndarray) -> np.ndarray:
        """The block of `rank`: (pairs, K)."""
        return self._each(x_WHK)[rank]

    def _each(self, x_WHK: np.ndarray) -> list[np.ndarray]:
        by_token = np.split(x_WHK, np.cumsum(self.tokens)[:-1])
        qkv = np.cumsum(self.qkv)[:-1]
        pairs = [x_nhK for x_nHK in by_token for x_nhK in np.split(x_nHK, qkv, axis=1)]
        return [x_nhK.reshape(-1, x_WHK.shape[-1]) for x_nhK in pairs]

    def unflatten(self, rows_PK: np.ndarray) -> np.ndarray:
        """The inverse of `flatten`: (W, H, K)."""
        K, rows = rows_PK.shape[1], iter(np.split(rows_PK, np.cumsum(self.sizes)[:-1]))
        return np.concatenate(
            [
                np.concatenate([next(rows).reshape(n, h, K) for h in self.qkv], axis=1)
                for n in self.tokens
            ]
        )


# (partial out_WHV, lse_WH, blocks, mesh) -> this rank's block of the merged output, (pairs, V), and
# of its log-sum-exps, (pairs,)
Merge = Callable[[np.ndarray, np.ndarray, PairLayout, Mesh], tuple[np.ndarray, np.ndarray]]


def decode(
    qkv: QKV, step: Step, mesh: Mesh, merge: Merge, out_NhV: np.ndarray, lse_Nh: np.ndarray
) -> None:
    """Attention of the tokens of the sequences that go on in this step, put in their places in
    `out_NhV` and `lse_Nh`."""
    pairs = PairLayout(step.extend_counts, step.sequence_sharding.heads)
    here_n = step.extend_token_index
    q_nhK = qkv.q_NhK[here_n]
    rows_PK = all_gather(q_nhK.reshape(-1, q_nhK.shape[-1]), mesh.kv, sizes=pairs.sizes)
    q_WHK = pairs.unflatten(rows_PK)
    lse_WH = np.empty(q_WHK.shape[:2], q_WHK.dtype)
    partial_WHV = np.empty((*q_WHK.shape[:2], out_NhV.shape[2]), q_WHK.dtype)
    for segment, (place_S, at_S) in zip(step.extends, step.extend_global_index, strict=True):
        keys = segment.cache.read(qkv.layer)
        partial_WHV[place_S], lse_WH[place_S] = attend(
            q_WHK[place_S], at_S, *keys, qkv.scale, qkv.window
        )
    out_PV, lse_P = merge(partial_WHV, lse_WH, pairs, mesh)
    out_NhV[here_n] = out_PV.reshape(*q_nhK.shape[:2], out_NhV.shape[2])
    lse_Nh[here_n] = lse_P.reshape(q_nhK.shape[:2])


def merge_ag_rs(
    partial_WHV: np.ndarray, lse_WH: np.ndarray, pairs: PairLayout, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Each rank scales its own partial output by its share of the whole, and the sum of all is
    scattered."""
    lse_RWH = all_gather(lse_WH[np.newaxis], mesh.kv)
    share_RWH, lse_WH = merge_weights(lse_RWH)
    partial_WHV = partial_WHV * share_RWH[mesh.kv.rank][..., np.newaxis]
    out_PV = reduce_scatter(pairs.flatten(partial_WHV), mesh.kv, sizes=pairs.sizes)
    return out_PV, pairs.local(mesh.kv.rank, lse_WH[..., np.newaxis])


def merge_a2a(
    partial_WHV: np.ndarray, lse_WH: np.ndarray, pairs: PairLayout, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Each rank's partial outputs go, with their log-sum-exps, to the rank whose queries they
    answer."""
    send_Px = pairs.flatten(np.concatenate([partial_WHV, lse_WH[..., np.newaxis]], axis=2))
    mine, ranks = pairs.sizes[mesh.kv.rank], mesh.kv.size
    partial_RPx = all_to_all(send_Px, mesh.kv, pairs.sizes, [mine] * ranks)
    partial_RPx = partial_RPx.reshape(ranks, mine, send_Px.shape[1])
    share_RP, lse_P = merge_weights(partial_RPx[..., -1])
    return (partial_RPx[..., :-1] * share_RP[..., np.newaxis]).sum(axis=0), lse_P


def merge_ar(
    partial_WHV: np.ndarray, lse_WH: np.ndarray, pairs: PairLayout, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Every rank has the whole merged output, and takes its own block of it."""
    peak_WH = all_reduce(lse_WH, mesh.kv, MAX)  # finite: every token sees itself
    part_WH1 = np.exp(lse_WH - peak_WH)[..., np.newaxis]
    partial_WHx = np.concatenate([partial_WHV * part_WH1, part_WH1], axis=2)
    whole_WHx = all_reduce(partial_WHx, mesh.kv)
    out_WHV, total_WH1 = whole_WHx[..., :-1] / whole_WHx[..., -1:], whole_WHx[..., -1:]
    lse_WH1 = peak_WH[..., np.newaxis] + np.log(total_WH1)
    return pairs.local(mesh.kv.rank, out_WHV), pairs.local(mesh.kv.rank, lse_WH1)


DECODE_MERGES: dict[str, Merge] = {
    "reduce-scatter": merge_ag_rs,
    "all-to-all": merge_a2a,
    "all-reduce": merge_ar,
}
