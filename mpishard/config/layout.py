"""How a model and its requests are assigned to ranks: arithmetic alone, no MPI.

The ranks form a grid, ``world_size = dp * cp * tp``. ``tp`` is the innermost axis: tensor-parallel
ranks communicate most, and neighbouring ranks are close to each other in the machine.

Query heads are assigned so that as few ranks as possible hold the same key/value head:

- ``tp <= kv heads``: each rank has a block of key/value heads, each with all its query heads.
- ``tp > kv heads``: each rank has one key/value head. The ranks are split over the key/value heads,
  and the query heads of a key/value head over the ranks that hold it.

In both cases all key/value heads of a rank have the same number of query heads there. Balancing
query heads alone would be more even for some layouts (8 query heads over ``tp=3`` as 3, 3, 2), but
would store and cache some key/value heads twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from mpishard.config.expert_placement import ExpertPlacement
from mpishard.config.model_config import ModelConfig
from mpishard.config.options import LayoutOption, option_field, options_of
from mpishard.config.weight_sharding import WeightSharding


def block(length: int, parts: int, index: int) -> slice:
    """The `index`-th of `parts` consecutive blocks of ``range(length)``. The first ``length %
    parts`` blocks are longer by one.

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


# The choices of options; the first one is the default.
CP_PREFILLS = ("ring", "all-gather")
CP_ORDERS = ("zigzag", "contiguous")
DECODE_MERGES = ("reduce-scatter", "all-to-all", "all-reduce")
TOKEN_DISPATCHERS = ("all-to-all", "all-gather")
TOKEN_DROP_POLICIES = ("probs", "position")


# The axes of the grid of ranks. The last one varies fastest, so that the ranks of a tensor-parallel
# group are neighbours.
AXES = ("dp", "cp", "tp")


@dataclass(frozen=True)
class Layout:
    """The degrees of parallelism, and the form that each takes. ``Layout()`` is the serial program.

    `sequence_parallel` shards the tokens of the residual stream over ``tp``. `flash_decoding`
    shards the positions of the cache over the tensor-parallel ranks that hold the same key/value
    head. Under context parallelism (``cp``), `cp_prefill` says how new keys and values reach the
    queries of other ranks, and `cp_order` which tokens of a prompt each rank has.

    If positions of the cache are sharded, `decode_merge` says how partial attention outputs are
    merged, and `cp_kv_cache_interleave_size` how many consecutive positions lie on one rank.

    `ep` ranks shard the experts; further ranks of a replica shard the width of each expert.
    `moe_token_dispatcher` says how tokens reach experts. An `expert_capacity_factor` limits an
    expert to this multiple of its even share of the (token, expert) pairs of a step, and
    `token_drop_policy` says which pairs are dropped; 0 is no limit. `expert_placement` names a file
    that assigns experts to ranks; by default each rank has a block of them."""

    tp: int = option_field(
        1,
        "--tp",
        "--tensor-parallel-size",
        metavar="N",
        help="ranks that shard the weights of a replica (default: 1, or what the shards say)",
    )
    dp: int = option_field(
        1,
        "--dp",
        "--data-parallel-size",
        metavar="N",
        help="replicas that share the requests (default: what --tp and --cp leave of the ranks)",
    )
    cp: int = option_field(
        1,
        "--cp",
        "--context-parallel-size",
        metavar="N",
        unset=1,
        help="ranks that shard each sequence, with the same weights (default: 1)",
    )
    sequence_parallel: bool = option_field(
        False,
        "--sequence-parallel",
        needs="tp",
        help="shard the tokens of the residual stream over the ranks of --tp as well",
    )
    flash_decoding: bool = option_field(
        False,
        "--flash-decoding",
        help="shard the KV cache over the ranks of --tp that share a key/value head",
    )
    cp_prefill: str = option_field(
        CP_PREFILLS[0],
        "--cp-prefill",
        choices=CP_PREFILLS,
        needs="cp",
        help="how keys and values reach the queries of other --cp ranks (default: ring)",
    )
    cp_order: str = option_field(
        CP_ORDERS[0],
        "--cp-order",
        choices=CP_ORDERS,
        needs="cp",
        help="which tokens of a prompt a --cp rank has (default: zigzag, which balances the work)",
    )
    decode_merge: str = option_field(
        DECODE_MERGES[0],
        "--decode-merge",
        choices=DECODE_MERGES,
        needs="sharded cache",
        help="how partial attention over a sharded KV cache is merged (default: reduce-scatter)",
    )
    cp_kv_cache_interleave_size: int = option_field(
        1,
        "--cp-kv-cache-interleave-size",
        metavar="N",
        needs="sharded cache",
        help="consecutive positions of a sharded KV cache on the same rank (default: 1)",
    )
    ep: int = option_field(
        1,
        "--ep",
        "--expert-parallel-size",
        metavar="N",
        moe=True,
        help="ranks that shard the experts of an MoE model (default: 1, or what the shards say)",
    )
    moe_token_dispatcher: str = option_field(
        TOKEN_DISPATCHERS[0],
        "--moe-token-dispatcher",
        choices=TOKEN_DISPATCHERS,
        moe=True,
        help="how tokens reach the ranks of their experts (default: all-to-all)",
    )
    expert_capacity_factor: float = option_field(
        0.0,
        "--expert-capacity-factor",
        metavar="X",
        moe=True,
        help="an expert takes at most X times its even share of the rows that a rank routes in a "
        "step; those above it are dropped (default: nothing is)",
    )
    token_drop_policy: str = option_field(
        TOKEN_DROP_POLICIES[0],
        "--token-drop-policy",
        choices=TOKEN_DROP_POLICIES,
        moe=True,
        needs="capacity",
        help="what is kept first: rows of large weight, or of early tokens (default: probs)",
    )
    expert_placement: str = option_field(
        "",
        "--expert-placement",
        metavar="FILE.json",
        moe=True,
        needs="sharded experts",
        help="which rank has which experts, some of them several times, as `eplb` writes it "
        "(default: a block of them each)",
    )

    @property
    def shape(self) -> tuple[int, ...]:
        """The degrees along `AXES`: the shape of the grid of ranks."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def world_size(self) -> int:
        """The number of ranks that this layout needs."""
        return math.prod(self.shape)

    @property
    def replica_size(self) -> int:
        """The number of ranks of a replica."""
        return self.world_size // self.dp

    @property
    def shards_kv_positions(self) -> bool:
        """Whether several ranks hold positions of the same sequence and key/value head."""
        return self.flash_decoding or self.cp > 1

    @property
    def replicas_per_ep_group(self) -> int:
        """The number of neighbouring replicas that share experts, and therefore step together."""
        return max(1, self.ep // self.replica_size)

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """The place of world rank `rank` along each of the `AXES`: ``(dp, cp, tp)``."""
        places = []
        for degree in reversed(self.shape):
            rank, place = divmod(rank, degree)
            places.append(place)
        return tuple(reversed(places))

    @property
    def degrees(self) -> str:
        """The flags of the degrees; ``--cp`` only if it is above 1."""
        return f"--tp {self.tp}{f' --cp {self.cp}' if self.cp > 1 else ''} --dp {self.dp}"

    def __str__(self) -> str:
        """The flags of this layout, without those of default values."""
        flags = [self.degrees]
        for option in LAYOUT_OPTIONS.values():
            value = getattr(self, option.name)
            if value != option.default:
                flags.append(option.as_typed(value))
        return " ".join(flags)


_DEFINED = options_of(Layout)

# The options beside the degrees, by name.
LAYOUT_OPTIONS = {name: option for name, option in _DEFINED.items() if name not in AXES}


def layout_options() -> tuple[LayoutOption, ...]:
    """All options of a layout, in the order of the command line's help."""
    return (*(_DEFINED[axis] for axis in reversed(AXES)), *LAYOUT_OPTIONS.values())


