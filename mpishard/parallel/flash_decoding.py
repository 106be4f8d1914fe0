"""Flash decoding: attention over a cache whose positions are sharded over ranks (vLLM: decode
context parallelism).

The ranks of the ``kv`` group hold the same key/value heads of a replica: the ``cp`` ranks of
context parallelism, times the tensor-parallel ranks that share a head. Each has its own query
heads, its own new tokens and its own part of the cache. All attend for all, and merge:

gather the queries            q_NhK -> all_gather(kv) -> q_WHK
attend to this rank's keys    -> partial out_WHY and its log-sum-exp, lse_WH
merge, in one of three forms  -> out_NhY and lse_Nh, of this rank's tokens and heads

merge_ag_rs  all_gather(kv) of lse_WH, each rank scales its partial, reduce_scatter(kv): as in NxD
             Inference (which gathers maximum and denominator) and vLLM's cp_lse_ag_out_rs
merge_a2a    partials and their log-sum-exps in one all_to_all(kv) to the rank whose queries they
             answer, which merges: vLLM's dcp_a2a_lse_reduce, TensorRT-LLM's Helix (arXiv
             2507.07120)
merge_ar     all_reduce(kv) of the maximum, then of numerator and denominator: vLLM's
             cp_lse_ag_out_ar, tree attention (Shyam et al. 2024, arXiv 2408.04093)

In this module, H are the query heads of the ``kv`` group, W the tokens of extended sequences on all
its ranks, and N those on this rank. What is sent does not depend on the length of the context. A
rank that keeps no position yet has log-sum-exp -inf and contributes exactly nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np

from mpishard.arithmetic.attention import AttentionSpec, attend, merge_weights
from mpishard.communication.collectives import (
    MAX,
    all_gather,
    all_reduce,
    all_to_all,
    reduce_scatter,
)
from mpishard.communication.mesh import Mesh
from mpishard.sequences.step import Step


@dataclass(frozen=True)
class PairLayout:
    """How the (token, head) pairs of a ``kv`` group are laid out for its collectives: one block for
    each rank, the `tokens` of each cp rank times the `heads` of each tp rank.

    >>> pairs = PairLayout(tokens=(2, 1), heads=(1, 1))
    >>> x_WHK = np.array([[[0], [1]], [[10], [11]], [[20], [21]]])
    >>> pairs.flatten(x_WHK).T  # rank by rank: two tokens of head 0, the same of head 1, ...
    array([[ 0, 10,  1, 11, 20, 21]])
    >>> (pairs.unflatten(pairs.flatten(x_WHK)) == x_WHK).all()
    np.True_
    """

    tokens: tuple[int, ...]
    heads: tuple[int, ...]

    @property
    def sizes(self) -> list[int]:
        """The number of pairs in each rank's block."""
        return [n * h for n, h in product(self.tokens, self.heads)]

    def flatten(self, x_WHK: np.ndarray) -> np.ndarray:
        """The blocks one after the other: (P, K)."""
        return np.concatenate(self._blocks(x_WHK))

    def local(self, rank: int, x_WHK: np.ndarray) -> np.ndarray:
        """The block of `rank`: (p, K)."""
        return self._blocks(x_WHK)[rank]

    def unflatten(self, rows_PK: np.ndarray) -> np.ndarray:
        """The inverse of `flatten`: (W, H, K)."""
        K, rows = rows_PK.shape[1], iter(np.split(rows_PK, np.cumsum(self.sizes)[:-1]))
        return np.concatenate(
            [
                np.concatenate([next(rows).reshape(n, h, K) for h in self.heads], axis=1)
                for n in self.tokens
            ]
        )

    def _blocks(self, x_WHK: np.ndarray) -> list[np.ndarray]:
        by_token = np.split(x_WHK, np.cumsum(self.tokens)[:-1])
        heads = np.cumsum(self.heads)[:-1]
        blocks = [x_NhK for x_NHK in by_token for x_NhK in np.split(x_NHK, heads, axis=1)]
        return [x_NhK.reshape(-1, x_WHK.shape[-1]) for x_NhK in blocks]


# (partial out_WHY, lse_WH, pairs, mesh) -> this rank's block of the merged output, (p, Y), and of
# its log-sum-exps, (p,)
Merge = Callable[[np.ndarray, np.ndarray, PairLayout, Mesh], tuple[np.ndarray, np.ndarray]]


