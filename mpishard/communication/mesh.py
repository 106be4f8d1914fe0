"""The mesh: the communicators of a layout, split off one communicator."""

from __future__ import annotations

from dataclasses import dataclass

from mpi4py import MPI

from mpishard.communication.group import CallTracker, CollectiveCall, Group
from mpishard.communication.ledger import Ledger
from mpishard.config.expert_placement import ExpertPlacement
from mpishard.config.layout import Layout, kv_replica_ranks, shard_index_of, weight_sharding_of
from mpishard.config.model_config import ModelConfig
from mpishard.config.weight_sharding import WeightSharding


@dataclass(frozen=True)
class Mesh:
    """The groups this rank belongs to: one line of ranks along each axis of the layout, and the
    ranks that divide a cache."""

    layout: Layout
    world: Group
    dp: Group  # the ranks that hold the same weights of different replicas
    cp: Group  # the ranks of a replica that hold the same weights
    tp: Group  # the ranks of a replica that divide its weights
    kv: Group  # the ranks of a replica that divide the cache of the same key/value heads, by cp, tp
    moe: Group  # the ranks that hold all experts once, by ep, etp
    ep: Group  # those of them that hold the same part of each expert's width
    etp: Group  # those of them that hold the same experts
    weight_sharding: WeightSharding
    shard_index: int  # which set of the weights of `weight_sharding` this rank has
    ledger: Ledger

    @classmethod
    def split(
        cls,
        comm: MPI.Intracomm,
        layout: Layout,
        config: ModelConfig,
        placement: ExpertPlacement | None = None,
        calls: CallTracker | None = None,
    ) -> Mesh:
        """The mesh of `layout` over the ranks of `comm`, for a model's heads and for experts in
        blocks or in this `placement`. MPI_Comm_split.

        `calls` are those of this rank that somebody watches or checks. Raises ValueError unless
        `comm` has as many ranks as the layout.
        """
        if comm.size != layout.world_size:
            raise ValueError(
                f"{layout} needs {layout.world_size} ranks, not the {comm.size} of comm"
            )
        dp, cp, tp = layout.coordinates(comm.rank)
        # The first rank that holds the same key/value heads stands for all that divide their cache.
        first = kv_replica_ranks(config, layout.tp, tp)[1].start if layout.flash_decoding else tp
        ledger, calls = Ledger(), calls or CallTracker()
        world = Group(comm, "world", ledger, calls, tuple(range(comm.size)))

        weight_sharding = weight_sharding_of(config, layout, placement)
        shard_index = shard_index_of(weight_sharding, comm.rank)
        own = shard_index if config.moe else comm.rank % layout.replica_size
        copy = comm.rank // max(layout.replica_size, layout.ep)  # of all experts
        etp = max(1, layout.replica_size // layout.ep)

        def group(name: str, color: int, key: int) -> Group:
            part = comm.Split(color, key)
            return Group(part, name, ledger, calls, _members(part, comm))

        with CollectiveCall("split", world):
            return cls(
                layout=layout,
                world=world,
                dp=group("dp", color=cp * layout.tp + tp, key=dp),
                cp=group("cp", color=dp * layout.tp + tp, key=cp),
                tp=group("tp", color=dp * layout.cp + cp, key=tp),
                kv=group("kv", color=dp * layout.tp + first, key=cp * layout.tp + tp),
                moe=group("experts", color=copy, key=own),
                ep=group("ep", color=copy * etp + own % etp, key=own // etp),
                etp=group("etp", color=copy * layout.ep + own // etp, key=own % etp),
                weight_sharding=weight_sharding,
                shard_index=shard_index,
                ledger=ledger,
            )


def _members(part: MPI.Comm, whole: MPI.Comm) -> tuple[int, ...]:
    """The ranks of `whole` that the ranks of `part` are."""
    some, everyone = part.Get_group(), whole.Get_group()
    ranks = tuple(some.Translate_ranks(None, everyone))
    some.Free()
    everyone.Free()
    return ranks
