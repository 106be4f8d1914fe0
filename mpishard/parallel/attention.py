"""How the new queries of a step meet the keys and values of their sequences.

The projections around it are `mpishard.parallel.heads`'s; what stands between them depends on
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
from mpishard.arithmetic.packed import Step
from mpishard.communication.mesh import Mesh
from mpishard.description.layout import Layout
from mpishard.parallel import context, flash_decoding
from mpishard.parallel.heads import Attend, Heads


def whole(heads: Heads, step: Step, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """Each sequence's new tokens over its cache, new keys and values included: ``(out_NhV,
    lse_Nh)``."""
    out_NhV, lse_Nh = heads.room_for_output()
    for segment in step.segments:
        new, cache = segment.new, segment.cache
        cache.store(heads.layer, heads.k_NgK[new], heads.v_NgV[new])
        keys = cache.read(heads.layer)
        queries = heads.q_NhK[new], step.positions_N[new]
        out_NhV[new], lse_Nh[new] = attend(*queries, *keys, heads.scale, heads.window)
    return out_NhV, lse_Nh


def divided(
    prefill: context.Prefill,
    merge: flash_decoding.Merge,
    heads: Heads,
    step: Step,
    mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray]:
    """Each sequence's new tokens over all its positions, of which this rank keeps only some:
    ``(out_NhV, lse_Nh)``."""
    output = heads.room_for_output()
    for segment in step.segments:
        new, kept = segment.new, segment.kept
        segment.cache.store(heads.layer, heads.k_NgK[new][kept], heads.v_NgV[new][kept])
    if step.fresh:  # the same on all ranks of the replica
        prefill(heads, step, mesh, *output)
    if step.continued:
        flash_decoding.decode(heads, step, mesh, merge, *output)
    return output


def attention_of(layout: Layout) -> Attend:
    """The form that `layout` asks for."""
    if not layout.divides_cache:
        return whole
    return partial(divided, context.PREFILLS[layout.prefill], flash_decoding.MERGES[layout.merge])
