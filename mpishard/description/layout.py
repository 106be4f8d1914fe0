"""How a model and its requests are divided over ranks: arithmetic alone, no MPI.

``world = dp * tp``, ``tp`` innermost, because the ranks of a tensor-parallel group talk most and
neighbouring ranks are the closest to each other.

Query heads are dealt so that a key/value head is held by as few ranks as possible:

- ``tp <= kv heads``: whole key/value heads, each with all its query heads, are dealt in blocks.
- ``tp > kv heads``: the ranks are dealt over the key/value heads, and the query heads of one
  key/value head over the ranks that hold it, so that each rank holds exactly one.

Either way the query heads of a rank divide evenly over its key/value heads, whatever the numbers.
Counting query heads alone would balance some odd layouts better (8 query heads over ``tp=3`` as
3, 3, 2), but would cut through key/value heads and so store and cache some of them twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpishard.description.config import ModelConfig
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


@dataclass(frozen=True)
class Layout:
    """The degrees of parallelism. ``Layout(tp=1, dp=1)`` is the serial program."""

    tp: int = 1
    dp: int = 1

    @property
    def world(self) -> int:
        """The number of ranks this layout needs."""
        return self.dp * self.tp

    def coordinates(self, rank: int) -> tuple[int, int]:
        """``(dp, tp)`` of world rank `rank`."""
        return divmod(rank, self.tp)

    def __str__(self) -> str:
        return f"--tp {self.tp} --dp {self.dp}"


def kv_heads_of(config: ModelConfig, tp: int, rank: int) -> slice:
    """The key/value heads that tensor-parallel rank `rank` of `tp` computes and caches."""
    if tp <= config.kv_heads:
        return block(config.kv_heads, tp, rank)
    head, _, _ = _owner(config, tp, rank)
    return slice(head, head + 1)


def query_heads_of(config: ModelConfig, tp: int, rank: int) -> slice:
    """The query heads that tensor-parallel rank `rank` of `tp` computes: those of its key/value
    heads, or its share of those of the one key/value head that it holds with other ranks."""
    per_kv = config.heads // config.kv_heads
    if tp <= config.kv_heads:
        held = block(config.kv_heads, tp, rank)
        return slice(held.start * per_kv, held.stop * per_kv)
    head, sharers, index = _owner(config, tp, rank)
    share = block(per_kv, sharers, index)
    return slice(head * per_kv + share.start, head * per_kv + share.stop)


def _owner(config: ModelConfig, tp: int, rank: int) -> tuple[int, int, int]:
    """For ``tp > kv_heads``: the key/value head of `rank`, how many ranks share it, and which of
    them `rank` is."""
    for head in range(config.kv_heads):
        ranks = block(tp, config.kv_heads, head)
        if ranks.start <= rank < ranks.stop:
            return head, ranks.stop - ranks.start, rank - ranks.start
    raise ValueError(f"rank {rank} is not one of tp={tp}")


def check_tensor_parallel(config: ModelConfig, tp: int) -> None:
    """Refuse a `tp` for which some rank would be left without a query head (UserError)."""
    if tp > config.heads:
        raise UserError(
            f"--tp {tp} is more than the model's {config.heads} query heads: "
            f"a rank without a head would have nothing to do; use --tp 1 to {config.heads}"
        )


def make_layout(world: int, tp: int = 1, dp: int | None = None, command: str = "…") -> Layout:
    """The layout of `world` ranks, `dp` being what `tp` leaves of the world unless given.

    Raises UserError, with the `mpirun` line to type, when the product is not the world.
    """
    for flag, value in (("--tp", tp), ("--dp", dp)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value} must be at least 1")
    if dp is None:
        if world % tp:
            raise UserError(
                f"--tp {tp} does not divide the {_ranks(world)} started: "
                f"run `mpirun -n {_nearest_multiple(world, tp)} {command}`"
            )
        dp = world // tp
    layout = Layout(tp=tp, dp=dp)
    if layout.world != world:
        raise UserError(
            f"{layout} needs {layout.world} ranks but {world} "
            f"{'was' if world == 1 else 'were'} started: run `mpirun -n {layout.world} {command}`"
        )
    return layout


def _ranks(number: int) -> str:
    return f"{number} rank that was" if number == 1 else f"{number} ranks that were"


def _nearest_multiple(world: int, tp: int) -> int:
    return max(tp, world // tp * tp)
