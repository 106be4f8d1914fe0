"""A group of ranks, and where this rank is among the collectives of its groups.

A collective that some rank of the group never makes does not end on the others. So that this can be
noticed and explained, every collective is a `CollectiveCall`, which notes in the `CallTracker` of
this rank that it has begun and that it is over. That costs a few attributes; whoever wants to know
reads them from another thread (`mpishard.runtime.watchdog`), while this one is inside MPI."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter

from mpi4py import MPI

from mpishard.communication.ledger import Ledger

# What one rank sends to others and receives from them: for each, elements and their type.
Parcels = dict[int, tuple[int, str]]


class CallTracker:
    """The collective that this rank is in, and how many it has begun and completed, by the names of
    the groups.

    `check`, where there is one, is called at the beginning of every collective, on all ranks of its
    group, and may communicate: see `mpishard.communication.check`.
    """

    def __init__(self, check: Callable[[CollectiveCall], None] | None = None) -> None:
        self.check = check
        self.current: CollectiveCall | None = None
        self.left = perf_counter()  # when the last one was over
        self.begun: dict[str, int] = {}
        self.done: dict[str, int] = {}


@dataclass(frozen=True)
class Group:
    """A communicator, the name under which the ledger knows it, and that ledger."""

    comm: MPI.Comm
    name: str
    ledger: Ledger
    calls: CallTracker = field(default_factory=CallTracker)  # of this rank, in all of its groups
    members: tuple[int, ...] = ()  # the ranks of the mesh that these are; none: not known
    checked: Iterator[int] = field(default_factory=count)  # numbers the collectives compared

    @property
    def rank(self) -> int:
        """This rank's place in the group."""
        return self.comm.rank

    @property
    def size(self) -> int:
        """The number of ranks in the group; 1 is an ordinary case."""
        return self.comm.size

    def to_world_rank(self, rank: int) -> int:
        """The rank of the mesh that is `rank` of this group, where that is known."""
        return self.members[rank] if self.members else rank


class CollectiveCall:
    """One collective of a group: what stands within ``with call:`` is inside it.

    `what` says what all ranks must agree upon, in words, and is asked only when somebody wants to
    know. `peer_counts`, of operations in which each pair of ranks has its own, are what this rank
    sends to each other one and what it expects from each. The call is done after so many ``with``
    statements as it has `parts`: an exchange that goes on behind arithmetic has a beginning and an
    end."""

    __slots__ = (
        "entered",
        "group",
        "is_compared",
        "number",
        "operation",
        "peer_counts",
        "parts",
        "what",
    )

    def __init__(
        self,
        operation: str,
        group: Group,
        what: Callable[[], str] = str,
        peer_counts: Callable[[], tuple[Parcels, Parcels]] | None = None,
        parts: int = 1,
    ) -> None:
        self.operation = operation
        self.group = group
        self.what = what
        self.peer_counts = peer_counts
        self.parts = parts
        self.is_compared = False
        begun = group.calls.begun
        self.number = begun[group.name] = begun.get(group.name, 0) + 1

    def __str__(self) -> str:
        what = self.what()
        return f"{self.operation} of {what}" if what else self.operation

    def __enter__(self) -> CollectiveCall:
        calls = self.group.calls
        self.entered = perf_counter()
        calls.current = self
        if calls.check is not None and not self.is_compared:
            self.is_compared = True
            try:
                calls.check(self)
            except BaseException:
                calls.current = None
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        calls, name = self.group.calls, self.group.name
        calls.current = None
        calls.left = perf_counter()
        self.parts -= 1
        if kind is None and self.parts == 0:
            calls.done[name] = calls.done.get(name, 0) + 1

    @property
    def seconds(self) -> float:
        """How long the part that has just ended took, a check before it included."""
        return self.group.calls.left - self.entered
