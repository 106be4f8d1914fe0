"""Heads: what tensor parallelism makes of the residual stream for attention, and of its output.

Every rank of the ``tp`` group has some of the query heads, and the key/value heads that they need.
Two kinds of attention differ in how heads come from the stream and return to it:

Attention        x_ND -> q_NhK, k_NgK, v_NgK, each g serving h / g query heads -> out_NhK
LatentAttention  x_ND -> one latent for each token, which is key and value of all heads; queries are
                 carried over to its space, and outputs back from it (DeepSeek-V2: arXiv 2405.04434)

Nothing here is communicated, but for olmoe's norm over the heads of all ranks. What happens between
is `mpishard.parallel.attention`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mpishard.arithmetic.gemm import linear
from mpishard.arithmetic.ops import rms_norm, sigmoid
from mpishard.arithmetic.rotary import apply_rotary, deinterleave
from mpishard.communication.collectives import all_reduce
from mpishard.communication.mesh import Mesh
from mpishard.sequences.step import Step


@dataclass(frozen=True)
class QKV:
    """The queries, keys and values of a step's new tokens in one layer, on this rank.

    `latent` says that values are the first V numbers of the keys, and need not be kept or sent
    beside them.
    """

    q_NhK: np.ndarray
    k_NgK: np.ndarray
    v_NgV: np.ndarray
    layer: int
    scale: float
    window: int | None
    latent: bool = False

    def empty_output(self) -> tuple[np.ndarray, np.ndarray]:
        """Arrays for attention's output, with anything in them: ``(out_NhV, lse_Nh)``."""
        N, h, _ = self.q_NhK.shape
        out_NhV = np.empty((N, h, self.v_NgV.shape[2]), self.q_NhK.dtype)
        return out_NhV, np.empty((N, h), self.q_NhK.dtype)


