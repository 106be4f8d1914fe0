"""Tensor parallelism (Megatron-LM: Shoeybi et al. 2019, arXiv 1909.08053).

Every rank of the ``tp`` group has the whole residual stream and a shard of every large weight: some
query heads with the key/value heads they need, a block of the feed-forward width, a block of the
vocabulary. The first product of a sub-layer is column-parallel: it reads the whole stream and
yields this rank's heads or columns. The second is row-parallel: it reads what this rank has and
yields a partial sum of the whole stream, which an all_reduce completes. Where attention and
feed-forward network read the same stream, one all_reduce completes the sum of both.

embed           ids_N -> partial_ND -> all_reduce(tp) -> x_ND
attention       x_ND -> q_NhK, k_NgK, v_NgY -> out_NhY -> partial_ND -> all_reduce(tp) -> y_ND
feed_forward    x_ND -> hidden_Nf -> partial_ND -> all_reduce(tp) -> y_ND
parallel_layer  x_ND -> out_NhY and hidden_Nf -> partial_ND -> all_reduce(tp) -> y_ND
logits          x_MD -> logits_Mv

`mpishard.parallel.sequence` has the same functions for a residual stream that is sharded by tokens.
Nothing here asks how many ranks there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from mpishard.arithmetic.linear import Linear
from mpishard.arithmetic.ops import sigmoid
from mpishard.communication.collectives import all_reduce
from mpishard.communication.mesh import Mesh
from mpishard.parallel.attention import AttendCache
from mpishard.parallel.cross_attention import AttendMemory, CrossAttention
from mpishard.parallel.linear_attention import GatedDeltaNet, Recur
from mpishard.parallel.qkv import MLA, Attention, Rope
from mpishard.sequences.step import Step


@dataclass(frozen=True)
class GatedFeedForward:
    """The weights of one layer's gated feed-forward network (Shazeer 2020, arXiv 2002.05202) on
    this rank: ``down(activation(gate(x)) * up(x))``."""

    gate: Linear  # (f, D)
    up: Linear  # (f, D)
    down: Linear  # (D, f)
    act_and_mul: Callable[[Any, Any], Any]  # (gate, up) -> hidden

    @property
    def linears(self) -> list[Linear]:
        """The weights that tokens are multiplied with."""
        return [self.gate, self.up, self.down]

    def hidden(self, x_ND: np.ndarray) -> Any:
        """This rank's columns of what `down` is applied to: (N, f)."""
        return self.act_and_mul(self.gate(x_ND), self.up(x_ND))


@dataclass(frozen=True)
class UngatedFeedForward:
    """The weights of one layer's plain feed-forward network (Vaswani et al. 2017, arXiv 1706.03762)
    on this rank: ``down(activation(up(x)))``."""

    up: Linear  # (f, D)
    down: Linear  # (D, f)
    act: Callable[[Any], Any]

    @property
    def linears(self) -> list[Linear]:
        """The weights that tokens are multiplied with."""
        return [self.up, self.down]

    def hidden(self, x_ND: np.ndarray) -> Any:
        """This rank's columns of what `down` is applied to: (N, f)."""
        return self.act(self.up(x_ND))


FeedForward: TypeAlias = GatedFeedForward | UngatedFeedForward


@dataclass(frozen=True)
class ParallelLayer:
    """A decoder layer on this rank whose attention and feed-forward network read the same residual
    stream. `norm` comes first, of this rank's tokens. Where the two have norms of their own, `norm`
    is what these share, and `attention_affine` and `ffn_affine` are what they differ in."""

    norm: Callable[[np.ndarray], np.ndarray]
    attention_affine: Callable[[np.ndarray], np.ndarray]
    attention: Attention
    ffn_affine: Callable[[np.ndarray], np.ndarray]
    ffn: FeedForward


@dataclass(frozen=True)
class Embedding:
    """This rank's rows of the embedding of tokens, from the id `vocab_start` on, and, where the
    model learns an embedding of positions, of that, from row `first_row` on. Position 0 has row
    `position_offset` of it."""

    tokens_vD: np.ndarray
    vocab_start: int
    positions: np.ndarray | None = None  # (some rows, D)
    first_row: int = 0
    position_offset: int = 0

    def partial(self, ids_N: np.ndarray, positions_N: np.ndarray) -> np.ndarray:
        """The sum of both for these tokens: (N, D), a partial sum."""
        partial_ND = partial_embedding(ids_N, self.tokens_vD, self.vocab_start)
        if self.positions is not None:
            rows_N = positions_N + self.position_offset
            partial_ND += partial_embedding(rows_N, self.positions, self.first_row)
        return partial_ND


