"""Tiny models divided over a mesh, for the tests that run on several ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache
from itertools import pairwise, product
from typing import Any

import covering
import numpy as np
import pytest
from mpi4py import MPI
from tiny_models import MOE_VARIANTS, VARIANTS, separate_weights, tiny_config, tiny_weights

from mpishard.communication.collectives import all_gather
from mpishard.communication.mesh import Mesh
from mpishard.config.expert_placement import ExpertPlacement
from mpishard.config.layout import CP_ORDERS, CP_PREFILLS, DECODE_MERGES, Layout, block, block_sizes
from mpishard.config.model_config import ModelConfig
from mpishard.config.weight_specs import specs_of_shard
from mpishard.model import Decoder, HiddenStateHook
from mpishard.parallel import context
from mpishard.reference import Reference
from mpishard.sequences.kv_cache import KVCache
from mpishard.sequences.step import Step

FORMS = list(
    product((True, False), (True, False), CP_PREFILLS, CP_ORDERS, DECODE_MERGES, (1, 3))
)  # sequence_parallel, flash_decoding, prefill, order, merge, interleave

AXES: dict[str, Sequence[Any]] = {  # the same, by the field of a layout
    "sequence_parallel": (False, True),
    "flash_decoding": (False, True),
    "cp_prefill": CP_PREFILLS,
    "cp_order": CP_ORDERS,
    "decode_merge": DECODE_MERGES,
    "cp_kv_cache_interleave_size": (1, 3),
}
LAYOUT_FIELDS = {field.name for field in fields(Layout)}
SHARES = ("some", "none", "all")

# From so many ranks on, sweeps over all variants take one of each form of model, unless all is
# asked for (--exhaustive): fewer ranks have tried the others.
MANY = range(6, 1000)
REPRESENTATIVES = (
    *("llama-mha", "llama-gqa", "llama-mqa", "llama-uneven", "llama-dynamic-old"),
    *("mistral-window", "mistral-full", "qwen2-tied", "qwen3-mixed", "qwen3-bias"),
    *("gemma2-capped", "gemma2-plain"),
    *("mixtral-full", "qwen2_moe-mixed", "qwen3_moe-plain", "olmoe-normed"),
    *("gpt_oss-yarn", "deepseek_v2-full", "deepseek_v3-groups"),
)


def every_variant(test: Any) -> Any:
    """Parametrizes a test with all variants, on many ranks with the `REPRESENTATIVES`."""
    return pytest.mark.sweep(pytest.mark.parametrize("variant", VARIANTS)(test))


def every_mixture(test: Any) -> Any:
    """The same with all mixtures of experts."""
    return pytest.mark.sweep(pytest.mark.parametrize("variant", MOE_VARIANTS)(test))


def degrees(ranks: int) -> list[Layout]:
    """Every ``dp * cp * tp`` of `ranks` ranks, without any switch."""
    sizes = range(1, ranks + 1)
    return [
        Layout(tp=tp, cp=cp, dp=ranks // (cp * tp))
        for tp, cp in product(sizes, sizes)
        if ranks % (cp * tp) == 0
    ]


def layouts(ranks: int, variant: str) -> list[Layout]:
    """Layouts of `ranks` ranks that `variant` has heads for: without switches, and with one of the
    96 combinations of forms. Two ranks take all degrees both ways. More ranks take turns: which
    degrees, with or without, and which forms go round with the variant, so that over all variants
    every form meets every degree. Many ranks divide a covering design among the `REPRESENTATIVES`,
    unless all is asked for."""
    config, number = tiny_config(variant), list(VARIANTS).index(variant)
    if ranks in MANY and not covering.exhaustive:
        shares = _shares(variant)
        design = _designed(ranks)
        alike = next(name for name in design if _shares(name) == shares)
        found = design.get(variant) or design[alike]
        return [layout for layout in found if layout.tp <= config.heads]
    found = []
    for place, layout in enumerate(degrees(ranks)):
        if layout.tp > config.heads:
            continue
        if ranks > 2 and layout.dp > 1 and (number + place) % 4:
            continue  # replicas are copies of fewer ranks' layouts
        changed = switched(layout, config, 37 * number + 29 * place + 11 * ranks)
        if ranks <= 2 or changed == layout:
            found += [layout] if changed == layout else [layout, changed]
        else:
            found.append(layout if (number + place) % 3 == 0 else changed)
    return found


@cache
def _designed(ranks: int) -> dict[str, list[Layout]]:
    """Layouts in which every two of the degrees, the forms and the ways to share heads meet, and
    the forms of a prompt and those of a cache that is divided for each of the degrees."""
    axes = AXES | {"degrees": degrees(ranks), "shares": SHARES}

    def allowed(row: covering.Row) -> bool:
        return has_effect(layout_of(row), row["shares"] != "none")

    rows = covering.covering(
        axes,
        [("degrees", "cp_prefill", "cp_order"), ("degrees", "flash_decoding", "decode_merge")],
        allowed,
    )

    def fits(row: covering.Row, variant: str) -> bool:
        return _shares(variant) == row["shares"] and row["degrees"].tp <= tiny_config(variant).heads

    return dealt(rows, [variant for variant in REPRESENTATIVES if variant in VARIANTS], fits)


def dealt(
    rows: list[covering.Row],
    variants: Sequence[str],
    fits: Callable[[covering.Row, str], bool],
) -> dict[str, list[Layout]]:
    """The layouts of `rows`, each for the one of the `variants` that it `fits` which has fewest."""
    found: dict[str, list[Layout]] = {variant: [] for variant in variants}
    for row in rows:
        mine = min((v for v in variants if fits(row, v)), key=lambda variant: len(found[variant]))
        found[mine].append(layout_of(row))
    return found


def layout_of(row: covering.Row) -> Layout:
    """The layout that a row of a covering design describes."""
    forms = {name: value for name, value in row.items() if name in LAYOUT_FIELDS}
    layout: Layout = row["degrees"]
    return replace(layout, **forms)


def has_effect(layout: Layout, shares: bool) -> bool:
    """Whether every form of `layout` that is not the first one changes something, where heads are
    shared or not."""
    plain = Layout(tp=layout.tp, cp=layout.cp, dp=layout.dp)
    if layout.flash_decoding and not (shares and layout.tp > 1):
        return False
    if layout.sequence_parallel and layout.tp == 1:
        return False
    if layout.cp == 1 and (layout.cp_prefill, layout.cp_order) != (
        plain.cp_prefill,
        plain.cp_order,
    ):
        return False
    cached = layout.decode_merge, layout.cp_kv_cache_interleave_size
    return layout.shards_kv_positions or cached == (
        plain.decode_merge,
        plain.cp_kv_cache_interleave_size,
    )


def _shares(variant: str) -> str:
    """Whether query heads share key/value heads: none, some, or all the same one."""
    config = tiny_config(variant)
    if config.heads == config.kv_heads:
        return "none"
    return "all" if config.kv_heads == 1 else "some"


def switched(layout: Layout, config: ModelConfig, turn: int) -> Layout:
    """`layout` in the forms whose turn it is, as far as they have an effect."""
    sp, flash, prefill, order, merge, interleave_size = FORMS[turn % len(FORMS)]
    shares = config.heads > config.kv_heads
    layout = replace(layout, sequence_parallel=sp, flash_decoding=flash and shares)
    if layout.cp > 1:
        layout = replace(layout, cp_prefill=prefill, cp_order=order)
    if layout.shards_kv_positions:
        layout = replace(layout, decode_merge=merge, cp_kv_cache_interleave_size=interleave_size)
    return layout


def accepted(layout: Layout, config: ModelConfig) -> Layout:
    """`layout` as `mpishard.load` takes it: without forms that have no effect on this model."""
    layout = replace(
        layout,
        sequence_parallel=layout.sequence_parallel and layout.tp > 1,
        flash_decoding=layout.flash_decoding and layout.tp > config.kv_heads,
    )
    if not layout.shards_kv_positions:
        plain = Layout()
        layout = replace(
            layout,
            decode_merge=plain.decode_merge,
            cp_kv_cache_interleave_size=plain.cp_kv_cache_interleave_size,
        )
    return layout


def meshes(comm: MPI.Intracomm, variant: str) -> Iterator[Mesh]:
    """A mesh of each of the `layouts` of the ranks of `comm`."""
    for layout in layouts(comm.size, variant):
        with mesh_of(comm, variant, layout) as mesh:
            yield mesh


@contextmanager
def mesh_of(
    comm: MPI.Intracomm, variant: str, layout: Layout, placement: ExpertPlacement | None = None
) -> Iterator[Mesh]:
    """The mesh of `layout` for `variant`, freed afterwards."""
    mesh = Mesh.split(comm, layout, tiny_config(variant), placement)
    yield mesh
    mesh.free()


def toy(variant: str, mesh: Mesh, dtype: type = np.float64) -> Decoder:
    """`variant` on this rank of `mesh`, cut by the partition table."""
    config, weights = tiny_config(variant), separate_weights(variant, dtype)
    shards = {
        weight.name: weights[weight.name][
            weight.slices(config, mesh.weight_sharding, mesh.shard_index)
        ]
        for weight in specs_of_shard(config, mesh.weight_sharding, mesh.shard_index)
    }
    return Decoder(config, shards, mesh)


class Recorder(Decoder):
    """A model that keeps every step it is fed, what it answers, and for each wanted token the
    cache of its sequence and the sequence's length by then."""

    def __init__(self, model: Decoder) -> None:
        self.__dict__.update(model.__dict__)
        self.steps: list[Step] = []
        self.logits: list[np.ndarray] = []
        self.asked: list[list[tuple[KVCache, int]]] = []

    def forward(self, step: Step, observe: HiddenStateHook | None = None) -> np.ndarray:
        self.steps.append(step)
        self.logits.append(super().forward(step, observe))
        complete = [s for s in step.segments if s.num_known == s.cache.length]
        self.asked.append([(segment.cache, segment.num_known) for segment in complete])
        return self.logits[-1]


