"""The sweeps have what they promise: every model meets every option, and every two options meet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations, product

import pytest
from sweep import (
    AXES,
    CHUNKS,
    COSTS,
    EVERY_VARIANT,
    FORMS,
    REPRESENTATIVES,
    Trial,
    accepted,
    course,
    degrees,
    fits,
    swept_in_float32,
    trials,
)
from tiny_models import MOE_VARIANTS, tiny_config

from mpishard.config.layout import TOKEN_DISPATCHERS


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_every_option_occurs_in_every_models_course(variant: str):
    config, layouts = tiny_config(variant), course(variant)
    assert any(layout.world_size == 1 for layout in layouts)
    for layout in layouts:
        assert fits(layout, config) and layout == accepted(layout, config)
    for degree in ("tp", "cp", "dp"):
        assert any(getattr(layout, degree) > 1 for layout in layouts)
    for form, values in AXES.items():
        possible = set(values)
        if form == "flash_decoding":
            possible = {any(config.kv_heads < tp <= config.heads for tp in COSTS), False}
        assert {getattr(layout, form) for layout in layouts} == possible
    if config.moe is not None:
        shared = [layout for layout in layouts if layout.ep > 1]
        assert {layout.moe_token_dispatcher for layout in shared} == set(TOKEN_DISPATCHERS)
        assert {layout.replicas_per_ep_group > 1 for layout in shared} == {False, True}


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_a_course_is_short(variant: str):
    """What a new model costs: about a second of processor time."""
    assert sum(COSTS[layout.world_size] for layout in course(variant)) <= 60
    assert sum(len(swept_in_float32(ranks, variant)) for ranks in COSTS) <= 2


def pairs(tried: Iterable[Trial]) -> set[tuple[object, ...]]:
    """Every two of the degrees, forms and lengths of chunks that meet in one of the trials."""
    met: set[tuple[object, ...]] = set()
    for layout, chunk in tried:
        values = {form: getattr(layout, form) for form in AXES}
        values |= {"degrees": layout.shape, "chunk": chunk}
        met.update(combinations(values.items(), 2))
    return met


@pytest.mark.parametrize("ranks", COSTS)
def test_every_two_options_meet_on_every_number_of_ranks(ranks: int):
    """Those that some layout has which `mpishard.load` takes for some model."""
    tried = {trial for variant in REPRESENTATIVES for trial in trials(ranks, variant)}
    possible = {
        Trial(layout, chunk)
        for heads in {(c.heads, c.kv_heads): c for c in map(tiny_config, REPRESENTATIVES)}.values()
        for plain, form, chunk in product(degrees(ranks), FORMS, CHUNKS)
        if plain.tp <= heads.heads and (layout := replace(plain, **form)) == accepted(layout, heads)
    }
    assert pairs(possible) <= pairs(tried)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_experts_are_divided_in_every_way_by_both_dispatchers(ranks: int):
    tried = {
        (trial.layout.ep, trial.layout.moe_token_dispatcher)
        for variant in MOE_VARIANTS
        for trial in trials(ranks, variant)
    }
    divisors = [ep for ep in range(1, ranks + 1) if ranks % ep == 0]
    assert tried == {(ep, dispatcher) for ep in divisors for dispatcher in TOKEN_DISPATCHERS}
