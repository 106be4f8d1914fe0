"""Sequence parallelism (Korthikanti et al. 2022, arXiv 2205.05198).

Tensor parallelism with the residual stream sharded as well: between the sub-layers each rank of the
``tp`` group has its block of the tokens, normalizes them and adds to them. An all_gather before the
column-parallel product makes all tokens whole. A reduce_scatter after the row-parallel one sums and
scatters in one go. The two send what the all_reduce sends that they replace.

embed           ids_N -> partial_ND -> reduce_scatter(tp) -> x_nD
attention       x_nD -> all_gather(tp) -> x_ND -> q_NhK, k_NgK, v_NgY -> out_NhY -> partial_ND
                -> reduce_scatter(tp) -> y_nD
feed_forward    x_nD -> all_gather(tp) -> x_ND -> hidden_Nf -> partial_ND
                -> reduce_scatter(tp) -> y_nD
parallel_layer  x_nD -> all_gather(tp) -> x_ND -> out_NhY and hidden_Nf -> partial_ND
                -> reduce_scatter(tp) -> y_nD

The functions differ from those of `mpishard.parallel.tensor` in their first and their last
collective. A rank without a token takes part with no rows.
"""

from __future__ import annotations

import numpy as np

from mpishard.arithmetic.ops import sigmoid
from mpishard.communication.collectives import all_gather, all_reduce, reduce_scatter
from mpishard.communication.mesh import Mesh
from mpishard.config.layout import block
from mpishard.parallel.attention import AttendCache
from mpishard.parallel.cross_attention import AttendMemory, CrossAttention
from mpishard.parallel.linear_attention import GatedDeltaNet, Recur
from mpishard.parallel.qkv import MLA, Attention, Rope
from mpishard.parallel.tensor import Embedding, FeedForward, ParallelLayer
from mpishard.sequences.step import Step


def embed(w: Embedding, step: Step, mesh: Mesh) -> np.ndarray:
    """This rank's block of the rows of the whole embedding for the step's tokens: (n, D)."""
    partial_ND = w.partial(step.ids_N, step.positions_N)
    return reduce_scatter(partial_ND, mesh.tp)


def attention(
    x_nD: np.ndarray,
    w: Attention | MLA,
    layer: int,
    step: Step,
    rope: Rope,
    attend: AttendCache,
    mesh: Mesh,
) -> np.ndarray:
    """Self-attention of the step's tokens over their sequences: (n, D)."""
    x_ND = all_gather(x_nD, mesh.tp, sizes=step.tokens_by_tp_rank(mesh.tp.size))
    q_NhK, k_NgK, v_NgY = w.project_qkv(x_ND)  # column-parallel: D is whole
    if w.full_width_norm:  # q and k are normalized over the heads of all ranks
        squares_N2 = all_reduce(w.full_width_norm.partial_squares(q_NhK, k_NgK), mesh.tp)
        q_NhK, k_NgK = w.full_width_norm(q_NhK, k_NgK, squares_N2)
    q_NhK, k_NgK = w.rotate(q_NhK, k_NgK, rope)
    out_NhY, lse_Nh = attend(q_NhK, k_NgK, v_NgY, w.spec, layer, step, mesh)
    heads_NX = w.merge_heads(out_NhY, lse_Nh)  # X: h*Y
    if w.o_gate:
        heads_NX *= sigmoid(w.o_gate(x_ND))
    partial_ND = w.o.partial(heads_NX)  # row-parallel: h is summed away
    y_nD = reduce_scatter(partial_ND, mesh.tp)
    return w.o.add_bias(y_nD)


def linear_attention(
    x_nD: np.ndarray, w: GatedDeltaNet, layer: int, step: Step, recur: Recur, mesh: Mesh
) -> np.ndarray:
    """The gated delta net of the step's tokens over the states of their sequences: (n, D)."""
    x_ND = all_gather(x_nD, mesh.tp, sizes=step.tokens_by_tp_rank(mesh.tp.size))
    inputs = w.project(x_ND)  # column-parallel: D is whole
    out_NhY = recur(inputs, w, layer, step, mesh)
    partial_ND = w.o.partial(w.merge_heads(out_NhY, x_ND))  # row-parallel: h is summed away
    y_nD = reduce_scatter(partial_ND, mesh.tp)
    return w.o.add_bias(y_nD)


