"""Messages between ranks that nobody waits for: sent at once, taken in when there is time.

Collectives are for what all ranks do at the same moment. What happens to one of them alone, that a
sequence has ended or that there is room for another, travels as a message.
"""

from __future__ import annotations

from collections.abc import Iterator

from mpi4py import MPI


class Mailbox:
    """Messages of bytes between the ranks of `comm`, by way of a communicator of their own.

    Those from one rank to another with the same `tag` arrive in the order in which they were sent.
    A rank may write to itself.
    """

    def __init__(self, comm: MPI.Comm) -> None:
        self._comm = comm.Dup()
        self._leaving: list[tuple[MPI.Request, bytes]] = []  # MPI reads them until they have left

    def send(self, message: bytes, to: int, tag: int) -> None:
        """Let `message` leave for rank `to`. MPI_Isend."""
        self._leaving = [pair for pair in self._leaving if not pair[0].Test()]
        self._leaving.append((self._comm.Isend([message, MPI.BYTE], to, tag), message))

    def poll(self, tag: int) -> Iterator[tuple[int, bytes]]:
        """The messages with `tag` that have come so far, each with the rank it came from.
        MPI_Iprobe, MPI_Recv."""
        status = MPI.Status()
        while self._comm.Iprobe(tag=tag, status=status):
            message = bytearray(status.Get_count(MPI.BYTE))
            self._comm.Recv([message, MPI.BYTE], status.source, tag)
            yield status.source, bytes(message)

    def close(self) -> None:
        """Wait until everything has left. Collective: all ranks call it, after they have taken in
        all that was sent to them."""
        MPI.Request.Waitall([request for request, _ in self._leaving])
        self._comm.Free()
