"""From what a caller asks for to the layout that a model is loaded in."""

from __future__ import annotations

import shlex
from pathlib import Path

from mpishard.config.expert_placement import ExpertPlacement
from mpishard.config.layout import LAYOUT_OPTIONS, Layout
from mpishard.config.layout_checks import (
    check_degrees,
    check_flash_decoding,
    check_tensor_parallel,
    make_layout,
)
from mpishard.config.model_config import ModelConfig
from mpishard.errors import WrongRanks
from mpishard.storage.model_dir import read_json
from mpishard.storage.shards import ShardDirectory
from mpishard.storage.source import Source


def check_arguments(layout_options: dict[str, bool | float | str | None]) -> None:
    """Refuse, with a TypeError, what no layout has, and what would pass for another type."""
    for name, value in layout_options.items():
        if name not in LAYOUT_OPTIONS:
            raise TypeError(
                f"load() has no argument {name!r}; options are {', '.join(LAYOUT_OPTIONS)}"
            )
        right = LAYOUT_OPTIONS[name].kind
        whole = right is float and type(value) is int
        if not whole and not isinstance(value, right | None):
            raise TypeError(f"{name} {value!r} must be of type {right.__name__}")


def resolve_layout(
    source: Source,
    ranks: int,
    tp: int | None,
    dp: int | None,
    cp: int,
    layout_options: dict[str, bool | float | str | None],
) -> Layout:
    """The layout of `ranks` ranks, if `source` can be loaded in it (UserError, and WrongRanks where
    another number of ranks would do). Shards bring their own `tp` and `ep`."""
    check_degrees(tp, dp, cp)
    if tp is not None:
        check_tensor_parallel(source.config, tp)
    if isinstance(source, ShardDirectory):
        _check_ranks_of_shards(source, ranks, tp, dp, cp)
        tp = source.sharding.tp
        if layout_options.get("ep") is None and source.config.moe:
            layout_options = layout_options | {"ep": source.sharding.ep}
    tp = 1 if tp is None else tp
    if layout_options.get("flash_decoding"):
        check_flash_decoding(source.config, tp)
    return make_layout(ranks, tp, dp, cp, **layout_options)


def _check_ranks_of_shards(
    source: ShardDirectory, ranks: int, tp: int | None, dp: int | None, cp: int
) -> None:
    right = source.sharding.tp
    replica = cp * right
    needed = replica * (dp or max(1, ranks // replica))
    if tp not in (None, right):
        raise WrongRanks(
            f"{source.path} holds shards for --tp {right}, not for --tp {tp}: run `{{command}}`, "
            f"or make others with `mpishard shard {shlex.quote(str(source.path))} OUT --tp {tp}`",
            needed,
            right,
        )
    if dp is None and ranks % replica:
        cause = "so" if cp == 1 else f"so with --cp {cp}"
        raise WrongRanks(
            f"{source.path} holds shards for --tp {right}, {cause} the number of ranks must be a "
            f"multiple of {replica}, not {ranks}: run `{{command}}`",
            needed,
            right,
        )


def read_placement(layout: Layout, config: ModelConfig) -> ExpertPlacement | None:
    """The placement of experts whose file the layout names, if it names one (UserError)."""
    if not layout.expert_placement or config.moe is None:
        return None
    where = f"--expert-placement {layout.expert_placement}"
    return ExpertPlacement.of(
        read_json(Path(layout.expert_placement)), config.moe, layout.ep, where
    )