class Remembering(Reference):
    """A reference that computes a sequence once, for all layouts that are held to it."""

    def __init__(self, config: ModelConfig, weights: dict[str, np.ndarray]) -> None:
        super().__init__(config, weights)
        self.known: dict[tuple[int, ...], tuple[np.ndarray, list[np.ndarray]]] = {}

    def forward(self, ids_S: Sequence[int]) -> tuple[np.ndarray, list[np.ndarray]]:
        ids = tuple(map(int, ids_S))
        if ids not in self.known:
            logits_SV, hidden = self.known[ids] = super().forward(ids)
            for array in (logits_SV, *hidden):
                array.flags.writeable = False
        return self.known[ids]


@cache
def oracle(variant: str) -> Reference:
    """The reference of `variant`, in float64."""
    return Remembering(tiny_config(variant), tiny_weights(variant))


def whole_logits(logits_Mv: np.ndarray, model: Decoder, step: Step) -> np.ndarray:
    """The logits of all wanted tokens of a step and of all ranks' blocks of the vocabulary, in the
    order of the sequences: (M, V)."""
    tp = model.mesh.tp
    sizes = block_sizes(model.config.vocab, tp.size)
    logits_MV = all_gather(logits_Mv, tp, axis=1, sizes=sizes)
    return context.gather_sequence(logits_MV, step.logits_owner_index, model.mesh)


def slices(step: Step) -> list[slice]:
    """The places of each sequence's new tokens among those of all ranks."""
    stops = np.cumsum(
        [sum(map(len, segment.positions_by_rank)) for segment in step.segments]
    ).tolist()
    return [slice(*bounds) for bounds in pairwise([0, *stops])]


def tokens_of_ranks(mesh: Mesh, model: Decoder, count: int) -> list[np.ndarray]:
    """The positions of a prompt of `count` tokens, fed by the first replica, that each rank which
    shares the experts routes."""
    layout = mesh.layout
    if mesh.world.rank // max(layout.replica_size, layout.ep) != 0:
        return [np.empty(0, int)] * mesh.moe.size
    tokens = []
    for replica in range(layout.replicas_per_ep_group):
        for at in model.sequence_sharding.tokens(0, count):
            at = at if replica == 0 else at[:0]
            tokens += [at[block(len(at), layout.tp, rank)] for rank in range(layout.tp)]
    return tokens
