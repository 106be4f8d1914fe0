"""One of the warm ranks: ``python -m mpi_runner.warm_rank SOCKET``, see `mpi_runner.warm`."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mpishard import cli
from mpishard.runtime import launch

WORLD = launch.start()

from mpi4py import MPI  # noqa: E402  (which `start` has started)

import mpishard.commands  # noqa: E402, F401  (so that no command need import it)
from mpi_runner.warm import PROGRAM  # noqa: E402

HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # what commands set handlers of


class Lent(MPI.Intracomm):
    """A communicator that keeps those made of it. A process has 2,048, of which commands leave some
    to the end of MPI."""

    made: list[Lent]

    def _keep(self, comm: MPI.Comm) -> Lent:
        lent = Lent(comm)
        lent.made = self.made
        self.made.append(lent)
        return lent

    def Dup(self, *args: Any) -> Lent:
        return self._keep(super().Dup(*args))

    def Split(self, *args: Any) -> Lent:
        return self._keep(super().Split(*args))

    def Split_type(self, *args: Any) -> Lent:
        return self._keep(super().Split_type(*args))


@contextmanager
def lent_world(n: int) -> Iterator[Lent]:
    """A world of the first `n` ranks, and the end of all communicators made of it."""
    whole = n == WORLD.size
    world = Lent(WORLD if whole else WORLD.Create_group(WORLD.group.Incl(range(n))))
    world.made = [] if whole else [world]
    yield world
    for comm in world.made:
        if comm != MPI.COMM_NULL:
            comm.Free()


@contextmanager
def output_in(out: str, err: str) -> Iterator[None]:
    """Standard output and error go to these files, until the end."""
    before = os.dup(1), os.dup(2)
    stdout = sys.stdout
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    yield
    sys.stdout = stdout  # of ranks other than 0 it was another
    for stream, number, saved in zip((sys.stdout, sys.stderr), (1, 2), before, strict=True):
        stream.flush()
        os.dup2(saved, number)
        os.close(saved)


def run(n: int, words: list[str], cwd: str, out: str, err: str) -> int:
    """The exit status of the job that is this command, on the first `n` ranks."""
    handlers = {number: signal.getsignal(number) for number in HEARD}
    os.chdir(cwd)
    sys.argv = [PROGRAM, *words]
    with output_in(out, err), lent_world(n) as world:

        def here(main: Callable[[MPI.Intracomm], None]) -> int:
            return launch.run_on(world, main)

        launch.run = here
        status = cli.main()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return status


def serve(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.sendall(f"{WORLD.rank}".encode())
        for task in connection.makefile("r", encoding="utf-8"):
            connection.sendall(f"{run(**json.loads(task))}\n".encode())


if __name__ == "__main__":
    serve(sys.argv[1])
