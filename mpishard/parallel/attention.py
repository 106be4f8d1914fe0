"""How the new queries of a step meet the keys and values of their sequences.

What stands between the projections depends on where the keys and values lie:

attend_full_cache     each rank has every position of its heads: nothing is communicated
attend_sharded_cache  the positions lie on several ranks: sequences that begin in this step are
                      context parallelism's (`mpishard.parallel.context`), those that are extended
                      flash decoding's (`mpishard.parallel.flash_decoding`)
attend_new            an encoder's tokens, of which nothing is kept, see those of this step alone:
                      context parallelism's way of sequences that begin

A layout chooses one of the first two, with its forms, once.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import numpy as np

from mpishard.arithmetic.attention import AttentionSpec, attend
from mpishard.communication.mesh import Mesh
from mpishard.config.layout import Layout
from mpishard.parallel import context, flash_decoding
from mpishard.sequences.step import Step


class AttendCache(Protocol):
    """Writes a layer's new keys and values to the cache and attends over it: the output of this
    rank's query heads and the log-sum-exp of their scores, ``(out_NhY, lse_Nh)``."""

    def __call__(
        self,
        q_NhK: np.ndarray,
        k_NgK: np.ndarray,
        v_NgY: np.ndarray,
        spec: AttentionSpec,
        layer: int,
        step: Step,
        mesh: Mesh,
    ) -> tuple[np.ndarray, np.ndarray]: ...


def attend_full_cache(
    q_NhK: np.ndarray,
    k_NgK: np.ndarray,
    v_NgY: np.ndarray,
    spec: AttentionSpec,
    layer: int,
    step: Step,
    mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray]:
    """Each sequence's new tokens over its cache, new keys and values included."""
    out_NhY, lse_Nh = empty_output(q_NhK, v_NgY)
    for segment in step.segments:
        new, cache = segment.token_slice, segment.cache
        cache.write(layer, k_NgK[new], v_NgY[new])
        keys_and_values = cache.read(layer)
        queries = q_NhK[new], step.positions_N[new]
        out_NhY[new], lse_Nh[new] = attend(*queries, *keys_and_values, spec)
    return out_NhY, lse_Nh


def attend_sharded_cache(
    prefill: context.Prefill,
    merge: flash_decoding.Merge,
    q_NhK: np.ndarray,
    k_NgK: np.ndarray,
    v_NgY: np.ndarray,
    spec: AttentionSpec,
    layer: int,
    step: Step,
    mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray]:
    """Each sequence's new tokens over all its positions, of which this rank's cache keeps some."""
    out_NhY, lse_Nh = empty_output(q_NhK, v_NgY)
    write_cache(k_NgK, v_NgY, layer, step)
    if step.first_chunks:  # the same on all ranks of the replica
        prefill(q_NhK, k_NgK, v_NgY, spec, step, mesh, out_NhY, lse_Nh)
    if step.extends:
        flash_decoding.decode(q_NhK, spec, layer, step, mesh, merge, out_NhY, lse_Nh)
    return out_NhY, lse_Nh


def attend_new(
    prefill: context.Prefill,
    q_NhK: np.ndarray,
    k_NgK: np.ndarray,
    v_NgY: np.ndarray,
    spec: AttentionSpec,
    layer: int,
    step: Step,
    mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray]:
    """Each sequence's tokens over each other. All sequences begin in this step, and end in it."""
    out_NhY, lse_Nh = empty_output(q_NhK, v_NgY)
    if step.segments:  # the same on all ranks of the replica
        prefill(q_NhK, k_NgK, v_NgY, spec, step, mesh, out_NhY, lse_Nh)
    return out_NhY, lse_Nh


def write_cache(k_NgK: np.ndarray, v_NgY: np.ndarray, layer: int, step: Step) -> None:
    """Write the new keys and values of a layer to the caches of their sequences: of this rank's
    tokens those that it keeps."""
    for segment in step.segments:
        new, cached = segment.token_slice, segment.cached
        segment.cache.write(layer, k_NgK[new][cached], v_NgY[new][cached])


def empty_output(q_NhK: np.ndarray, v_NgY: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Arrays for attention's output, with anything in them: ``(out_NhY, lse_Nh)``."""
    N, h, _ = q_NhK.shape
    return np.empty((N, h, v_NgY.shape[2]), q_NhK.dtype), np.empty((N, h), q_NhK.dtype)


def select_attention(layout: Layout, keeps: bool = True) -> AttendCache:
    """The form that `layout` asks for, of a decoder, which `keeps` keys and values, or of an
    encoder."""
    if not keeps:
        return partial(attend_new, context.PREFILLS[layout.cp_prefill])
    if not layout.shards_kv_positions:
        return attend_full_cache
    return partial(
        attend_sharded_cache,
        context.PREFILLS[layout.cp_prefill],
        flash_decoding.MERGES[layout.decode_merge],
    )
