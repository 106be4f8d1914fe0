"""The mesh: the groups of ranks of a layout, and their communicators.

The ranks form the grid ``np.arange(world_size).reshape(layout.shape)``, whose axes are
`mpishard.config.layout.AXES`. A group is a line of this grid, or a part of a replica. picotron's
process group manager has such a grid, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from mpishard.communication.group import CallTracker, CollectiveCall, Group
from mpishard.communication.ledger import Ledger
from mpishard.config.expert_placement import ExpertPlacement
from mpishard.config.layout import (
    AXES,
    Layout,
    kv_replica_ranks,
    shard_index_of,
    weight_sharding_of,
)
from mpishard.config.model_config import ModelConfig
from mpishard.config.weight_sharding import WeightSharding

# All groups of one kind, sorted. Every rank is in one of them.
Partition = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Mesh:
    """The groups of this rank, one of each kind. Groups of the same ranks share a communicator, of
    which MPI has few (MPICH: about 2,000 in a process)."""

    layout: Layout
    world: Group
    replica: Group  # the ranks of a replica, by cp, tp
    dp: Group  # the ranks of all replicas that hold the same weights
    cp: Group  # the ranks of a replica that hold the same weights
    tp: Group  # the ranks of a replica that share a cp coordinate: they shard the weights
    kv: Group  # the ranks of a replica that shard the cache of the same key/value heads, by cp, tp
    moe: Group  # the ranks that hold each expert once, by ep, etp
    ep: Group  # the ranks of moe that hold the same part of the width of different experts
    etp: Group  # the ranks of moe that hold parts of the width of the same experts
    weight_sharding: WeightSharding
    shard_index: int  # of the weights of this rank
    ledger: Ledger
    comms: tuple[MPI.Comm, ...]  # the communicators of all groups except world, each once

    @classmethod
    def split(
        cls,
        comm: MPI.Intracomm,
        layout: Layout,
        config: ModelConfig,
        placement: ExpertPlacement | None = None,
        calls: CallTracker | None = None,
    ) -> Mesh:
        """The mesh of `layout` over the ranks of `comm`. MPI_Comm_split, once for each partition.

        `config` gives the key/value heads, by which the kv groups follow, and `placement` the
        experts of each rank, which are blocks without it. `calls` tracks the collectives of this
        rank. Raises ValueError unless `comm` has as many ranks as the layout.
        """
        if comm.size != layout.world_size:
            raise ValueError(
                f"{layout} needs {layout.world_size} ranks, not the {comm.size} of comm"
            )
        ledger, calls = Ledger(), calls or CallTracker()
        world = Group(comm, "world", ledger, calls, tuple(range(comm.size)))
        weight_sharding = weight_sharding_of(config, layout, placement)
        comms: dict[Partition, MPI.Comm] = {}

        def group(name: str, partition: Partition) -> Group:
            color, members = next(
                (color, ranks) for color, ranks in enumerate(partition) if comm.rank in ranks
            )
            if partition not in comms:
                comms[partition] = comm.Split(color, members.index(comm.rank))
            return Group(comms[partition], name, ledger, calls, members)

        with CollectiveCall("split", world):
            groups = {
                field: group(field, partition)
                for field, partition in partitions(layout, config).items()
            }
        return cls(
            layout=layout,
            world=world,
            **groups,
            weight_sharding=weight_sharding,
            shard_index=shard_index_of(weight_sharding, comm.rank),
            ledger=ledger,
            comms=tuple(comms.values()),
        )

    def free(self) -> None:
        """Free the communicators that `split` made. Collective over the world."""
        for comm in self.comms:
            comm.Free()


def partitions(layout: Layout, config: ModelConfig) -> dict[str, Partition]:
    """The groups of every kind, by the name of its field in `Mesh`."""
    grid = np.arange(layout.world_size).reshape(layout.shape)
    etp = max(1, layout.replica_size // layout.ep)
    experts = np.arange(layout.world_size).reshape(-1, layout.ep, etp)
    dp, cp, tp = map(AXES.index, ("dp", "cp", "tp"))
    sharers = {kv_replica_ranks(config, layout.tp, rank)[1] for rank in range(layout.tp)}
    return {
        "replica": _along(grid, cp, tp),
        "dp": _along(grid, dp),
        "cp": _along(grid, cp),
        "tp": _along(grid, tp),
        "kv": _partition(replica[:, ranks].ravel() for replica in grid for ranks in sharers)
        if layout.flash_decoding
        else _along(grid, cp),
        "moe": _along(experts, 1, 2),
        "ep": _along(experts, 1),
        "etp": _along(experts, 2),
    }


def _along(grid: np.ndarray, *axes: int) -> Partition:
    """The groups of ranks whose coordinates differ along these `axes` alone."""
    others = [axis for axis in range(grid.ndim) if axis not in axes]
    size = int(np.prod([grid.shape[axis] for axis in axes]))
    return _partition(grid.transpose(*others, *axes).reshape(-1, size))


def _partition(groups: Iterable[np.ndarray]) -> Partition:
    return tuple(sorted(tuple(ranks.tolist()) for ranks in groups))
