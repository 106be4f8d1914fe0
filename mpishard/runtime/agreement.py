"""What must succeed on all ranks, or fail on all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mpi4py import MPI

from mpishard.communication.group import CallTracker, CollectiveCall, Group
from mpishard.communication.ledger import Ledger
from mpishard.errors import UserError


@contextmanager
def raise_on_all(comm: MPI.Comm, calls: CallTracker | None = None) -> Iterator[None]:
    """A UserError that any rank of `comm` raises within is raised on all of them at the end: the
    lowest rank's. `calls` tracks the collectives of this rank."""
    mine: UserError | None = None
    try:
        yield
    except UserError as error:
        mine = error
    with CollectiveCall("agreement", Group(comm, "world", Ledger(), calls or CallTracker())):
        everyones = comm.allgather(mine)
    errors = [error for error in everyones if error is not None]
    if errors:
        raise errors[0]
