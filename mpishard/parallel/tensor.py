"""Tensor parallelism (Megatron-LM: Shoeybi et al. 2019, arXiv 1909.08053).

Every rank of the ``tp`` group has the whole residual stream and a shard of every large weight: some
query heads with the key/value heads they need, a block of the feed-forward width, a block of the
vocabulary. The first product of a sub-layer is column-parallel: it reads the whole stream and
yields this rank's heads or columns. The second is row-parallel: it reads what this rank has, and
yields a partial sum of the whole stream, which an all_reduce completes.

embed         ids_N -> partial_ND -> all_reduce(tp) -> x_ND
attention     x_ND -> q_NhK, k_NgK, v_NgK -> out_NhK -> partial_ND -> all_reduce(tp) -> y_ND
feed_forward  x_ND -> hidden_Nf -> partial_ND -> all_reduce(tp) -> y_ND
pick          x_ND -> x_MD, the rows whose logits are wanted
deal, join    x_ND -> x_nD -> all_gather(tp) -> x_ND, around a mixture of experts
logits        x_MD -> logits_Mv
candidates    keys_Mv -> the best C of each row -> all_gather(tp) -> of all ranks

What stands between queries and attention's output is `mpishard.parallel.attention`'s. Nothing here
asks how many ranks there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mpishard.arithmetic.choice import best_of_each_row
from mpishard.arithmetic.ops import rms_norm
from mpishard.arithmetic.packed import Step
from mpishard.arithmetic.products import linear
from mpishard.arithmetic.rotary import rotate
from mpishard.communication.collectives import all_gather, all_reduce
from mpishard.communication.mesh import Mesh
from mpishard.description.layout import block, block_sizes
from mpishard.parallel.attention import Attend


@dataclass(frozen=True)
class WholeNorm:
    """The q and k norms of a model that takes them over all heads together, as olmoe does."""

    query_width: int  # H*K
    key_width: int  # G*K
    sharers: int  # ranks that have the same key/value heads as this one


@dataclass(frozen=True)
class Attention:
    """The attention weights of one layer on this rank, and what its arithmetic needs to know."""

    q: np.ndarray  # (h*K, D)
    k: np.ndarray  # (g*K, D)
    v: np.ndarray  # (g*K, D)
    o: np.ndarray  # (D, h*K)
    q_bias: np.ndarray | None  # (h*K,)
    k_bias: np.ndarray | None  # (g*K,)
    v_bias: np.ndarray | None  # (g*K,)
    o_bias: np.ndarray | None  # (D,)
    q_norm: np.ndarray | None  # (K,), or over all heads together (h*K,)
    k_norm: np.ndarray | None  # (K,), or (g*K,)
    whole_norm: WholeNorm | None
    head_dim: int  # K
    norm_eps: float
    window: int | None
    attend: Attend


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward weights of one layer on this rank."""

    gate: np.ndarray  # (f, D)
    up: np.ndarray  # (f, D)
    down: np.ndarray  # (D, f)
    gate_bias: np.ndarray | None  # (f,)
    up_bias: np.ndarray | None  # (f,)
    down_bias: np.ndarray | None  # (D,)
    activation: Callable[[np.ndarray], np.ndarray]


def embed(ids_N: np.ndarray, embedding_vD: np.ndarray, first_id: int, mesh: Mesh) -> np.ndarray:
    """The rows of the whole embedding for `ids_N`: (N, D)."""
    partial_ND = partial_embedding(ids_N, embedding_vD, first_id)
    return all_reduce(partial_ND, mesh.tp)


def attention(
    x_ND: np.ndarray,
    w: Attention,
    layer: int,
    step: Step,
    turn: tuple[np.ndarray, np.ndarray],
    mesh: Mesh,
) -> np.ndarray:
    """Causal self-attention of the step's tokens over their sequences: (N, D). `turn` holds the
    rotary cosines and sines of the tokens."""
    q_NhK, k_NgK, v_NgK = project(x_ND, w, turn, mesh)
    scale = w.head_dim**-0.5
    out_NhK = w.attend(q_NhK, k_NgK, v_NgK, layer, step, scale, w.window, mesh)
    out_Nx = out_NhK.reshape(len(x_ND), w.o.shape[1])  # x: this rank's h heads, K of each
    partial_ND = linear(out_Nx, w.o)  # row-parallel: h is summed away
    y_ND = all_reduce(partial_ND, mesh.tp)
    return add_bias(y_ND, w.o_bias)


def feed_forward(x_ND: np.ndarray, w: FeedForward, step: Step, mesh: Mesh) -> np.ndarray:
    """The gated feed-forward network (Shazeer 2020, arXiv 2002.05202): (N, D)."""
    hidden_Nf = w.activation(linear(x_ND, w.gate, w.gate_bias))  # column-parallel: D is whole
    hidden_Nf *= linear(x_ND, w.up, w.up_bias)
    partial_ND = linear(hidden_Nf, w.down)  # row-parallel: f is summed away
    y_ND = all_reduce(partial_ND, mesh.tp)
    return add_bias(y_ND, w.down_bias)