# (heads, step, mesh) -> the output of this rank's query heads and the log-sum-exp of their scores,
# (out_NhV, lse_Nh)
Attend = Callable[[QKV, Step, Mesh], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class QKNormAllHeads:
    """The q and k norms of a model that takes them over all heads together, as olmoe does."""

    query_width: int  # H*K
    key_width: int  # G*K
    kv_head_replicas: int  # ranks that have the same key/value heads as this one


@dataclass(frozen=True)
class Attention:
    """The weights of grouped-query attention of one layer on this rank, and what its arithmetic
    needs to know."""

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
    qk_norm_all_heads: QKNormAllHeads | None
    sinks: np.ndarray | None  # (h,)
    head_dim: int  # K
    norm_eps: float
    window: int | None
    attend: Attend

    @property
    def matrices(self) -> list[np.ndarray]:
        """The weights that tokens are multiplied with."""
        return [self.q, self.k, self.v, self.o]

    def project_qkv(
        self, x_ND: np.ndarray, layer: int, rope: tuple[np.ndarray, np.ndarray], mesh: Mesh
    ) -> QKV:
        """Queries, keys and values of this rank's heads, normed and turned."""
        K = self.head_dim
        q_NhK = by_head(linear(x_ND, self.q, self.q_bias), K)  # column-parallel: D is whole
        k_NgK = by_head(linear(x_ND, self.k, self.k_bias), K)
        v_NgK = by_head(linear(x_ND, self.v, self.v_bias), K)
        if self.qk_norm_all_heads is not None:
            q_NhK, k_NgK = normalize_all_heads(q_NhK, k_NgK, self, self.qk_norm_all_heads, mesh)
        elif self.q_norm is not None and self.k_norm is not None:
            q_NhK = rms_norm(q_NhK, self.q_norm, self.norm_eps)
            k_NgK = rms_norm(k_NgK, self.k_norm, self.norm_eps)
        q_NhK, k_NgK = apply_rotary(q_NhK, *rope), apply_rotary(k_NgK, *rope)
        return QKV(q_NhK, k_NgK, v_NgK, layer, K**-0.5, self.window)

    def merge_heads(self, out_NhK: np.ndarray, lse_Nh: np.ndarray) -> np.ndarray:
        """The heads' output, side by side: (N, h*K).

        A sink is one more logit in a head's softmax, without a value (StreamingLLM, arXiv
        2309.17453; gpt-oss learns it): beside it, the keys weigh ``exp(lse) / (exp(lse) +
        exp(sink))`` together.
        """
        if self.sinks is not None:
            out_NhK = out_NhK * sigmoid(lse_Nh - self.sinks)[..., np.newaxis]
        return out_NhK.reshape(len(out_NhK), self.o.shape[1])


@dataclass(frozen=True)
class MLA:
    """The weights of multi-head latent attention of one layer on this rank.

    A token's key and value are a latent vector of R numbers, from which each head would project
    its own key and value, and P more numbers of key, turned by position, that all heads share. A
    head's projection of keys may as well be applied to its query and that of values to its output:
    ``q . (up_UR latent) = (up_UR.T q) . latent``. So attention is that of one key/value head, of
    which R + P numbers a token are kept, whatever the number of heads; every rank computes them.
    """

    q: np.ndarray  # (h*(U+P), D), or of the queries' latent (h*(U+P), Q)
    q_latent: np.ndarray | None  # (Q, D)
    q_latent_bias: np.ndarray | None  # (Q,)
    q_latent_norm: np.ndarray | None  # (Q,)
    latent: np.ndarray  # (R+P, D)
    latent_bias: np.ndarray | None  # (R+P,)
    latent_norm: np.ndarray  # (R,)
    up: np.ndarray  # (h*(U+V), R): of each head the projection of keys, U rows, and of values, V
    o: np.ndarray  # (D, h*V)
    o_bias: np.ndarray | None  # (D,)
    key_width: int  # U, of the part without position
    rotary_dim: int  # P
    value_width: int  # V
    interleaved: bool  # pairs that turn together are neighbours
    scale: float
    norm_eps: float
    window: int | None
    attend: Attend

    @property
    def matrices(self) -> list[np.ndarray]:
        """The weights that tokens are multiplied with."""
        to_queries = [self.q] if self.q_latent is None else [self.q_latent, self.q]
        return [*to_queries, self.latent, self.up, self.o]

    def ups(self) -> tuple[np.ndarray, np.ndarray]:
        """The projections of each head to its keys and its values: ``(up_hUR, up_hVR)``."""
        up_hXR = self.up.reshape(-1, self.key_width + self.value_width, self.up.shape[1])
        return up_hXR[:, : self.key_width], up_hXR[:, self.key_width :]

    def project_qkv(
        self, x_ND: np.ndarray, layer: int, rope: tuple[np.ndarray, np.ndarray], mesh: Mesh
    ) -> QKV:
        """Queries in the latents' space, and the latents, as keys and values of one head."""
        U, R = self.key_width, self.up.shape[1]
        from_ND = x_ND
        if self.q_latent is not None and self.q_latent_norm is not None:
            q_latent_NQ = linear(x_ND, self.q_latent, self.q_latent_bias)
            from_ND = rms_norm(q_latent_NQ, self.q_latent_norm, self.norm_eps)
        q_NhX = by_head(linear(from_ND, self.q), U + self.rotary_dim)
        up_hUR, _ = self.ups()
        q_hNR = q_NhX[..., :U].transpose(1, 0, 2) @ up_hUR
        latent_NX = linear(x_ND, self.latent, self.latent_bias)
        latent_NR = rms_norm(latent_NX[:, :R], self.latent_norm, self.norm_eps)
        q_NhK = np.concatenate(
            [q_hNR.transpose(1, 0, 2), self._rotated(q_NhX[..., U:], rope)], axis=2
        )
        k_N1K = np.concatenate(
            [latent_NR[:, np.newaxis], self._rotated(latent_NX[:, np.newaxis, R:], rope)], axis=2
        )
        return QKV(q_NhK, k_N1K, k_N1K[..., :R], layer, self.scale, self.window, latent=True)

    def merge_heads(self, out_NhR: np.ndarray, lse_Nh: np.ndarray) -> np.ndarray:
        """The heads' output, carried over to their values, side by side: (N, h*V)."""
        _, up_hVR = self.ups()
        out_hNV = out_NhR.transpose(1, 0, 2) @ up_hVR.transpose(0, 2, 1)
        return out_hNV.transpose(1, 0, 2).reshape(len(out_NhR), self.o.shape[1])

    def _rotated(self, x_NhP: np.ndarray, rope: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        return apply_rotary(deinterleave(x_NhP) if self.interleaved else x_NhP, *rope)


def by_head(x_NX: np.ndarray, width: int) -> np.ndarray:
    """`x_NX` with an axis for the heads, each of which is so wide."""
    N, X = x_NX.shape
    return x_NX.reshape(N, X // width, width)


def normalize_all_heads(
    q_NhK: np.ndarray, k_NgK: np.ndarray, w: Attention, norm: QKNormAllHeads, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Queries and keys scaled to a root mean square of 1 over the heads of all ranks, times the
    weights of this rank's."""
    assert w.q_norm is not None and w.k_norm is not None
    squares_N2 = [(q_NhK**2).sum(axis=(1, 2)), (k_NgK**2).sum(axis=(1, 2)) / norm.kv_head_replicas]
    total_N2 = all_reduce(np.stack(squares_N2, axis=1), mesh.tp)
    mean_N2 = total_N2 / np.array([norm.query_width, norm.key_width], total_N2.dtype)
    scale_N211 = 1 / np.sqrt(mean_N2 + w.norm_eps)[..., np.newaxis, np.newaxis]
    q_NhK = q_NhK * scale_N211[:, 0] * w.q_norm.reshape(q_NhK.shape[1:])
    return q_NhK, k_NgK * scale_N211[:, 1] * w.k_norm.reshape(k_NgK.shape[1:])
