"""Tensor parallelism (Megatron-LM: Shoeybi et al. 2019, arXiv 1909.08053).

Every rank of the ``tp`` group has the whole residual stream and a shard of every large weight: some
query heads with the key/value heads they need, a block of the feed-forward width, a block of the
vocabulary. The first product of a sub-layer is column-parallel: it reads the whole stream and
yields this rank's heads or columns. The second is row-parallel: it reads what this rank has, and
yields a partial sum of the whole stream, which an all_reduce completes.

embed         ids_N -> partial_ND -> all_reduce(tp) -> x_ND
attention     x_ND -> q_NhK, k_NgK, v_NgV -> out_NhV -> partial_ND -> all_reduce(tp) -> y_ND
feed_forward  x_ND -> hidden_Nf -> partial_ND -> all_reduce(tp) -> y_ND
pick          x_ND -> x_MD, the rows whose logits are wanted
deal, join    x_ND -> x_nD -> all_gather(tp) -> x_ND, around a mixture of experts
logits        x_MD -> logits_Mv

What becomes of queries, keys and values is said in `mpishard.parallel.qkv` and
`mpishard.parallel.attention`. Nothing here asks how many ranks there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpishard.arithmetic.gemm import (
    linear,
    linear_packed,
    pack_columns,
    unpack_columns,
    use_small_gemm,
)
from mpishard.arithmetic.ops import GLU
from mpishard.communication.collectives import all_gather, all_reduce
from mpishard.communication.mesh import Mesh
from mpishard.config.layout import block, block_sizes
from mpishard.parallel.qkv import MLA, Attention
from mpishard.sequences.step import Step


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward weights of one layer on this rank."""

    gate: np.ndarray  # (f, D)
    up: np.ndarray  # (f, D)
    down: np.ndarray  # (D, f)
    gate_bias: np.ndarray | None  # (f,)
    up_bias: np.ndarray | None  # (f,)
    down_bias: np.ndarray | None  # (D,)
    act_and_mul: GLU

    def partial(self, x_ND: np.ndarray) -> np.ndarray:
        """This rank's part of the network's output, the last bias left out: (N, D)."""
        if use_small_gemm(len(x_ND)):
            x_sDC = pack_columns(x_ND)
            gate_sfC = linear_packed(x_sDC, self.gate, self.gate_bias)
            up_sfC = linear_packed(x_sDC, self.up, self.up_bias)
            hidden_sfC = [*map(self.act_and_mul, gate_sfC, up_sfC)]
            return unpack_columns(linear_packed(hidden_sfC, self.down), len(x_ND))
        gate_Nf = linear(x_ND, self.gate, self.gate_bias)  # column-parallel: D is whole
        up_Nf = linear(x_ND, self.up, self.up_bias)
        return linear(self.act_and_mul(gate_Nf, up_Nf), self.down)  # row-parallel: f is summed away


def embed(ids_N: np.ndarray, embedding_vD: np.ndarray, vocab_start: int, mesh: Mesh) -> np.ndarray:
    """The rows of the whole embedding for `ids_N`: (N, D)."""
    partial_ND = partial_embedding(ids_N, embedding_vD, vocab_start)
    return all_reduce(partial_ND, mesh.tp)


def attention(
    x_ND: np.ndarray,
    w: Attention | MLA,
    layer: int,
    step: Step,
    rope: tuple[np.ndarray, np.ndarray],
    mesh: Mesh,
) -> np.ndarray:
    """Causal self-attention of the step's tokens over their sequences: (N, D). `rope` holds the
    rotary cosines and sines of the tokens."""
    heads = w.project_qkv(x_ND, layer, rope, mesh)
    out_Nx = w.merge_heads(*w.attend(heads, step, mesh))  # x: this rank's h heads, V of each
    partial_ND = linear(out_Nx, w.o)  # row-parallel: h is summed away
    y_ND = all_reduce(partial_ND, mesh.tp)
    return add_bias(y_ND, w.o_bias)


def feed_forward(x_ND: np.ndarray, w: FeedForward, step: Step, mesh: Mesh) -> np.ndarray:
    """The gated feed-forward network (Shazeer 2020, arXiv 2002.05202): (N, D)."""
    y_ND = all_reduce(w.partial(x_ND), mesh.tp)
    return add_bias(y_ND, w.down_bias)


def scatter_tokens(x_ND: np.ndarray, mesh: Mesh) -> np.ndarray:
    """This rank's block of the tokens that every rank has: (n, D)."""
    return x_ND[block(len(x_ND), mesh.tp.size, mesh.tp.rank)]


def gather_tokens(y_nD: np.ndarray, step: Step, mesh: Mesh) -> np.ndarray:
    """The tokens of all ranks, each of which has a block of them: (N, D)."""
    return all_gather(y_nD, mesh.tp, sizes=block_sizes(len(step.ids_N), mesh.tp.size))


def whole(x_ND: np.ndarray, step: Step, mesh: Mesh) -> np.ndarray:
    """The tokens of all ranks, which every rank has: (N, D)."""
    return x_ND


def select_logits_rows(x_ND: np.ndarray, step: Step, mesh: Mesh) -> np.ndarray:
    """The rows of the tokens whose logits are wanted: (M, D). Nothing is communicated."""
    return x_ND[step.logits_indices_M]


def logits(x_MD: np.ndarray, head_vD: np.ndarray) -> np.ndarray:
    """The logits of this rank's block of the vocabulary: (M, v). Nothing is communicated."""
    return linear(x_MD, head_vD)


def partial_embedding(ids_N: np.ndarray, embedding_vD: np.ndarray, vocab_start: int) -> np.ndarray:
    """The rows that this rank has, of the ids from `vocab_start` on, and zeros for those of other
    ranks: (N, D), a partial sum."""
    row_N = ids_N - vocab_start
    here_N = (0 <= row_N) & (row_N < len(embedding_vD))
    partial_ND = np.zeros((len(ids_N), embedding_vD.shape[1]), embedding_vD.dtype)
    partial_ND[here_N] = embedding_vD[row_N[here_N]]
    return partial_ND


def add_bias(y_ND: np.ndarray, bias_D: np.ndarray | None) -> np.ndarray:
    """`y_ND` with the bias of a row-parallel product, which is added once, after the sum over
    ranks."""
    return y_ND if bias_D is None else y_ND + bias_D
