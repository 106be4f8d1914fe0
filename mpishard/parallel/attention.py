"""How the new queries of a step meet the keys and values of their sequences.

The projections around it are tensor parallelism's; what stands between them depends on where the
keys and values lie:

whole      each rank has every position of its heads: nothing is communicated
divided    the positions lie on several ranks: sequences that begin in this step are context
           parallelism's (`mpishard.parallel.context`), those that go on flash decoding's
           (`mpishard.parallel.flash_decoding`)

A layout chooses one of the two, with its forms, once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from mpishard.arithmetic.attention import attend
from mpishard.arithmetic.packed import Step
from mpishard.communication.mesh import Mesh
from mpishard.description.layout import Layout
from mpishard.parallel import context, flash_decoding

# (q_NhK, k_NgK, v_NgK, layer, step, scale, window, mesh) -> out_NhK
Attend = Callable[
    [np.ndarray, np.ndarray, np.ndarray, int, Step, float, int | None, Mesh], np.ndarray
]


def whole(
    q_NhK: np.ndarray,
    k_NgK: np.ndarray,
    v_NgK: np.ndarray,
    layer: int,
    step: Step,
    scale: float,
    window: int | None,
    mesh: Mesh,
) -> np.ndarray:
    """Each sequence's new tokens over its cache, new keys and values included: (N, h, K)."""
    out_NhK = np.empty_like(q_NhK)
    for segment in step.segments:
        new, cache = segment.new, segment.cache
        cache.store(layer, k_NgK[new], v_NgK[new])
        k_gTK, v_gTK, at_T = cache.read(layer)
        at_S = step.positions_N[new]
        out_NhK[new], _ = attend(q_NhK[new], at_S, k_gTK, v_gTK, at_T, scale, window)
    return out_NhK


def divided(
    prefill: context.Prefill,
    merge: flash_decoding.Merge,
    q_NhK: np.ndarray,
    k_NgK: np.ndarray,
    v_NgK: np.ndarray,
    layer: int,
    step: Step,
    scale: float,
    window: int | None,
    mesh: Mesh,
) -> np.ndarray:
    """Each sequence's new tokens over all its positions, of which this rank keeps only some:
    (N, h, K)."""
    out_NhK = np.empty_like(q_NhK)
    for segment in step.segments:
        new, kept = segment.new, segment.kept
        segment.cache.store(layer, k_NgK[new][kept], v_NgK[new][kept])
    if step.fresh:  # the same on all ranks of the replica
        prefill(q_NhK, k_NgK, v_NgK, step, scale, window, mesh, out_NhK)
    if step.continued:
        flash_decoding.decode(q_NhK, layer, step, scale, window, mesh, merge, out_NhK)
    return out_NhK


def attention_of(layout: Layout) -> Attend:
    """The form that `layout` asks for."""
    if not layout.divides_cache:
        return whole
    return partial(divided, context.PREFILLS[layout.prefill], flash_decoding.MERGES[layout.merge])
