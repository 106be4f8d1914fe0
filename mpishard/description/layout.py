"""How a model and its requests are divided over ranks: arithmetic alone, no MPI.

``world = dp * cp * tp``, ``tp`` innermost, because the ranks of a tensor-parallel group talk most
and neighbouring ranks are the closest to each other.

Query heads are dealt so that a key/value head is held by as few ranks as possible:

- ``tp <= kv heads``: whole key/value heads, each with all its query heads, are dealt in blocks.
- ``tp > kv heads``: the ranks are dealt over the key/value heads, and the query heads of one
  key/value head over the ranks that hold it, so that each rank holds exactly one.

Either way the query heads of a rank divide evenly over its key/value heads, whatever the numbers.
Counting query heads alone would balance some odd layouts better (8 query heads over ``tp=3`` as
3, 3, 2), but would cut through key/value heads and so store and cache some of them twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpishard.description.config import MOST_POSITIONS, ModelConfig, Moe
from mpishard.description.cut import Cut
from mpishard.description.expert_placement import ExpertPlacement
from mpishard.errors import UserError


def block(length: int, parts: int, index: int) -> slice:
    """The `index`-th of `parts` consecutive blocks of ``range(length)``; the first ``length %
    parts`` blocks are one longer.

    >>> [block(7, 3, i) for i in range(3)]
    [slice(0, 3, None), slice(3, 5, None), slice(5, 7, None)]
    """
    size, longer = divmod(length, parts)
    start = index * size + min(index, longer)
    return slice(start, start + size + (index < longer))


def block_sizes(length: int, parts: int) -> list[int]:
    """The lengths of all blocks of `block`.

    >>> block_sizes(7, 3)
    [3, 2, 2]
    """
    return [len(range(length)[block(length, parts, index)]) for index in range(parts)]


# The alternatives of a layout, the first of each the default.
PREFILLS = ("ring", "all-gather")
ORDERS = ("zigzag", "contiguous")
MERGES = ("reduce-scatter", "all-to-all", "all-reduce")
DISPATCHES = ("all-to-all", "gather")
DROPS = ("probability", "position")


@dataclass(frozen=True)
class Layout:
    """The degrees of parallelism, and which form each takes. ``Layout()`` is the serial program.

    `sequence_parallel` divides the residual stream's tokens over ``tp``. `flash_decoding` divides
    the positions of the cache over the tensor-parallel ranks that hold the same key/value head.
    With context parallelism (``cp``), `prefill` says how new keys and values meet the queries of
    other ranks and `order` which tokens of a prompt a rank has. Where the cache is divided, `merge`
    says how partial attentions become one, and `interleave` how many consecutive positions lie on
    the same rank. Of a mixture, `ep` ranks divide the experts, and those that a replica has beyond
    them the width of each; `dispatch` says how tokens and experts meet. With a
    `capacity` an expert takes no more than this many times its even share of a step's rows, and
    `drop` says by what the others are dropped; 0 is no limit. `placement` names the file that says
    which rank has which experts, if it is not a block of them.
    """

    tp: int = 1
    dp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    flash_decoding: bool = False
    prefill: str = PREFILLS[0]
    order: str = ORDERS[0]
    merge: str = MERGES[0]
    interleave: int = 1
    ep: int = 1
    dispatch: str = DISPATCHES[0]
    capacity: float = 0.0
    drop: str = DROPS[0]
    placement: str = ""

    @property
    def world(self) -> int:
        """The number of ranks this layout needs."""
        return self.dp * self.replica

    @property
    def replica(self) -> int:
        """The number of ranks that hold one replica together."""
        return self.cp * self.tp

    @property
    def divides_cache(self) -> bool:
        """Whether the positions of a sequence's cache lie on several ranks."""
        return self.flash_decoding or self.cp > 1

    @property
    def together(self) -> int:
        """The number of neighbouring replicas that share experts and so step together."""
        return max(1, self.ep // self.replica)

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """``(dp, cp, tp)`` of world rank `rank`."""
        dp, inside = divmod(rank, self.replica)
        return dp, *divmod(inside, self.tp)

    @property
    def degrees(self) -> str:
        """The flags that ask for the degrees, that of context parallelism only where there is
        any."""
        return f"--tp {self.tp}{f' --cp {self.cp}' if self.cp > 1 else ''} --dp {self.dp}"

    def __str__(self) -> str:
        """The flags that ask for this layout, those of defaults left out."""
        flags = [self.degrees]
        for name, (flag, default) in SWITCHES.items():
            value = getattr(self, name)
            if value != default:
                flags.append(flag if value is True else f"{flag} {value}")
        return " ".join(flags)


# The flags of a layout beside its degrees, by field, and their defaults.
SWITCHES: dict[str, tuple[str, bool | int | float | str]] = {
    "sequence_parallel": ("--sequence-parallel", False),
    "flash_decoding": ("--flash-decoding", False),
    "prefill": ("--cp-prefill", PREFILLS[0]),
    "order": ("--cp-order", ORDERS[0]),
    "merge": ("--decode-merge", MERGES[0]),
    "interleave": ("--kv-interleave", 1),
    "ep": ("--ep", 1),
    "dispatch": ("--expert-dispatch", DISPATCHES[0]),
    "capacity": ("--expert-capacity", 0.0),
    "drop": ("--expert-drop", DROPS[0]),
    "placement": ("--expert-placement", ""),
}

# Those that only a mixture of experts knows.
EXPERT_SWITCHES = ("ep", "dispatch", "capacity", "drop", "placement")


def kv_heads_of(config: ModelConfig, tp: int, rank: int) -> slice:
    """The key/value heads that tensor-parallel rank `rank` of `tp` computes and caches."""
    if tp <= config.kv_heads:
        return block(config.kv_heads, tp, rank)
    head, _ = sharers_of(config, tp, rank)
    return slice(head, head + 1)


def query_heads_of(config: ModelConfig, tp: int, rank: int) -> slice:
    """The query heads that tensor-parallel rank `rank` of `tp` computes: those of its key/value
    heads, or its share of those of the one key/value head that it holds with other ranks."""
    per_kv = config.heads // config.kv_heads
    if tp <= config.kv_heads:
        held = block(config.kv_heads, tp, rank)
        return slice(held.start * per_kv, held.stop * per_kv)
    head, ranks = sharers_of(config, tp, rank)
    share = block(per_kv, len(ranks), rank - ranks.start)
    return slice(head * per_kv + share.start, head * per_kv + share.stop)


def sharers_of(config: ModelConfig, tp: int, rank: int) -> tuple[int, range]:
    """The first key/value head that tensor-parallel rank `rank` of `tp` holds, and the ranks that
    hold the same: `rank` alone unless ``tp > kv heads``."""
    if tp <= config.kv_heads:
        return block(config.kv_heads, tp, rank).start, range(rank, rank + 1)
    for head in range(config.kv_heads):
        ranks = block(tp, config.kv_heads, head)
        if ranks.start <= rank < ranks.stop:
            return head, range(ranks.start, ranks.stop)
    raise ValueError(f"rank {rank} is not one of tp={tp}")


def check_tensor_parallel(config: ModelConfig, tp: int) -> None:
    """Refuse a `tp` for which some rank would be left without a query head (UserError)."""
    if tp > config.heads:
        raise UserError(
            f"--tp {tp} is more than the model's {config.heads} query heads: "
            f"a rank without a head would have nothing to do; use --tp 1 to {config.heads}"
        )


def check_expert_parallel(moe: Moe, ep: int) -> None:
    """Refuse an `ep` for which some rank would be left without an expert (UserError)."""
    if not 1 <= ep <= moe.experts:
        raise UserError(
            f"--ep {ep} must be 1 to the model's {moe.experts} experts: "
            "a rank without an expert would have nothing to do"
        )


def check_flash_decoding(config: ModelConfig) -> None:
    """Refuse flash decoding for a model in which no `tp` makes ranks share a key/value head
    (UserError)."""
    if config.heads == config.kv_heads:
        raise UserError(
            "--flash-decoding divides the cache over ranks of --tp that share a key/value head, "
            f"but with {config.heads} query heads and {config.kv_heads} key/value heads no --tp "
            "makes any share one: leave it out, or divide the cache with --cp 2"
        )


def check_degrees(tp: int | None, dp: int | None, cp: int) -> None:
    """Refuse a degree below 1 (UserError); None is one that is not given."""
    for flag, value in (("--tp", tp), ("--dp", dp), ("--cp", cp)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value} must be at least 1")


# What is to be typed for so many ranks and a `tp`.
Line = Callable[[int, int], str]


def make_layout(
    world: int,
    tp: int = 1,
    dp: int | None = None,
    cp: int = 1,
    line: Line = lambda ranks, tp: f"mpirun -n {ranks} …",
    **switches: bool | float | str | None,
) -> Layout:
    """The layout of `world` ranks, `dp` being what `tp` and `cp` leave of the world unless given;
    `switches` are the other fields of `Layout`, None for their defaults.

    Raises UserError for a value out of range, for a switch that would have no effect, and, with the
    `line` to type, when the product is not the world.
    """
    check_degrees(tp, dp, cp)
    given = {name: value for name, value in switches.items() if value is not None}
    replicas = dp or max(1, world // (cp * tp))
    layout = Layout(tp=tp, dp=replicas, cp=cp, **given)  # type: ignore[arg-type]
    _check_switches(layout, given)
    if layout.world == world:
        return layout
    if dp is not None:
        problem = f"{layout.degrees} needs {layout.world} ranks but {_were(world)} started"
    elif cp == 1:
        problem = f"--tp {tp} does not divide the {_ranks_were(world)} started"
    else:
        replica = f"--tp {tp} --cp {cp} makes replicas of {layout.replica} ranks"
        problem = f"{replica}, which do not divide the {_ranks_were(world)} started"
    raise UserError(f"{problem}: run `{line(layout.world, tp)}`")


def _check_switches(layout: Layout, given: dict[str, bool | float | str]) -> None:
    choices = (
        ("prefill", PREFILLS), ("order", ORDERS), ("merge", MERGES), ("dispatch", DISPATCHES),
        ("drop", DROPS),
    )  # fmt: skip
    for name, known in choices:
        if getattr(layout, name) not in known:
            flag = SWITCHES[name][0]
            raise UserError(f"{flag} {getattr(layout, name)} must be one of {', '.join(known)}")
    if not 1 <= layout.interleave <= MOST_POSITIONS:
        raise UserError(f"--kv-interleave {layout.interleave} must be 1 to {MOST_POSITIONS}")
    if "capacity" in given and not 0 < layout.capacity < math.inf:
        raise UserError(
            f"--expert-capacity {layout.capacity} must be a number above 0: how many times its "
            "even share of a step's rows an expert takes; leave it out to drop nothing"
        )
    for name, value in given.items():
        no_effect = f"{SWITCHES[name][0]} {value} has no effect"
        if name in ("prefill", "order") and layout.cp == 1:
            raise UserError(f"{no_effect} with --cp 1: leave it out, or give --cp 2 or more")
        if name in ("merge", "interleave") and not layout.divides_cache:
            raise UserError(
                f"{no_effect} where every rank has the whole cache of its heads: leave it out, or "
                "divide the cache with --flash-decoding or --cp 2"
            )
        if name == "placement" and layout.ep == 1:
            raise UserError(
                f"{no_effect} with --ep 1, where every rank has all experts: leave it out, or give "
                "the --ep that it was made for"
            )
        if name == "drop" and not layout.capacity:
            raise UserError(
                f"{no_effect} where nothing is dropped: leave it out, or give --expert-capacity"
            )


def check_experts(config: ModelConfig, layout: Layout, given: Sequence[str]) -> None:
    """Refuse an `ep` that the model's experts or the ranks cannot be divided by, and switches
    `given` that have no effect on a model without experts (UserError)."""
    moe, ep, replica = config.moe, layout.ep, layout.replica
    if moe is None:
        for name in (name for name in EXPERT_SWITCHES if name in given):
            flag = f"{SWITCHES[name][0]} {getattr(layout, name)}"
            raise UserError(f"{flag} has no effect on a model without experts: leave it out")
        return
    check_expert_parallel(moe, ep)
    fits = [n for n in range(1, min(moe.experts, layout.world) + 1) if _divides(n, layout)]
    if not _divides(ep, layout):
        raise UserError(
            f"--ep {ep} does not divide {layout.degrees}: it must divide the {replica} ranks of a "
            f"replica, or be a number of whole replicas that divides them; use --ep "
            f"{' or '.join(map(str, fits))}"
        )
    if replica // ep > moe.ffn:
        raise UserError(
            f"--ep {ep} leaves {replica // ep} ranks to divide the width {moe.ffn} of an expert: "
            f"use a larger --ep of {' or '.join(map(str, fits))}"
        )


def _divides(ep: int, layout: Layout) -> bool:
    if ep <= layout.replica:
        return layout.replica % ep == 0
    return ep % layout.replica == 0 and layout.dp % (ep // layout.replica) == 0


def cut_of(config: ModelConfig, layout: Layout, placement: ExpertPlacement | None = None) -> Cut:
    """How `layout` cuts a model's weights; experts in blocks, or as `placement` says."""
    if config.moe is None:
        return Cut(layout.tp)
    return Cut(layout.tp, layout.ep, max(layout.replica, layout.ep), placement)


def set_of(cut: Cut, layout: Layout, rank: int) -> int:
    """Which set of the weights that `cut` makes world rank `rank` has."""
    return rank % cut.ranks if cut.ranks > cut.tp else layout.coordinates(rank)[2]


def _were(number: int) -> str:
    return f"{number} was" if number == 1 else f"{number} were"


def _ranks_were(number: int) -> str:
    return f"{number} rank that was" if number == 1 else f"{number} ranks that were"
