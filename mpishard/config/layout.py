"""How a model and its requests are divided over ranks: arithmetic alone, no MPI.

``world_size = dp * cp * tp``, ``tp`` innermost, because the ranks of a tensor-parallel group talk
most and neighbouring ranks are the closest to each other.

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

from mpishard.config.expert_placement import ExpertPlacement
from mpishard.config.model_config import MAX_POSITIONS, ModelConfig, MoEConfig
from mpishard.config.weight_sharding import WeightSharding
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
CP_PREFILLS = ("ring", "all-gather")
CP_ORDERS = ("zigzag", "contiguous")
DECODE_MERGES = ("reduce-scatter", "all-to-all", "all-reduce")
TOKEN_DISPATCHERS = ("all-to-all", "all-gather")
TOKEN_DROP_POLICIES = ("probs", "position")


@dataclass(frozen=True)
class Layout:
    """The degrees of parallelism, and which form each takes. ``Layout()`` is the serial program.

    `sequence_parallel` divides the residual stream's tokens over ``tp``. `flash_decoding` divides
    the positions of the cache over the tensor-parallel ranks that hold the same key/value head.
    With context parallelism (``cp``), `cp_prefill` says how new keys and values meet the queries of
    other ranks and `cp_order` which tokens of a prompt a rank has. Where the cache is divided,
    `decode_merge` says how partial attentions become one, and `cp_kv_cache_interleave_size` how
    many consecutive positions lie on the same rank. Of a mixture, `ep` ranks divide the experts,
    and those that a replica has beyond them the width of each; `moe_token_dispatcher` says how
    tokens and experts meet. With a `expert_capacity_factor` an expert takes no more than this many
    times its even share of a step's rows, and `token_drop_policy` says by what the others are
    dropped; 0 is no limit. `expert_placement` names the file that says which rank has which
    experts, if it is not a block of them."""

    tp: int = 1
    dp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    flash_decoding: bool = False
    cp_prefill: str = CP_PREFILLS[0]
    cp_order: str = CP_ORDERS[0]
    decode_merge: str = DECODE_MERGES[0]
    cp_kv_cache_interleave_size: int = 1
    ep: int = 1
    moe_token_dispatcher: str = TOKEN_DISPATCHERS[0]
    expert_capacity_factor: float = 0.0
    token_drop_policy: str = TOKEN_DROP_POLICIES[0]
    expert_placement: str = ""

    @property
    def world_size(self) -> int:
        """The number of ranks this layout needs."""
        return self.dp * self.replica_size

    @property
    def replica_size(self) -> int:
        """The number of ranks that hold one replica together."""
        return self.cp * self.tp

    @property
    def shards_kv_positions(self) -> bool:
        """Whether the positions of a sequence's cache lie on several ranks."""
        return self.flash_decoding or self.cp > 1

    @property
    def replicas_per_ep_group(self) -> int:
        """The number of neighbouring replicas that share experts and so step together."""
        return max(1, self.ep // self.replica_size)

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """``(dp, cp, tp)`` of world rank `rank`."""
        dp, inside = divmod(rank, self.replica_size)
        return dp, *divmod(inside, self.tp)

    @property
    def degrees(self) -> str:
        """The flags that ask for the degrees, that of context parallelism only where there is
        any."""
        return f"--tp {self.tp}{f' --cp {self.cp}' if self.cp > 1 else ''} --dp {self.dp}"

    def __str__(self) -> str:
        """The flags that ask for this layout, those of defaults left out."""
        flags = [self.degrees]
        for name, (flag, default) in LAYOUT_OPTIONS.items():
            value = getattr(self, name)
            if value != default:
                flags.append(flag if value is True else f"{flag} {value}")
        return " ".join(flags)


# The flags of a layout beside its degrees, by field, and their defaults.
LAYOUT_OPTIONS: dict[str, tuple[str, bool | int | float | str]] = {
    "sequence_parallel": ("--sequence-parallel", False),
    "flash_decoding": ("--flash-decoding", False),
    "cp_prefill": ("--cp-prefill", CP_PREFILLS[0]),
    "cp_order": ("--cp-order", CP_ORDERS[0]),
    "decode_merge": ("--decode-merge", DECODE_MERGES[0]),
    "cp_kv_cache_interleave_size": ("--cp-kv-cache-interleave-size", 1),
    "ep": ("--ep", 1),
    "moe_token_dispatcher": ("--moe-token-dispatcher", TOKEN_DISPATCHERS[0]),
    "expert_capacity_factor": ("--expert-capacity-factor", 0.0),
    "token_drop_policy": ("--token-drop-policy", TOKEN_DROP_POLICIES[0]),
    "expert_placement": ("--expert-placement", ""),
}

# Those that only a mixture of experts knows.
EXPERT_OPTIONS = (
    "ep",
    "moe_token_dispatcher",
    "expert_capacity_factor",
    "token_drop_policy",
    "expert_placement",
)


def kv_heads_of(config: ModelConfig, tp: int, rank: int) -> slice:
    """The key/value heads that tensor-parallel rank `rank` of `tp` computes and caches."""
    if tp <= config.kv_heads:
        return block(config.kv_heads, tp, rank)
    head, _ = kv_replica_ranks(config, tp, rank)
    return slice(head, head + 1)


def query_heads_of(config: ModelConfig, tp: int, rank: int) -> slice:
    """The query heads that tensor-parallel rank `rank` of `tp` computes: those of its key/value
    heads, or its share of those of the one key/value head that it holds with other ranks."""
    per_kv = config.heads // config.kv_heads
    if tp <= config.kv_heads:
        held = block(config.kv_heads, tp, rank)
        return slice(held.start * per_kv, held.stop * per_kv)
    head, ranks = kv_replica_ranks(config, tp, rank)
    share = block(per_kv, len(ranks), rank - ranks.start)
    return slice(head * per_kv + share.start, head * per_kv + share.stop)


def kv_replica_ranks(config: ModelConfig, tp: int, rank: int) -> tuple[int, range]:
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


def check_expert_parallel(moe: MoEConfig, ep: int) -> None:
    """Refuse an `ep` for which some rank would be left without an expert (UserError)."""
    if not 1 <= ep <= moe.num_experts:
        raise UserError(
            f"--ep {ep} must be 1 to the model's {moe.num_experts} experts: "
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
    world_size: int,
    tp: int = 1,
    dp: int | None = None,
    cp: int = 1,
    line: Line = lambda ranks, tp: f"mpirun -n {ranks} …",
    **layout_options: bool | float | str | None,
) -> Layout:
    """The layout of `world_size` ranks, `dp` being what `tp` and `cp` leave of the world unless
    given; `layout_options` are the other fields of `Layout`, None for their defaults.

    Raises UserError for a value out of range, for a switch that would have no effect, and, with the
    `line` to type, when the product is not the world.
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
    raise UserError(f"{problem}: run `{line(layout.world_size, tp)}`")


def _check_layout_options(layout: Layout, given: dict[str, bool | float | str]) -> None:
    choices = (
        ("cp_prefill", CP_PREFILLS),
        ("cp_order", CP_ORDERS),
        ("decode_merge", DECODE_MERGES),
        ("moe_token_dispatcher", TOKEN_DISPATCHERS),
        ("token_drop_policy", TOKEN_DROP_POLICIES),
    )
    for name, known in choices:
        if getattr(layout, name) not in known:
            flag = LAYOUT_OPTIONS[name][0]
            raise UserError(f"{flag} {getattr(layout, name)} must be one of {', '.join(known)}")
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
        no_effect = f"{LAYOUT_OPTIONS[name][0]} {value} has no effect"
        if name in ("cp_prefill", "cp_order") and layout.cp == 1:
            raise UserError(f"{no_effect} with --cp 1: leave it out, or give --cp 2 or more")
        if (
            name in ("decode_merge", "cp_kv_cache_interleave_size")
            and not layout.shards_kv_positions
        ):
            raise UserError(
                f"{no_effect} where every rank has the whole cache of its heads: leave it out, or "
                "divide the cache with --flash-decoding or --cp 2"
            )
        if name == "expert_placement" and layout.ep == 1:
            raise UserError(
                f"{no_effect} with --ep 1, where every rank has all experts: leave it out, or give "
                "the --ep that it was made for"
            )
        if name == "token_drop_policy" and not layout.expert_capacity_factor:
            raise UserError(
                f"{no_effect} where nothing is dropped: leave it out, or give "
                "--expert-capacity-factor"
            )


def check_experts(config: ModelConfig, layout: Layout, given: Sequence[str]) -> None:
    """Refuse an `ep` that the model's experts or the ranks cannot be divided by, and switches
    `given` that have no effect on a model without experts (UserError)."""
    moe, ep, replica_size = config.moe, layout.ep, layout.replica_size
    if moe is None:
        for name in (name for name in EXPERT_OPTIONS if name in given):
            flag = f"{LAYOUT_OPTIONS[name][0]} {getattr(layout, name)}"
            raise UserError(f"{flag} has no effect on a model without experts: leave it out")
        return
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


def weight_sharding_of(
    config: ModelConfig, layout: Layout, expert_placement: ExpertPlacement | None = None
) -> WeightSharding:
    """How `layout` cuts a model's weights; experts in blocks, or as `expert_placement` says."""
    if config.moe is None:
        return WeightSharding(layout.tp)
    return WeightSharding(
        layout.tp, layout.ep, max(layout.replica_size, layout.ep), expert_placement
    )


def shard_index_of(sharding: WeightSharding, layout: Layout, rank: int) -> int:
    """Which set of the weights that `sharding` makes world rank `rank` has."""
    return rank % sharding.ranks if sharding.ranks > sharding.tp else layout.coordinates(rank)[2]


def _were(number: int) -> str:
    return f"{number} was" if number == 1 else f"{number} were"


def _ranks_were(number: int) -> str:
    return f"{number} rank that was" if number == 1 else f"{number} ranks that were"
