"""How the new queries of a step meet the keys and values of their sequences.

The projections around it are `mpishard.parallel.qkv`'s; what stands between them depends on
where the keys and values lie:

whole      each rank has every position of its heads: nothing is communicated
divided    the positions lie on several ranks: sequences that begin in this step are context
           parallelism's (`mpishard.parallel.context`), those that go on flash decoding's
           (`mpishard.parallel.flash_decoding`)

A layout chooses one of the two, with its forms, once.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from mpishard.arithmetic.attention import attend
from mpishard.communication.mesh import Mesh
from mpishard.config.layout import Layout
from mpishard.parallel import context, flash_decoding
from mpishard.parallel.qkv import QKV, Attend
from mpishard.sequences.step import Step


def attend_full_cache(qkv: QKV, step: Step, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """Each sequence's new tokens over its cache, new keys and values included: ``(out_NhV,
    lse_Nh)``."""
    out_NhV, lse_Nh = qkv.empty_output()
    for segment in step.segments:
        token_slice, cache = segment.token_slice, segment.cache
        cache.write(qkv.layer, qkv.k_NgK[token_slice], qkv.v_NgV[token_slice])
        keys = cache.read(qkv.layer)
        queries = qkv.q_NhK[token_slice], step.positions_N[token_slice]
        out_NhV[token_slice], lse_Nh[token_slice] = attend(*queries, *keys, qkv.scale, qkv.window)
    return out_NhV, lse_Nh


def attend_sharded_cache(
    prefill: context.Prefill,
    merge: flash_decoding.Merge,
    qkv: QKV,
    step: Step,
    mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray]:
    """Each sequence's new tokens over all its positions, of which this rank keeps only some:
    ``(out_NhV, lse_Nh)``."""
    output = qkv.empty_output()
    for segment in step.segments:
        token_slice, cached = segment.token_slice, segment.cached
        segment.cache.write(
            qkv.layer, qkv.k_NgK[token_slice][cached], qkv.v_NgV[token_slice][cached]
        )
    if step.first_chunks:  # the same on all ranks of the replica
        prefill(qkv, step, mesh, *output)
    if step.extends:
        flash_decoding.decode(qkv, step, mesh, merge, *output)
    return output


def select_attention(layout: Layout) -> Attend:
    """The form that `layout` asks for."""
    if not layout.shards_kv_positions:
        return attend_full_cache
    return partial(
        attend_sharded_cache,
        context.CP_PREFILLS[layout.cp_prefill],
        flash_decoding.DECODE_MERGES[layout.decode_merge],
    )
