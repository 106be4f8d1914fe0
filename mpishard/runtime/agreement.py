"""What must succeed on all ranks, or fail on all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from mpi4py import MPI

from mpishard.communication.group import CallTracker, CollectiveCall, Group
from mpishard.communication.ledger import Ledger
from mpishard.errors import UserError

T = TypeVar("T")


@contextmanager
def raise_on_all(comm: MPI.Comm, calls: CallTracker | None = None) -> Iterator[None]:
    """A UserError that any rank of `comm` raises within is raised on all of them at the end: the
    lowest rank's. `calls` tracks the collectives of this rank."""
    mine: UserError | None = None
    try:
        yield
    except UserError as error:
        mine = error
    with CollectiveCall("agreement", _world(comm, calls)):
        everyones = comm.allgather(mine)
    errors = [error for error in everyones if error is not None]
    if errors:
        raise errors[0]


def from_rank_0(comm: MPI.Comm, make: Callable[[], T], calls: CallTracker | None = None) -> T:
    """What `make` returns, or the UserError that it raises, on rank 0 of `comm`, on all of them:
    what only rank 0 has at hand, such as a file. `calls` tracks the collectives of this rank."""
    made: T | None = None
    problem: UserError | None = None
    if comm.rank == 0:
        try:
            made = make()
        except UserError as error:
            problem = error
    with CollectiveCall("broadcast", _world(comm, calls)):
        problem, made = comm.bcast((problem, made))
    if problem is not None:
        raise problem
    return made  # type: ignore[return-value]  # rank 0 made it


def _world(comm: MPI.Comm, calls: CallTracker | None) -> Group:
    return Group(comm, "world", Ledger(), calls or CallTracker())
