"""Which layouts each tiny model is tested on: few of the many, so chosen that what can meet meets.

A sweep over all models and all layouts would take hours. Two designs take its place:

- `course`: every model, of every family, runs on a handful of layouts of 1 to 8 ranks in which each
  value of each option occurs that has an effect on it. On each layout it goes through all phases:
  first chunks, further chunks and decode, alone and side by side. So every triple of model, option
  and phase occurs. A new model has a course as soon as `tiny_models` has its configuration.
- `designed`: for each number of ranks, layouts in which every two options meet, of any degrees,
  assigned to the `REPRESENTATIVES`: one model of each form. They do not grow with the models.

``pytest --exhaustive`` has all degrees for all models on all numbers of ranks instead, the forms in
turn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import fields, replace
from functools import cache
from itertools import product
from typing import Any, NamedTuple
from zlib import crc32

import covering
import pytest
from tiny_models import MOE_VARIANTS, VARIANTS, tiny_config

from mpishard.config.layout import (
    CP_ORDERS,
    CP_PREFILLS,
    DECODE_MERGES,
    TOKEN_DISPATCHERS,
    Layout,
)
from mpishard.config.layout_checks import check_experts, check_tensor_parallel
from mpishard.config.model_config import ModelConfig
from mpishard.errors import UserError

AXES: dict[str, Sequence[Any]] = {  # the forms of a layout, by its fields
    "sequence_parallel": (False, True),
    "flash_decoding": (False, True),
    "cp_prefill": CP_PREFILLS,
    "cp_order": CP_ORDERS,
    "decode_merge": DECODE_MERGES,
    "cp_kv_cache_interleave_size": (1, 3),
}
FORMS = [dict(zip(AXES, values, strict=True)) for values in product(*AXES.values())]
SWITCHES = ("sequence_parallel", "flash_decoding")
LAYOUT_FIELDS = {field.name for field in fields(Layout)}
EVERY_VARIANT = (*VARIANTS, *MOE_VARIANTS)

# One model of each form of attention, of rotary embedding and of experts.
REPRESENTATIVES = (
    *("llama-mha", "llama-gqa", "llama-mqa", "llama-uneven", "llama-dynamic-old"),
    *("mistral-window", "mistral-full", "qwen2-tied", "qwen3-mixed", "qwen3-bias"),
    *("gemma2-capped", "gemma2-plain"),
    *("gpt2-layers", "gpt_neox-parallel", "falcon-grouped-alibi"),
    *("mixtral-full", "qwen2_moe-mixed", "qwen3_moe-plain", "olmoe-normed"),
    *("gpt_oss-yarn", "deepseek_v2-full", "deepseek_v3-groups"),
    *("phi3-longrope", "llama4-chunks"),
)

# What a layout of so many ranks costs: processor time, roughly.
COSTS = {1: 1, 2: 2, 3: 4, 4: 6, 6: 12, 8: 20}


def degrees(ranks: int) -> list[Layout]:
    """Every ``dp * cp * tp`` of `ranks` ranks, without any switch."""
    sizes = range(1, ranks + 1)
    return [
        Layout(tp=tp, cp=cp, dp=ranks // (cp * tp))
        for tp, cp in product(sizes, sizes)
        if ranks % (cp * tp) == 0
    ]


def accepted(layout: Layout, config: ModelConfig) -> Layout:
    """`layout` as `mpishard.load` takes it: without forms that have no effect on this model."""
    if layout.tp <= config.kv_heads:
        layout = replace(layout, flash_decoding=False)
    return in_effect(layout, config.heads > config.kv_heads)


def in_effect(layout: Layout, shares: bool) -> Layout:
    """`layout` without forms that have no effect on models whose query heads share key/value heads
    or do not. Flash decoding over ranks that share none has groups of one rank, and stays."""
    changes: dict[str, Any] = {}
    if layout.tp == 1:
        changes["sequence_parallel"] = False
    if layout.tp == 1 or not shares:
        changes["flash_decoding"] = False
    if layout.cp == 1:
        changes |= {"cp_prefill": CP_PREFILLS[0], "cp_order": CP_ORDERS[0]}
    layout = replace(layout, **changes)
    if layout.shards_kv_positions:
        return layout
    return replace(layout, decode_merge=DECODE_MERGES[0], cp_kv_cache_interleave_size=1)


def number_of(variant: str) -> int:
    """A number by which models take turns, which does not change when others come."""
    return crc32(variant.encode())


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def fits(layout: Layout, config: ModelConfig) -> bool:
    """Whether the model has heads and experts for `layout`."""
    try:
        check_tensor_parallel(config, layout.tp)
        check_experts(config, layout, [])
    except UserError:
        return False
    return True


def over(layouts_of: Callable[[int, str], Collection[Any]]) -> Callable[[Any], Any]:
    """Parametrizes a test with each `variant` for which `layouts_of` has something on the number of
    ranks."""

    def mark(test: Any) -> Any:
        test = pytest.mark.parametrize("variant", EVERY_VARIANT)(test)
        return pytest.mark.sweep.with_args(layouts_of)(test)

    return mark


# A course for every model


def swept(ranks: int, variant: str) -> list[Layout]:
    """The layouts of `ranks` ranks that `variant` is held to the reference on."""
    if covering.exhaustive:
        return every_layout(ranks, variant)
    return [layout for layout in course(variant) if layout.world_size == ranks]


def swept_in_float32(ranks: int, variant: str) -> list[Layout]:
    """Those of them that it is held to transformers on: one, or two, of all numbers of ranks."""
    if covering.exhaustive:
        return every_layout(ranks, variant)
    chosen = course(variant)
    turn = number_of(variant) % len(chosen)
    return [one for one in {Layout(): 0, chosen[turn]: 0} if one.world_size == ranks]


@cache
def course(variant: str) -> tuple[Layout, ...]:
    """Layouts of 1 to 8 ranks in which every value of every option occurs that has an effect on
    `variant`, few and of few ranks. Which values meet differs from model to model."""
    config = tiny_config(variant)
    candidates = list(_candidates(variant, config))
    effects = {layout: frozenset(_effects(layout, config)) for layout in candidates}
    missing = frozenset().union(*effects.values())
    chosen = []
    while missing:
        best = max(
            candidates,
            key=lambda one: len(effects[one] & missing) / COSTS[one.world_size],
        )
        chosen.append(best)
        missing -= effects[best]
    return tuple(chosen)


def _candidates(variant: str, config: ModelConfig) -> Iterator[Layout]:
    """All degrees of all numbers of ranks, each in some forms that are drawn for this model."""
    draw = random.Random(variant)
    for ranks in COSTS:
        for plain in degrees(ranks):
            for switches in product((False, True), repeat=2):
                form = draw.choice(FORMS) | dict(zip(SWITCHES, switches, strict=True))
                ep = draw.choice([n for n in range(1, ranks + 1) if ranks % n == 0])
                layout = accepted(replace(plain, **form), config)
                if config.moe is not None:
                    dispatcher = draw.choice(TOKEN_DISPATCHERS)
                    layout = replace(layout, ep=ep, moe_token_dispatcher=dispatcher)
                if fits(layout, config):
                    yield layout


def _effects(layout: Layout, config: ModelConfig) -> Iterator[tuple[Any, ...]]:
    """What a layout, `accepted` for the model, lets it try."""
    tp, cp, dp, kv_heads = layout.tp, layout.cp, layout.dp, config.kv_heads
    yield ("degrees", tp > 1, cp > 1, layout.world_size == 1)
    if dp > 1:
        yield ("replicas",)
    if layout.world_size == 2:  # where a fault shows first
        yield ("alone", tp, cp, layout.sequence_parallel)
    if tp > 1:
        yield ("sequence parallel", layout.sequence_parallel)
        yield ("key/value heads", tp > kv_heads or (kv_heads % tp > 0 and "uneven"))
    if cp > 1:
        yield ("prefill", layout.cp_prefill)
        yield ("order", layout.cp_order)
    if layout.shards_kv_positions:
        yield ("merge", layout.decode_merge)
        yield ("interleaved", layout.cp_kv_cache_interleave_size)
        yield ("flash decoding", layout.flash_decoding)
    if config.moe is not None and layout.world_size > 1:
        width = max(1, layout.replica_size // layout.ep)
        yield ("experts", layout.ep > 1, width > 1)
        yield ("replicas that share experts", layout.replicas_per_ep_group > 1)
        if layout.ep > 1:
            yield ("dispatch", layout.moe_token_dispatcher)


# A design for every number of ranks

SHARES = ("some", "none", "all")
CHUNKS = (None, 4)  # prompts whole or in chunks


class Trial(NamedTuple):
    """A layout, and how long the chunks of prompts are."""

    layout: Layout
    chunk: int | None


def trials(ranks: int, variant: str) -> list[Trial]:
    """What `variant` tries of the design for `ranks` ranks."""
    if covering.exhaustive:
        return [Trial(*one) for one in product(every_layout(ranks, variant), CHUNKS)]
    return _designed(ranks)[variant] if variant in REPRESENTATIVES else []


def moe_layouts(ranks: int, variant: str) -> list[Layout]:
    """The layouts among the `trials` of a mixture of experts."""
    if variant not in MOE_VARIANTS:
        return []
    return list(dict.fromkeys(trial.layout for trial in trials(ranks, variant)))


@cache
def _designed(ranks: int) -> dict[str, list[Trial]]:
    """Trials in which every two of the degrees, the forms, the ways to share heads, the ways to
    divide experts and the lengths of chunks meet."""
    axes = AXES | {"degrees": degrees(ranks), "chunk": CHUNKS}
    moe = {"ep": divisors(ranks), "moe_token_dispatcher": TOKEN_DISPATCHERS}
    found: dict[str, list[Trial]] = {variant: [] for variant in REPRESENTATIVES}
    for more in ({"shares": SHARES}, moe):
        for row in covering.covering(axes | more, allowed=lambda row: bool(_takers(row))):
            layout = layout_of(row)

            def preference(variant: str, layout: Layout = layout) -> tuple[bool, int]:
                idle = layout.flash_decoding and layout.tp <= tiny_config(variant).kv_heads
                return idle, len(found[variant])

            best = min(_takers(row), key=preference)
            found[best].append(Trial(layout, row["chunk"]))
    return found


def _takers(row: covering.Row) -> list[str]:
    """The representatives on which all that a row of the design says has an effect."""
    layout, fitting = layout_of(row), _fitting(row["degrees"], row.get("ep"))
    wanted = row.get("shares")
    return [
        variant
        for variant, shares in fitting.items()
        if wanted in (shares, None) and has_effect(layout, shares != "none")
    ]


@cache
def _fitting(plain: Layout, ep: int | None) -> dict[str, str]:
    """The representatives without experts, or with experts that `ep` ranks can shard, whose heads
    `plain` can shard; and how many of them share a key/value head: none, some, or all one."""
    found = {}
    for variant in REPRESENTATIVES:
        config = tiny_config(variant)
        if (config.moe is None) == (ep is None) and fits(replace(plain, ep=ep or 1), config):
            none = config.heads == config.kv_heads
            found[variant] = "none" if none else "all" if config.kv_heads == 1 else "some"
    return found


def layout_of(row: covering.Row) -> Layout:
    """The layout that a row of a design describes."""
    forms = {name: value for name, value in row.items() if name in LAYOUT_FIELDS}
    layout: Layout = row["degrees"]
    return replace(layout, **forms)


def has_effect(layout: Layout, shares: bool) -> bool:
    """Whether every form of `layout` that is not the default one changes something, where heads
    are shared or not: ``layout == in_effect(layout, shares)``, which takes too long for thousands
    of layouts."""
    if layout.tp == 1 and layout.sequence_parallel:
        return False
    if layout.flash_decoding and (layout.tp == 1 or not shares):
        return False
    if layout.cp == 1 and (layout.cp_prefill, layout.cp_order) != (CP_PREFILLS[0], CP_ORDERS[0]):
        return False
    cached = layout.decode_merge, layout.cp_kv_cache_interleave_size
    return layout.shards_kv_positions or cached == (DECODE_MERGES[0], 1)


# Every degree in turn


def layouts(ranks: int, variant: str) -> list[Layout]:
    """Layouts of `ranks` ranks for a test of one model or a few: all degrees that `variant` has
    heads for, each in one of the 96 combinations of forms. Two ranks have them without forms, too.
    More ranks take turns: which degrees of replicas, with or without forms, and which forms go
    round with the model."""
    config, number, found = tiny_config(variant), number_of(variant), []
    for place, layout in enumerate(degrees(ranks)):
        if not fits(layout, config):
            continue
        if ranks > 2 and layout.dp > 1 and (number + place) % 4 and not covering.exhaustive:
            continue  # replicas are copies of fewer ranks' layouts
        changed = in_form(layout, config, 37 * number + 29 * place + 11 * ranks)
        if ranks <= 2:
            found += [layout] if changed == layout else [layout, changed]
        else:
            found.append(layout if (number + place) % 3 == 0 else changed)
    return found


def a_few_layouts(ranks: int, variant: str) -> list[Layout]:
    """Two of the `layouts`, for a test of several models, which go round with the model."""
    found = layouts(ranks, variant)
    first = number_of(variant) // 7 % len(found)
    return [found[first], *[found[first - 1]] * (len(found) > 1)]


@cache
def every_layout(ranks: int, variant: str) -> list[Layout]:
    """All degrees of `ranks` ranks that fit `variant`, with every `ep`, each in one of the 96
    combinations of forms."""
    config, number, found = tiny_config(variant), number_of(variant), []
    for place, plain in enumerate(degrees(ranks)):
        for ep in divisors(ranks) if config.moe else [1]:
            layout = in_form(plain, config, 37 * number + 29 * place + 7 * ep + 11 * ranks)
            if config.moe:
                dispatcher = TOKEN_DISPATCHERS[(place + ep) % 2]
                layout = replace(layout, ep=ep, moe_token_dispatcher=dispatcher)
            if fits(layout, config):
                found.append(layout)
    return found


def in_form(layout: Layout, config: ModelConfig, turn: int) -> Layout:
    """`layout` in the forms whose turn it is, as far as they have an effect."""
    return in_effect(replace(layout, **FORMS[turn % len(FORMS)]), config.heads > config.kv_heads)
