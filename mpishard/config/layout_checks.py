"""Makes a layout of what a user asks for, or refuses it with a sentence that says what to change.

`make_layout` checks what does not depend on a model; the other functions check a layout, or a part
of it, against a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mpishard.config.layout import LAYOUT_OPTIONS, Layout
from mpishard.config.model_config import MAX_POSITIONS, ModelConfig, MoEConfig
from mpishard.errors import UserError, WrongRanks


def check_tensor_parallel(config: ModelConfig, tp: int) -> None:
    """Refuse a `tp` that leaves a rank without a query head (UserError)."""
    if tp > config.heads:
        raise UserError(
            f"--tp {tp} is more than the model's {config.heads} query heads: "
            f"a rank without a head would have nothing to do; use --tp 1 to {config.heads}"
        )
    linear = config.linear_attention
    if linear and tp > linear.heads:
        raise UserError(
            f"--tp {tp} is more than the {linear.heads} value heads of the model's linear "
            f"attention: a rank without a head would have nothing to do; use --tp 1 to "
            f"{min(config.heads, linear.heads)}"
        )


def check_expert_parallel(moe: MoEConfig, ep: int) -> None:
    """Refuse an `ep` that leaves a rank without an expert (UserError)."""
    if not 1 <= ep <= moe.num_experts:
        raise UserError(
            f"--ep {ep} must be 1 to the model's {moe.num_experts} experts: "
            "a rank without an expert would have nothing to do"
        )


def check_flash_decoding(config: ModelConfig, tp: int) -> None:
    """Refuse flash decoding where no two ranks of `tp` hold the same key/value head (UserError)."""
    heads, kv_heads = config.heads, config.kv_heads
    shards = "--flash-decoding shards the cache over ranks of --tp that share a key/value head"
    if heads == kv_heads:
        raise UserError(
            f"{shards}, but with {heads} query heads and {kv_heads} key/value heads no --tp makes "
            "any share one: leave it out, or shard the cache with --cp 2"
        )
    if tp <= kv_heads:
        raise UserError(
            f"{shards}, but with --tp {tp} and {kv_heads} key/value heads none do: leave it out, "
            f"give --tp {kv_heads + 1} to {heads}, or shard the cache with --cp 2"
        )


def check_degrees(tp: int | None, dp: int | None, cp: int) -> None:
    """Refuse a degree below 1 (UserError); None is a degree that is not given."""
    for flag, value in (("--tp", tp), ("--dp", dp), ("--cp", cp)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value} must be at least 1")


def make_layout(
    world_size: int,
    tp: int = 1,
    dp: int | None = None,
    cp: int = 1,
    **layout_options: bool | float | str | None,
) -> Layout:
    """The layout of `world_size` ranks. Without `dp` there are ``world_size / (cp * tp)`` replicas.
    `layout_options` are other fields of `Layout`; None is the default.

    Raises UserError for a value out of range and for an option without effect, and WrongRanks if
    ``dp * cp * tp`` is not `world_size`.
    """
    check_degrees(tp, dp, cp)
    given = {name: value for name, value in layout_options.items() if value is not None}
    replicas = dp or max(1, world_size // (cp * tp))
    layout = Layout(tp=tp, dp=replicas, cp=cp, **given)  # type: ignore[arg-type]
    _check_layout_options(layout, given)
    if layout.world_size == world_size:
        return layout
    if dp is not None:
        problem = (
            f"{layout.degrees} needs {layout.world_size} ranks but {_were(world_size)} started"
        )
    elif cp == 1:
        problem = f"--tp {tp} does not divide the {_ranks_were(world_size)} started"
    else:
        replica_size = f"--tp {tp} --cp {cp} makes replicas of {layout.replica_size} ranks"
        problem = f"{replica_size}, which do not divide the {_ranks_were(world_size)} started"
    raise WrongRanks(f"{problem}: run `{{command}}`", layout.world_size, tp)


# The properties that an option may need, and the end of the sentence that refuses the option where
# the layout has not the property.
NEEDS: dict[str, tuple[Callable[[Layout], bool], str]] = {
    "tp": (
        lambda layout: layout.tp > 1,
        "with --tp 1: leave it out, or give --tp 2 or more",
    ),
    "cp": (
        lambda layout: layout.cp > 1,
        "with --cp 1: leave it out, or give --cp 2 or more",
    ),
    "sharded cache": (
        lambda layout: layout.shards_kv_positions,
        "where every rank has the whole cache of its heads: leave it out, or shard the cache with "
        "--flash-decoding or --cp 2",
    ),
    "sharded experts": (
        lambda layout: layout.ep > 1,
        "with --ep 1, where every rank has all experts: leave it out, or give the --ep that it was "
        "made for",
    ),
    "capacity": (
        lambda layout: layout.expert_capacity_factor > 0,
        "where nothing is dropped: leave it out, or give --expert-capacity-factor",
    ),
}


def _check_layout_options(layout: Layout, given: dict[str, bool | float | str]) -> None:
    for option in LAYOUT_OPTIONS.values():
        value = getattr(layout, option.name)
        if option.choices and value not in option.choices:
            known = ", ".join(option.choices)
            raise UserError(f"{option.flag} {value} must be one of {known}")
    if not 1 <= layout.cp_kv_cache_interleave_size <= MAX_POSITIONS:
        raise UserError(
            f"--cp-kv-cache-interleave-size {layout.cp_kv_cache_interleave_size} must be 1 to "
            f"{MAX_POSITIONS}"
        )
    if "expert_capacity_factor" in given and not 0 < layout.expert_capacity_factor < math.inf:
        raise UserError(
            f"--expert-capacity-factor {layout.expert_capacity_factor} must be a number "
            "above 0: how many times its even share of a step's rows an expert takes; leave it "
            "out to drop nothing"
        )
    for name, value in given.items():
        option = LAYOUT_OPTIONS[name]
        if option.needs and value is not False:
            is_met, otherwise = NEEDS[option.needs]
            if not is_met(layout):
                raise UserError(f"{option.as_typed(value)} has no effect {otherwise}")


def check_experts(config: ModelConfig, layout: Layout, given: Sequence[str]) -> None:
    """Refuse an `ep` that does not fit the model's experts or the ranks, and options for experts
    among the `given` ones if the model has no experts (UserError)."""
    moe, ep, replica_size = config.moe, layout.ep, layout.replica_size
    if moe is None:
        for option in LAYOUT_OPTIONS.values():
            if option.moe and option.name in given:
                flag = option.as_typed(getattr(layout, option.name))
                raise UserError(f"{flag} has no effect on a model without experts: leave it out")
        return
    if moe.capacity is not None and layout.expert_capacity_factor:
        raise UserError(
            f"--expert-capacity-factor {layout.expert_capacity_factor:g} contradicts the model, "
            f"whose experts take {moe.capacity} tokens of a sequence: leave it out"
        )
    if config.encoder is not None and "expert_placement" in given:
        raise UserError("--expert-placement is not built for a model with an encoder: leave it out")
    check_expert_parallel(moe, ep)
    fits = [n for n in range(1, min(moe.num_experts, layout.world_size) + 1) if _divides(n, layout)]
    if not _divides(ep, layout):
        raise UserError(
            f"--ep {ep} does not divide {layout.degrees}: it must divide the {replica_size} ranks "
            f"of a replica, or be a number of whole replicas that divides them; use --ep "
            f"{' or '.join(map(str, fits))}"
        )
    if replica_size // ep > moe.moe_intermediate_size:
        raise UserError(
            f"--ep {ep} leaves {replica_size // ep} ranks to divide the width "
            f"{moe.moe_intermediate_size} of an expert: use a larger --ep of "
            f"{' or '.join(map(str, fits))}"
        )


def _divides(ep: int, layout: Layout) -> bool:
    if ep <= layout.replica_size:
        return layout.replica_size % ep == 0
    return ep % layout.replica_size == 0 and layout.dp % (ep // layout.replica_size) == 0


def _were(number: int) -> str:
    return f"{number} was" if number == 1 else f"{number} were"


def _ranks_were(number: int) -> str:
    return f"{number} rank that was" if number == 1 else f"{number} ranks that were"