def decode(
    q_NhK: np.ndarray,
    spec: AttentionSpec,
    layer: int,
    step: Step,
    mesh: Mesh,
    merge: Merge,
    out_NhY: np.ndarray,
    lse_Nh: np.ndarray,
) -> None:
    """Attention of the extended sequences' tokens, put in their places in `out_NhY` and `lse_Nh`.

    Their queries meet every rank's keys; keys and values stay where they are.
    """
    pairs = PairLayout(step.extend_counts, step.sequence_sharding.heads)
    own_N = step.extend_token_index
    q_pK = q_NhK[own_N].reshape(-1, q_NhK.shape[2])
    q_WHK = pairs.unflatten(all_gather(q_pK, mesh.kv, sizes=pairs.sizes))
    lse_WH = np.empty(q_WHK.shape[:2], q_WHK.dtype)
    partial_WHY = np.empty((*q_WHK.shape[:2], out_NhY.shape[2]), q_WHK.dtype)
    for segment, (index_S, q_pos_S) in zip(step.extends, step.extend_global_index, strict=True):
        keys_and_values = segment.cache.read(layer)  # t of the sequence's T positions
        partial_WHY[index_S], lse_WH[index_S] = attend(
            q_WHK[index_S], q_pos_S, *keys_and_values, spec.of_group()
        )
    out_pY, lse_p = merge(partial_WHY, lse_WH, pairs, mesh)
    out_NhY[own_N] = out_pY.reshape(len(own_N), *out_NhY.shape[1:])
    lse_Nh[own_N] = lse_p.reshape(len(own_N), lse_Nh.shape[1])


def merge_ag_rs(
    partial_WHY: np.ndarray, lse_WH: np.ndarray, pairs: PairLayout, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Each rank scales its partial output by its weight in the whole; the sum of all is
    scattered."""
    lse_RWH = all_gather(lse_WH[np.newaxis], mesh.kv)
    weight_RWH, lse_WH = merge_weights(lse_RWH)
    partial_WHY = partial_WHY * weight_RWH[mesh.kv.rank][..., np.newaxis]
    out_pY = reduce_scatter(pairs.flatten(partial_WHY), mesh.kv, sizes=pairs.sizes)
    return out_pY, pairs.local(mesh.kv.rank, lse_WH[..., np.newaxis])


def merge_a2a(
    partial_WHY: np.ndarray, lse_WH: np.ndarray, pairs: PairLayout, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Each rank's partial outputs and their log-sum-exps go to the rank whose queries they
    answer."""
    send_PX = pairs.flatten(np.concatenate([partial_WHY, lse_WH[..., np.newaxis]], axis=2))
    own, ranks = pairs.sizes[mesh.kv.rank], mesh.kv.size
    partial_RpX = all_to_all(send_PX, mesh.kv, pairs.sizes, [own] * ranks)
    partial_RpX = partial_RpX.reshape(ranks, own, send_PX.shape[1])  # X: Y, then 1
    weight_Rp, lse_p = merge_weights(partial_RpX[..., -1])
    return (partial_RpX[..., :-1] * weight_Rp[..., np.newaxis]).sum(axis=0), lse_p


def merge_ar(
    partial_WHY: np.ndarray, lse_WH: np.ndarray, pairs: PairLayout, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Every rank has the whole merged output, and takes its own block of it."""
    peak_WH = all_reduce(lse_WH, mesh.kv, MAX)  # finite: every token sees a key
    part_WH1 = np.exp(lse_WH - peak_WH)[..., np.newaxis]
    partial_WHX = np.concatenate([partial_WHY * part_WH1, part_WH1], axis=2)  # X: Y, then 1
    total_WHX = all_reduce(partial_WHX, mesh.kv)
    out_WHY, total_WH1 = total_WHX[..., :-1] / total_WHX[..., -1:], total_WHX[..., -1:]
    lse_WH1 = peak_WH[..., np.newaxis] + np.log(total_WH1)
    return pairs.local(mesh.kv.rank, out_WHY), pairs.local(mesh.kv.rank, lse_WH1)


MERGES: dict[str, Merge] = {
    "reduce-scatter": merge_ag_rs,
    "all-to-all": merge_a2a,
    "all-reduce": merge_ar,
}