class Heads(Protocol):
    """What has query heads that share key/value heads: a model, or its linear attention."""

    @property
    def heads(self) -> int:
        """The number of query heads."""

    @property
    def kv_heads(self) -> int:
        """The number of key/value heads, each of which serves as many query heads."""


def kv_heads_of(config: Heads, tp: int, rank: int) -> slice:
    """The key/value heads that tensor-parallel rank `rank` of `tp` computes and caches."""
    if tp <= config.kv_heads:
        return block(config.kv_heads, tp, rank)
    head, _ = kv_replica_ranks(config, tp, rank)
    return slice(head, head + 1)


def query_heads_of(config: Heads, tp: int, rank: int) -> slice:
    """The query heads that tensor-parallel rank `rank` of `tp` computes: all query heads of its
    key/value heads, or its share of the query heads of the one that it holds with other ranks."""
    per_kv = config.heads // config.kv_heads
    if tp <= config.kv_heads:
        held = block(config.kv_heads, tp, rank)
        return slice(held.start * per_kv, held.stop * per_kv)
    head, ranks = kv_replica_ranks(config, tp, rank)
    share = block(per_kv, len(ranks), rank - ranks.start)
    return slice(head * per_kv + share.start, head * per_kv + share.stop)


def kv_replica_ranks(config: Heads, tp: int, rank: int) -> tuple[int, range]:
    """The first key/value head of tensor-parallel rank `rank` of `tp`, and the ranks that hold the
    same key/value heads: `rank` alone unless ``tp > kv heads``."""
    if tp <= config.kv_heads:
        return block(config.kv_heads, tp, rank).start, range(rank, rank + 1)
    for head in range(config.kv_heads):
        ranks = block(tp, config.kv_heads, head)
        if ranks.start <= rank < ranks.stop:
            return head, range(ranks.start, ranks.stop)
    raise ValueError(f"rank {rank} is not one of tp={tp}")


def weight_sharding_of(
    config: ModelConfig, layout: Layout, expert_placement: ExpertPlacement | None = None
) -> WeightSharding:
    """The sharding of a model's weights under `layout`, with experts in blocks or in an
    `expert_placement`."""
    if config.moe is None:
        return WeightSharding(layout.tp)
    return WeightSharding(
        layout.tp, layout.ep, max(layout.replica_size, layout.ep), expert_placement
    )


def shard_index_of(sharding: WeightSharding, rank: int) -> int:
    """The index of the shard of world rank `rank`."""
    return rank % sharding.ranks
