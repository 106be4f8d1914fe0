"""The mesh: the communicators of a layout, split off one communicator."""

from __future__ import annotations

from dataclasses import dataclass

from mpi4py import MPI

from mpishard.communication.ledger import Ledger
from mpishard.description.layout import Layout


@dataclass(frozen=True)
class Group:
    """A communicator, the name under which the ledger knows it, and that ledger."""

    comm: MPI.Comm
    name: str
    ledger: Ledger

    @property
    def rank(self) -> int:
        """This rank's place in the group."""
        return self.comm.rank

    @property
    def size(self) -> int:
        """The number of ranks in the group; 1 is an ordinary case."""
        return self.comm.size


@dataclass(frozen=True)
class Mesh:
    """The groups this rank belongs to: one line of ranks along each axis of the layout."""

    layout: Layout
    world: Group
    dp: Group  # the ranks that hold the same weights, one of each replica
    tp: Group  # the ranks that hold one replica together
    ledger: Ledger

    @classmethod
    def split(cls, comm: MPI.Intracomm, layout: Layout) -> Mesh:
        """The mesh of `layout` over the ranks of `comm`. MPI_Comm_split.

        Raises ValueError unless `comm` has as many ranks as the layout.
        """
        if comm.size != layout.world:
            raise ValueError(f"{layout} needs {layout.world} ranks, not the {comm.size} of comm")
        replica, shard = layout.coordinates(comm.rank)
        ledger = Ledger()
        return cls(
            layout=layout,
            world=Group(comm, "world", ledger),
            dp=Group(comm.Split(color=shard, key=replica), "dp", ledger),
            tp=Group(comm.Split(color=replica, key=shard), "tp", ledger),
            ledger=ledger,
        )
