"""The ledger: what was communicated, and how long it took.

Every collective of `mpishard.communication.collectives` enters itself here. Two byte counts are
kept apart, because MPI libraries are free in how they carry a collective out:

- *payload*: the bytes of the operation's argument, whatever the algorithm.
- *wire*: the bytes this rank must send under a bandwidth-optimal algorithm, for ``p`` ranks:

=================  ==========================  ===================================
operation          payload                     wire
=================  ==========================  ===================================
all_reduce         the array, n                2 (p-1)/p n
all_gather         this rank's block, b        (p-1) b
reduce_scatter     the whole array, n          n - (this rank's block)
all_to_all         this rank's rows, n         n - (its rows for itself)
gather             this rank's block, b        b, 0 on the root
broadcast          the array, n                (p-1)/p n
isendrecv          the array sent, n           n, 0 to itself
=================  ==========================  ===================================

The seconds are those spent in MPI: of isendrecv the beginning, the progress and the end, not the
arithmetic between them. What a check of the collectives sends (`mpishard.communication.check`) is
not counted; the seconds that ranks wait for each other in it are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Entry:
    """What one operation on one group has come to so far, on this rank."""

    calls: int = 0
    payload_bytes: int = 0
    wire_bytes: float = 0.0
    seconds: float = 0.0


class Ledger:
    """The entries of this rank, by operation and group: ``ledger["all_reduce", "tp"].calls``."""

    def __init__(self) -> None:
        self._entries: defaultdict[tuple[str, str], Entry] = defaultdict(Entry)

    def add(self, operation: str, group: str, payload: int, wire: float, seconds: float) -> None:
        """Enter one call."""
        entry = self._entries[operation, group]
        entry.calls += 1
        entry.payload_bytes += payload
        entry.wire_bytes += wire
        entry.seconds += seconds

    def __getitem__(self, key: tuple[str, str]) -> Entry:
        """The entry of ``(operation, group)``, all zeros if it was never called."""
        return self._entries.get(key, Entry())

    def __iter__(self) -> Iterator[tuple[str, str, Entry]]:
        """``(operation, group, entry)`` of everything called so far."""
        return iter([(*key, entry) for key, entry in self._entries.items()])

    @property
    def seconds(self) -> float:
        """Seconds spent in all collectives together, waiting for other ranks included."""
        return sum(entry.seconds for entry in self._entries.values())

    def clear(self) -> None:
        """Forget everything: what follows is counted from zero."""
        self._entries.clear()
