"""Sequence parallelism (Korthikanti et al. 2022, arXiv 2205.05198).

Tensor parallelism with the residual stream divided as well: between the sub-layers each rank of the
``tp`` group has its block of the tokens, norms them and adds to them. An all_gather before the
column-parallel product makes all tokens whole, and a reduce_scatter after the row-parallel one sums
and divides in one go. The two send what the all_reduce sends that they replace.

embed         ids_N -> partial_ND -> reduce_scatter(tp) -> x_nD
attention     x_nD -> all_gather(tp) -> x_ND -> q_NhK, k_NgK, v_NgV -> out_NhV -> partial_ND
              -> reduce_scatter(tp) -> y_nD
feed_forward  x_nD -> all_gather(tp) -> x_ND -> hidden_Nf -> partial_ND
              -> reduce_scatter(tp) -> y_nD
pick          x_nD -> the rows whose logits are wanted -> all_gather(tp) -> x_MD

A rank without a token takes part with no rows.
"""

from __future__ import annotations

import numpy as np

from mpishard.arithmetic.gemm import linear
from mpishard.communication.collectives import all_gather, reduce_scatter
from mpishard.communication.mesh import Mesh
from mpishard.config.layout import block, block_sizes
from mpishard.parallel.qkv import MLA, Attention
from mpishard.parallel.tensor import FeedForward, add_bias, partial_embedding
from mpishard.sequences.step import Step


def embed(ids_N: np.ndarray, embedding_vD: np.ndarray, vocab_start: int, mesh: Mesh) -> np.ndarray:
    """This rank's block of the rows of the whole embedding for `ids_N`: (n, D)."""
    partial_ND = partial_embedding(ids_N, embedding_vD, vocab_start)
    return reduce_scatter(partial_ND, mesh.tp)


def attention(
    x_nD: np.ndarray,
    w: Attention | MLA,
    layer: int,
    step: Step,
    rope: tuple[np.ndarray, np.ndarray],
    mesh: Mesh,
) -> np.ndarray:
    """Causal self-attention of the step's tokens over their sequences: (n, D). `rope` holds the
    rotary cosines and sines of all N tokens."""
    x_ND = whole(x_nD, step, mesh)
    heads = w.project_qkv(x_ND, layer, rope, mesh)
    out_Nx = w.merge_heads(*w.attend(heads, step, mesh))  # x: this rank's h heads, V of each
    partial_ND = linear(out_Nx, w.o)  # row-parallel: h is summed away
    y_nD = reduce_scatter(partial_ND, mesh.tp)
    return add_bias(y_nD, w.o_bias)


def feed_forward(x_nD: np.ndarray, w: FeedForward, step: Step, mesh: Mesh) -> np.ndarray:
    """The gated feed-forward network (Shazeer 2020, arXiv 2002.05202): (n, D)."""
    x_ND = whole(x_nD, step, mesh)
    y_nD = reduce_scatter(w.partial(x_ND), mesh.tp)
    return add_bias(y_nD, w.down_bias)


def select_logits_rows(x_nD: np.ndarray, step: Step, mesh: Mesh) -> np.ndarray:
    """The rows of the tokens whose logits are wanted, from the ranks that have them: (M, D)."""
    blocks = [block(len(step.ids_N), mesh.tp.size, rank) for rank in range(mesh.tp.size)]
    bounds = np.searchsorted(
        step.logits_indices_M, [tokens.start for tokens in blocks] + [len(step.ids_N)]
    )
    mine, rank = blocks[mesh.tp.rank], mesh.tp.rank
    x_mD = x_nD[step.logits_indices_M[bounds[rank] : bounds[rank + 1]] - mine.start]
    return all_gather(x_mD, mesh.tp, sizes=np.diff(bounds).tolist())


def scatter_tokens(x_nD: np.ndarray, mesh: Mesh) -> np.ndarray:
    """This rank's block of the tokens, which it has already: (n, D)."""
    return x_nD


def gather_tokens(y_nD: np.ndarray, step: Step, mesh: Mesh) -> np.ndarray:
    """This rank's block of the tokens, where it stays: (n, D)."""
    return y_nD


def whole(x_nD: np.ndarray, step: Step, mesh: Mesh) -> np.ndarray:
    """The tokens of all ranks: (N, D)."""
    return all_gather(x_nD, mesh.tp, sizes=block_sizes(len(step.ids_N), mesh.tp.size))