def embed(w: Embedding, step: Step, mesh: Mesh) -> np.ndarray:
    """The rows of the whole embedding for the step's tokens: (N, D)."""
    partial_ND = w.partial(step.ids_N, step.positions_N)
    return all_reduce(partial_ND, mesh.tp)


def attention(
    x_ND: np.ndarray,
    w: Attention | MLA,
    layer: int,
    step: Step,
    rope: Rope,
    attend: AttendCache,
    mesh: Mesh,
) -> np.ndarray:
    """Self-attention of the step's tokens over their sequences: (N, D)."""
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
    y_ND = all_reduce(partial_ND, mesh.tp)
    return w.o.add_bias(y_ND)


def linear_attention(
    x_ND: np.ndarray, w: GatedDeltaNet, layer: int, step: Step, recur: Recur, mesh: Mesh
) -> np.ndarray:
    """The gated delta net of the step's tokens over the states of their sequences: (N, D)."""
    inputs = w.project(x_ND)  # column-parallel: D is whole
    out_NhY = recur(inputs, w, layer, step, mesh)
    partial_ND = w.o.partial(w.merge_heads(out_NhY, x_ND))  # row-parallel: h is summed away
    y_ND = all_reduce(partial_ND, mesh.tp)
    return w.o.add_bias(y_ND)


def cross_attention(
    x_ND: np.ndarray,
    w: CrossAttention,
    layer: int,
    step: Step,
    attend: AttendMemory,
    mesh: Mesh,
) -> np.ndarray:
    """Attention of the step's tokens to what the encoder made of their inputs: (N, D)."""
    out_NhK = attend(w.project_q(x_ND), w.spec, layer, step, mesh)  # column-parallel: D is whole
    partial_ND = w.o.partial(w.merge_heads(out_NhK))  # row-parallel: h is summed away
    y_ND = all_reduce(partial_ND, mesh.tp)
    return w.o.add_bias(y_ND)


def feed_forward(x_ND: np.ndarray, w: FeedForward, step: Step, mesh: Mesh) -> np.ndarray:
    """The feed-forward network, gated or not: (N, D)."""
    hidden_Nf = w.hidden(x_ND)  # column-parallel: D is whole
    partial_ND = w.down.partial(hidden_Nf)  # row-parallel: f is summed away
    y_ND = all_reduce(partial_ND, mesh.tp)
    return w.down.add_bias(y_ND)


def parallel_layer(
    x_ND: np.ndarray,
    w: ParallelLayer,
    layer: int,
    step: Step,
    rope: Rope,
    attend: AttendCache,
    mesh: Mesh,
) -> np.ndarray:
    """Attention and feed-forward network side by side (GPT-J; PaLM: Chowdhery et al. 2022, arXiv
    2204.02311), added: (N, D). Both partial sums are added before the one all_reduce."""
    q_NhK, k_NgK, v_NgK = w.attention.project_qkv(w.attention_affine(x_ND))
    q_NhK, k_NgK = w.attention.rotate(q_NhK, k_NgK, rope)
    out_NhK, lse_Nh = attend(q_NhK, k_NgK, v_NgK, w.attention.spec, layer, step, mesh)
    hidden_Nf = w.ffn.hidden(w.ffn_affine(x_ND))  # column-parallel: D is whole
    partial_ND = w.attention.o.partial(w.attention.merge_heads(out_NhK, lse_Nh))
    partial_ND += w.ffn.down.partial(hidden_Nf)  # row-parallel: h and f are summed away
    y_ND = all_reduce(partial_ND, mesh.tp)
    return w.ffn.down.add_bias(w.attention.o.add_bias(y_ND))


def select_logits_rows(x_ND: np.ndarray, step: Step, mesh: Mesh) -> np.ndarray:
    """The rows of the tokens whose logits are wanted: (M, D). Nothing is communicated."""
    return x_ND[step.logits_indices_M]


def all_tokens(x_ND: np.ndarray, step: Step, mesh: Mesh) -> np.ndarray:
    """The residual stream of this cp rank's tokens, which every tp rank has: (N, D)."""
    return x_ND


def logits(x_MD: np.ndarray, head: Linear) -> np.ndarray:
    """The logits of this rank's block of the vocabulary: (M, v). Nothing is communicated."""
    return head(x_MD)


def partial_embedding(ids_N: np.ndarray, embedding_vD: np.ndarray, vocab_start: int) -> np.ndarray:
    """The rows that this rank has, of the ids from `vocab_start` on, and zeros for those of other
    ranks: (N, D), a partial sum."""
    row_N = ids_N - vocab_start
    here_N = (0 <= row_N) & (row_N < len(embedding_vD))
    partial_ND = np.zeros((len(ids_N), embedding_vD.shape[1]), embedding_vD.dtype)
    partial_ND[here_N] = embedding_vD[row_N[here_N]]
    return partial_ND
