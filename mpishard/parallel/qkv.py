"""Queries, keys and values: the arithmetic of attention around the cache, on this rank's heads.

Every rank of the ``tp`` group has some of the query heads, and the key/value heads that they need.
Two kinds of attention differ in how heads come from the residual stream and return to it:

Attention  x_ND -> q_NhK, k_NgK, v_NgK, each g serving h / g query heads -> out_NhK (GQA: Ainslie
           et al. 2023, arXiv 2305.13245)
MLA        x_ND -> one latent for each token, which is the key and the value of all heads; queries
           are carried over to its space, and outputs back from it (DeepSeek-V2: arXiv 2405.04434)

`mpishard.parallel.tensor` and `mpishard.parallel.sequence` put it together with the collectives.
Nothing here is communicated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mpishard.arithmetic.attention import AttentionSpec, apply_sinks
from mpishard.arithmetic.linear import Linear
from mpishard.arithmetic.ops import RMSNorm
from mpishard.arithmetic.rotary import apply_rotary, deinterleave

Norm = Callable[[np.ndarray], np.ndarray]
QKV = tuple[np.ndarray, np.ndarray, np.ndarray]


class Rope(NamedTuple):
    """What the position of each of a step's tokens does in a layer: its rotary cosines and sines,
    and a factor of its queries, None where the model has none. A layer without RoPE has J = 0."""

    cos_N11J: np.ndarray
    sin_N12J: np.ndarray
    query_scale_N11: np.ndarray | None = None


@dataclass(frozen=True)
class FullWidthNorm:
    """RMSNorm of q over all query heads together, and of k over all key heads, as olmoe has it.

    The heads lie on all ranks of the ``tp`` group, so that the sums of squares have to be completed
    by an all_reduce. A key/value head that several ranks hold counts once.
    """

    q_weight: np.ndarray  # (h*K,)
    k_weight: np.ndarray  # (g*K,)
    q_width: int  # H*K
    k_width: int  # G*K
    kv_head_replicas: int  # tp ranks that hold the same key/value heads as this one
    eps: float

    def partial_squares(self, q_NhK: np.ndarray, k_NgK: np.ndarray) -> np.ndarray:
        """The sums of squares of this rank's q and k: (N, 2), a partial sum."""
        squares = [(q_NhK**2).sum(axis=(1, 2)), (k_NgK**2).sum(axis=(1, 2)) / self.kv_head_replicas]
        return np.stack(squares, axis=1)

    def __call__(
        self, q_NhK: np.ndarray, k_NgK: np.ndarray, squares_N2: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        mean_N2 = squares_N2 / np.array([self.q_width, self.k_width], squares_N2.dtype)
        scale_N211 = 1 / np.sqrt(mean_N2 + self.eps)[..., np.newaxis, np.newaxis]
        q_NhK = q_NhK * scale_N211[:, 0] * self.q_weight.reshape(q_NhK.shape[1:])
        return q_NhK, k_NgK * scale_N211[:, 1] * self.k_weight.reshape(k_NgK.shape[1:])


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention of one layer on this rank."""

    q: Linear  # (h*K, D)
    k: Linear  # (g*K, D)
    v: Linear  # (g*K, D)
    o: Linear  # (D, h*K)
    head_dim: int  # K
    spec: AttentionSpec
    clip: float | None = None  # the largest absolute value of q, k and v
    q_norm: Norm | None = None  # over each head of q: weights of (K,) or (h, K)
    k_norm: Norm | None = None
    norm_after_rope: bool = False  # of q_norm and k_norm
    full_width_norm: FullWidthNorm | None = None
    o_gate: Linear | None = None  # (h*K, D)
    interleaved: bool = False  # RoPE pairs are neighbours

    @property
    def linears(self) -> list[Linear]:
        """The weights that tokens are multiplied with."""
        return [self.q, self.k, self.v, *([self.o_gate] if self.o_gate else []), self.o]

    def project_qkv(self, x_ND: np.ndarray) -> QKV:
        """This rank's queries, keys and values before RoPE: ``(q_NhK, k_NgK, v_NgK)``."""
        q_NhK = split_heads(self.q(x_ND), self.head_dim)
        k_NgK = split_heads(self.k(x_ND), self.head_dim)
        v_NgK = split_heads(self.v(x_ND), self.head_dim)
        if self.clip is not None:
            for x_NhK in (q_NhK, k_NgK, v_NgK):
                np.clip(x_NhK, -self.clip, self.clip, out=x_NhK)
        if not self.norm_after_rope:
            q_NhK, k_NgK = self._norm_heads(q_NhK, k_NgK)
        return q_NhK, k_NgK, v_NgK

    def rotate(
        self, q_NhK: np.ndarray, k_NgK: np.ndarray, rope: Rope
    ) -> tuple[np.ndarray, np.ndarray]:
        """Queries and keys with RoPE, and what comes between it and the scores."""
        q_NhK = apply_rotary(q_NhK, rope.cos_N11J, rope.sin_N12J, self.interleaved)
        k_NgK = apply_rotary(k_NgK, rope.cos_N11J, rope.sin_N12J, self.interleaved)
        if self.norm_after_rope:
            q_NhK, k_NgK = self._norm_heads(q_NhK, k_NgK)
        if rope.query_scale_N11 is not None:
            q_NhK = q_NhK * rope.query_scale_N11
        return q_NhK, k_NgK

    def _norm_heads(self, q_NhK: np.ndarray, k_NgK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The norms of each head, where the family has them."""
        if self.q_norm is None or self.k_norm is None:
            return q_NhK, k_NgK
        return self.q_norm(q_NhK), self.k_norm(k_NgK)

    def merge_heads(self, out_NhK: np.ndarray, lse_Nh: np.ndarray) -> np.ndarray:
        """The heads' output, side by side: (N, h*K)."""
        out_NhK = apply_sinks(out_NhK, lse_Nh, self.spec)
        return out_NhK.reshape(len(out_NhK), self.o.weight.shape[1])


@dataclass(frozen=True)
class MLA:
    """Multi-head latent attention of one layer on this rank, in its absorbed form.

    A token's key and value are a latent of Y numbers, from which each head would project its own
    key and value, and a RoPE key of 2J more numbers, shared by all heads. A head's projection of
    keys may as well be applied to its query, and that of values to its output:
    ``q . (W_UK latent) = (W_UK.T q) . latent``. So attention has a single key/value head of
    K = Y + 2J numbers a token, whatever the number of query heads; every rank computes it. Values
    are the first Y numbers of the keys. A head's own values are X = v_head_dim wide.
    """

    q: Linear  # (h*(U+2J), D), or of the queries' latent (h*(U+2J), Q)
    q_a: Linear | None  # (Q, D)
    q_a_norm: RMSNorm | None  # (Q,)
    kv_a: Linear  # (Y+2J, D)
    kv_a_norm: RMSNorm  # (Y,)
    kv_b: Linear  # (h*(U+X), Y): of each head W_UK, U rows, and W_UV, X rows
    o: Linear  # (D, h*X)
    qk_nope_head_dim: int  # U
    v_head_dim: int  # X
    interleaved: bool  # RoPE pairs are neighbours
    spec: AttentionSpec
    full_width_norm: None = None
    o_gate: None = None

    @property
    def linears(self) -> list[Linear]:
        """The weights that tokens are multiplied with."""
        to_queries = [self.q] if self.q_a is None else [self.q_a, self.q]
        return [*to_queries, self.kv_a, self.kv_b, self.o]

    @property
    def kv_lora_rank(self) -> int:
        """Y, the width of a latent."""
        return self.kv_b.weight.shape[1]

    def up_projections(self) -> tuple[np.ndarray, np.ndarray]:
        """W_UK and W_UV of each head: ``(up_k_hUY, up_v_hXY)``."""
        rows = self.qk_nope_head_dim + self.v_head_dim
        up_hXY = self.kv_b.weight.reshape(-1, rows, self.kv_lora_rank)  # X: U, then X
        return up_hXY[:, : self.qk_nope_head_dim], up_hXY[:, self.qk_nope_head_dim :]

    def project_qkv(self, x_ND: np.ndarray) -> QKV:
        """Queries in the latents' space, and the latents, as keys and values of one head, before
        RoPE: ``(q_NhK, k_N1K, v_N1Y)``. The values are a view of the keys."""
        U, Y = self.qk_nope_head_dim, self.kv_lora_rank
        latent_NX = self.kv_a(x_ND)  # X: Y, then 2J
        from_NX = x_ND if self.q_a is None else self.q_a(x_ND)  # X: D or Q
        if self.q_a_norm is not None:
            from_NX = self.q_a_norm(from_NX)
        q_NhX = split_heads(self.q(from_NX), U + latent_NX.shape[1] - Y)  # X: U, then 2J
        up_k_hUY, _ = self.up_projections()
        q_hNY = q_NhX[..., :U].transpose(1, 0, 2) @ up_k_hUY
        q_NhK = np.concatenate([q_hNY.transpose(1, 0, 2), q_NhX[..., U:]], axis=2)
        latent_NY = self.kv_a_norm(latent_NX[:, :Y])
        k_N1K = np.concatenate([latent_NY, latent_NX[:, Y:]], axis=1)[:, np.newaxis]
        return q_NhK, k_N1K, k_N1K[..., :Y]

    def rotate(
        self, q_NhK: np.ndarray, k_N1K: np.ndarray, rope: Rope
    ) -> tuple[np.ndarray, np.ndarray]:
        """Queries and keys with RoPE on their last 2J numbers, in place."""
        for x_NhK in (q_NhK, k_N1K):
            rope_NhX = x_NhK[..., self.kv_lora_rank :]  # X: 2J
            if self.interleaved:
                rope_NhX = deinterleave(rope_NhX)
            x_NhK[..., self.kv_lora_rank :] = apply_rotary(rope_NhX, rope.cos_N11J, rope.sin_N12J)
        return q_NhK, k_N1K

    def merge_heads(self, out_NhY: np.ndarray, lse_Nh: np.ndarray) -> np.ndarray:
        """The heads' output, carried over to their values, side by side: (N, h*X)."""
        _, up_v_hXY = self.up_projections()
        out_hNX = out_NhY.transpose(1, 0, 2) @ up_v_hXY.transpose(0, 2, 1)
        return out_hNX.transpose(1, 0, 2).reshape(len(out_NhY), self.o.weight.shape[1])


def split_heads(x_NX: np.ndarray, head_dim: int) -> np.ndarray:
    """`x_NX` with an axis for the heads: (N, h, head_dim)."""
    N, X = x_NX.shape
    return x_NX.reshape(N, X // head_dim, head_dim)