def deal(x_ND: np.ndarray, mesh: Mesh) -> np.ndarray:
    """This rank's block of the tokens that every rank has: (n, D)."""
    return x_ND[block(len(x_ND), mesh.tp.size, mesh.tp.rank)]


def join(y_nD: np.ndarray, step: Step, mesh: Mesh) -> np.ndarray:
    """The tokens of all ranks, each of which has a block of them: (N, D)."""
    return all_gather(y_nD, mesh.tp, sizes=block_sizes(len(step.ids_N), mesh.tp.size))


def whole(x_ND: np.ndarray, step: Step, mesh: Mesh) -> np.ndarray:
    """The tokens of all ranks, which every rank has: (N, D)."""
    return x_ND


def pick(x_ND: np.ndarray, step: Step, mesh: Mesh) -> np.ndarray:
    """The rows of the tokens whose logits are wanted: (M, D). Nothing is communicated."""
    return x_ND[step.wanted_M]


def logits(x_MD: np.ndarray, head_vD: np.ndarray) -> np.ndarray:
    """The logits of this rank's block of the vocabulary: (M, v). Nothing is communicated."""
    return linear(x_MD, head_vD)


def candidates(
    keys_Mv: np.ndarray, count: int, first_id: int, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest keys of every rank's block of the vocabulary and their ids, on every
    rank: two (M, tp*count) arrays, rank by rank, each rank's sorted, ties by ascending id.

    A rank with fewer than `count` columns fills up with -inf and an id beyond any vocabulary.
    """
    best_MC, column_MC = best_of_each_row(keys_Mv, count)
    pairs_MC = np.empty(best_MC.shape, np.dtype([("key", keys_Mv.dtype), ("id", np.int64)]))
    pairs_MC["key"] = best_MC
    pairs_MC["id"] = np.where(column_MC < keys_Mv.shape[1], column_MC + first_id, np.iinfo(int).max)
    packed = pairs_MC.view(np.uint8)  # one message for keys and ids: (M, C * bytes of a pair)
    everyones = all_gather(packed, mesh.tp, axis=1)
    pairs = everyones.view(pairs_MC.dtype)
    return pairs["key"], pairs["id"]


def partial_embedding(ids_N: np.ndarray, embedding_vD: np.ndarray, first_id: int) -> np.ndarray:
    """The rows that this rank has, of the ids from `first_id` on, and zeros for those of other
    ranks: (N, D), a partial sum."""
    row_N = ids_N - first_id
    here_N = (0 <= row_N) & (row_N < len(embedding_vD))
    partial_ND = np.zeros((len(ids_N), embedding_vD.shape[1]), embedding_vD.dtype)
    partial_ND[here_N] = embedding_vD[row_N[here_N]]
    return partial_ND


def project(
    x_ND: np.ndarray, w: Attention, turn: tuple[np.ndarray, np.ndarray], mesh: Mesh
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values of this rank's heads, normed and turned: ``(q_NhK, k_NgK,
    v_NgK)``."""
    N, K = len(x_ND), w.head_dim
    h, g = len(w.q) // K, len(w.k) // K
    q_NhK = linear(x_ND, w.q, w.q_bias).reshape(N, h, K)  # column-parallel: D is whole
    k_NgK = linear(x_ND, w.k, w.k_bias).reshape(N, g, K)
    v_NgK = linear(x_ND, w.v, w.v_bias).reshape(N, g, K)
    if w.whole_norm is not None:
        q_NhK, k_NgK = norm_all_heads(q_NhK, k_NgK, w, w.whole_norm, mesh)
    elif w.q_norm is not None and w.k_norm is not None:
        q_NhK = rms_norm(q_NhK, w.q_norm, w.norm_eps)
        k_NgK = rms_norm(k_NgK, w.k_norm, w.norm_eps)
    return rotate(q_NhK, *turn), rotate(k_NgK, *turn), v_NgK


def norm_all_heads(
    q_NhK: np.ndarray, k_NgK: np.ndarray, w: Attention, norm: WholeNorm, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Queries and keys scaled to a root mean square of 1 over the heads of all ranks, times the
    weights of this rank's."""
    assert w.q_norm is not None and w.k_norm is not None
    squares_N2 = [(q_NhK**2).sum(axis=(1, 2)), (k_NgK**2).sum(axis=(1, 2)) / norm.sharers]
    total_N2 = all_reduce(np.stack(squares_N2, axis=1), mesh.tp)
    mean_N2 = total_N2 / np.array([norm.query_width, norm.key_width], total_N2.dtype)
    scale_N211 = 1 / np.sqrt(mean_N2 + w.norm_eps)[..., np.newaxis, np.newaxis]
    q_NhK = q_NhK * scale_N211[:, 0] * w.q_norm.reshape(q_NhK.shape[1:])
    return q_NhK, k_NgK * scale_N211[:, 1] * w.k_norm.reshape(k_NgK.shape[1:])


def add_bias(y_ND: np.ndarray, bias_D: np.ndarray | None) -> np.ndarray:
    """`y_ND` with the bias of a row-parallel product, which is added once, after the sum over
    ranks."""
    return y_ND if bias_D is None else y_ND + bias_D
