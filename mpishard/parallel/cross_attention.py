"""Cross-attention: the decoder's tokens over what the encoder made of their sequence's input.

An input is encoded once. What each layer of the decoder needs of it are keys and values, which go
to the sequence's memory, a second cache that never grows (`KVCache.memory`). It is sharded as the
cache is: by key/value heads over ``tp`` and, where positions are sharded, by positions.

remember               x_ND, the encoder's outputs of this rank's tokens -> k_NgK, v_NgK of each
                       layer: nothing is communicated
attend_memory          each rank has every position of its heads: nothing is communicated
attend_sharded_memory  flash decoding over the memory, for first chunks as for later tokens: all
                       ranks' queries meet this rank's keys, and what they give is merged

Queries see all keys, wherever these stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from mpishard.arithmetic.attention import AttentionSpec, attend
from mpishard.arithmetic.linear import Linear
from mpishard.communication.mesh import Mesh
from mpishard.config.layout import Layout
from mpishard.parallel import flash_decoding
from mpishard.parallel.attention import write_cache
from mpishard.parallel.qkv import split_heads
from mpishard.sequences.step import Step


@dataclass(frozen=True)
class CrossAttention:
    """Attention of one layer of the decoder to the encoder's outputs, on this rank."""

    q: Linear  # (h*K, D)
    k: Linear  # (g*K, D)
    v: Linear  # (g*K, D)
    o: Linear  # (D, h*K)
    head_dim: int  # K
    spec: AttentionSpec

    @property
    def linears(self) -> list[Linear]:
        """The weights that the decoder's tokens are multiplied with."""
        return [self.q, self.o]

    def project_q(self, x_ND: np.ndarray) -> np.ndarray:
        """This rank's queries: (N, h, K)."""
        return split_heads(self.q(x_ND), self.head_dim)

    def project_kv(self, x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """This rank's keys and values of the encoder's outputs: ``(k_NgK, v_NgK)``."""
        return split_heads(self.k(x_ND), self.head_dim), split_heads(self.v(x_ND), self.head_dim)

    def merge_heads(self, out_NhK: np.ndarray) -> np.ndarray:
        """The heads' output, side by side: (N, h*K)."""
        return out_NhK.reshape(len(out_NhK), self.o.weight.shape[1])


def remember(x_ND: np.ndarray, layers: Sequence[CrossAttention], step: Step) -> None:
    """Write the keys and values of a step of the encoder, whose outputs are `x_ND`, to the memories
    of its sequences."""
    for layer, w in enumerate(layers):
        write_cache(*w.project_kv(x_ND), layer, step)


class AttendMemory(Protocol):
    """Attends over a layer's memory: the output of this rank's query heads, (N, h, K)."""

    def __call__(
        self, q_NhK: np.ndarray, spec: AttentionSpec, layer: int, step: Step, mesh: Mesh
    ) -> np.ndarray: ...


def attend_memory(
    q_NhK: np.ndarray, spec: AttentionSpec, layer: int, step: Step, mesh: Mesh
) -> np.ndarray:
    """Each sequence's new tokens over its memory."""
    out_NhK = np.empty_like(q_NhK)
    for segment in step.over_memory.segments:
        new = segment.token_slice
        queries = q_NhK[new], step.positions_N[new]
        out_NhK[new], _ = attend(*queries, *segment.cache.read(layer), spec)
    return out_NhK


def attend_sharded_memory(
    merge: flash_decoding.Merge,
    q_NhK: np.ndarray,
    spec: AttentionSpec,
    layer: int,
    step: Step,
    mesh: Mesh,
) -> np.ndarray:
    """Each sequence's new tokens over its memory, of which this rank keeps some positions."""
    out_NhK, lse_Nh = np.empty_like(q_NhK), np.empty(q_NhK.shape[:2], q_NhK.dtype)
    if step.segments:  # the same on all ranks of the replica
        over = step.over_memory
        flash_decoding.decode(q_NhK, spec, layer, over, mesh, merge, out_NhK, lse_Nh)
    return out_NhK


def select_cross_attention(layout: Layout) -> AttendMemory:
    """The form that `layout` asks for."""
    if not layout.shards_kv_positions:
        return attend_memory
    return partial(attend_sharded_memory, flash_decoding.MERGES[layout.decode_merge])