def cross_attention(
    x_nD: np.ndarray,
    w: CrossAttention,
    layer: int,
    step: Step,
    attend: AttendMemory,
    mesh: Mesh,
) -> np.ndarray:
    """Attention of the step's tokens to what the encoder made of their inputs: (n, D)."""
    x_ND = all_gather(x_nD, mesh.tp, sizes=step.tokens_by_tp_rank(mesh.tp.size))
    out_NhK = attend(w.project_q(x_ND), w.spec, layer, step, mesh)  # column-parallel: D is whole
    partial_ND = w.o.partial(w.merge_heads(out_NhK))  # row-parallel: h is summed away
    y_nD = reduce_scatter(partial_ND, mesh.tp)
    return w.o.add_bias(y_nD)


def feed_forward(x_nD: np.ndarray, w: FeedForward, step: Step, mesh: Mesh) -> np.ndarray:
    """The feed-forward network, gated or not: (n, D)."""
    x_ND = all_gather(x_nD, mesh.tp, sizes=step.tokens_by_tp_rank(mesh.tp.size))
    hidden_Nf = w.hidden(x_ND)  # column-parallel: D is whole
    partial_ND = w.down.partial(hidden_Nf)  # row-parallel: f is summed away
    y_nD = reduce_scatter(partial_ND, mesh.tp)
    return w.down.add_bias(y_nD)


def parallel_layer(
    x_nD: np.ndarray,
    w: ParallelLayer,
    layer: int,
    step: Step,
    rope: Rope,
    attend: AttendCache,
    mesh: Mesh,
) -> np.ndarray:
    """Attention and feed-forward network side by side (GPT-J; PaLM: Chowdhery et al. 2022, arXiv
    2204.02311), added: (n, D). One all_gather serves both, and one reduce_scatter completes both.
    """
    x_ND = all_gather(x_nD, mesh.tp, sizes=step.tokens_by_tp_rank(mesh.tp.size))
    q_NhK, k_NgK, v_NgK = w.attention.project_qkv(w.attention_affine(x_ND))
    q_NhK, k_NgK = w.attention.rotate(q_NhK, k_NgK, rope)
    out_NhK, lse_Nh = attend(q_NhK, k_NgK, v_NgK, w.attention.spec, layer, step, mesh)
    hidden_Nf = w.ffn.hidden(w.ffn_affine(x_ND))  # column-parallel: D is whole
    partial_ND = w.attention.o.partial(w.attention.merge_heads(out_NhK, lse_Nh))
    partial_ND += w.ffn.down.partial(hidden_Nf)  # row-parallel: h and f are summed away
    y_nD = reduce_scatter(partial_ND, mesh.tp)
    return w.ffn.down.add_bias(w.attention.o.add_bias(y_nD))


def select_logits_rows(x_nD: np.ndarray, step: Step, mesh: Mesh) -> np.ndarray:
    """The rows of the tokens whose logits are wanted, from the ranks that have them: (M, D).

    Of 7 tokens on 2 ranks, which have 4 and 3 of them, the wanted tokens 3, 5 and 6 are row 3 of
    rank 0 and rows 1 and 2 of rank 1: blocks of 1 and 2 rows.
    """
    blocks = [block(len(step.ids_N), mesh.tp.size, rank) for rank in range(mesh.tp.size)]
    wanted_M = step.logits_indices_M
    here = [wanted_M[(one.start <= wanted_M) & (wanted_M < one.stop)] for one in blocks]
    x_mD = x_nD[here[mesh.tp.rank] - blocks[mesh.tp.rank].start]
    return all_gather(x_mD, mesh.tp, sizes=[len(wanted) for wanted in here])


def all_tokens(x_nD: np.ndarray, step: Step, mesh: Mesh) -> np.ndarray:
    """The residual stream of this cp rank's tokens, from each tp rank's block: (N, D)."""
    return all_gather(x_nD, mesh.tp, sizes=step.tokens_by_tp_rank(mesh.tp.size))
