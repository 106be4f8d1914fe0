"""Ranks that have started MPI and imported the program, and run one command of it after another.

Most commands of the tests differ in what they answer, not in how their processes start and end: in
warm ranks such a command takes a tenth of the time that mpirun and Python need to start. Real
launches are for the rest: signals, standard input, terminals, patched programs, ends of ranks.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from mpi_runner.launch import CHECKOUT, LAUNCHERS_WORDS, Launch, launches, mpirun

START_LIMIT = 120.0  # seconds
PROGRAM = str(CHECKOUT / "mpishard" / "__main__.py")  # what `python -m mpishard` is called
# How many are started together. Each takes half a second of a processor to start, and as much
# again when a command has ended it.
SIZES = (2, 4, 8)

# By the command that starts them, empty for a process without mpirun, and their number.
_running: dict[tuple[str, ...], WarmRanks] = {}


class WarmRanks:
    """A launch of `n` ranks, or of one process without mpirun if `n` is None, that runs commands
    until it is told to end or its end of the connection closes."""

    def __init__(self, n: int | None) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="mpi_runner-")
        directory = Path(self._directory.name)
        self.out, self.err = directory / "out", directory / "err"
        path = [str(CHECKOUT / "tests"), os.environ.get("PYTHONPATH", "")]
        with socket.socket(socket.AF_UNIX) as listener, (directory / "start").open("w") as output:
            listener.bind(str(directory / "socket"))
            listener.listen(n or 1)
            listener.settimeout(0.5)
            self.launch = Launch(
                n,
                ["-m", "mpi_runner.warm_rank", directory / "socket"],
                env={"PYTHONPATH": os.pathsep.join(filter(None, path))},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            connections = [self._accept(listener) for _ in range(n or 1)]
        by_rank = {int(connection.recv(99)): connection for connection in connections}
        self.ranks = [connection for _, connection in sorted(by_rank.items())]

    def _accept(self, listener: socket.socket) -> socket.socket:
        """The connection of one more rank. The test fails, with what the launch said, if it ends or
        takes too long."""
        deadline = time.monotonic() + START_LIMIT
        while not self.has_ended and time.monotonic() < deadline:
            with suppress(TimeoutError):
                return listener.accept()[0]
        self.launch.end()
        pytest.fail(f"warm ranks do not start:\n{(self.out.parent / 'start').read_text()}", False)

    def run(
        self, n: int, words: Sequence[str], cwd: str, timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """What a command answers on the first `n` of these ranks. The test fails if it still runs
        after `timeout` seconds; the launch has ended then, and also where a command ended its
        ranks."""
        self.out.write_bytes(b"")
        self.err.write_bytes(b"")
        task = {"n": n, "words": words, "cwd": cwd, "out": str(self.out), "err": str(self.err)}
        for rank in self.ranks[:n]:
            rank.sendall(f"{json.dumps(task)}\n".encode())
        deadline, answers = time.monotonic() + timeout, []
        for rank in self.ranks[:n]:
            if not select.select([rank], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self.launch.end()
                said = self._said(words, -1)
                pytest.fail(f"still running after {timeout:g} s: {words}\n{said}", False)
            answers.append(rank.recv(99))
        if all(answers):
            (status,) = set(map(int, answers))  # all ranks know how the job ends
        else:
            status = self.launch.process.wait(START_LIMIT)
            self.end()
        return self._said(words, status)

    def _said(self, words: Sequence[str], status: int) -> subprocess.CompletedProcess[str]:
        out, err = (path.read_text("utf-8", "replace") for path in (self.out, self.err))
        return subprocess.CompletedProcess(words, status, out, LAUNCHERS_WORDS.sub("", err))

    @property
    def has_ended(self) -> bool:
        return self.launch.process.poll() is not None

    def dismiss(self) -> None:
        """Let the ranks leave MPI."""
        for rank in self.ranks:
            rank.close()

    def end(self) -> None:
        """The same, and those that hang by force."""
        self.dismiss()
        if not self.has_ended:
            with suppress(subprocess.TimeoutExpired):
                self.launch.process.wait(5)
        self.launch.end()


def run_warm(
    n: int | None, words: Sequence[str], cwd: str | None = None, timeout: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """What ``mpirun -n N python -m mpishard WORDS`` answers, from ranks that are kept warm."""
    launches["commands"] += 1
    return ranks(n).run(n or 1, words, cwd or os.getcwd(), timeout)


def ranks(n: int | None) -> WarmRanks:
    """Those that run the next command on `n` ranks: the first of 2, 4 or 8; new ones for another
    launcher, such as one of other hosts, than has started any before."""
    size = n and next((size for size in SIZES if size >= n), n)
    key = () if size is None else (*mpirun(), str(size))
    if key not in _running or _running[key].has_ended:
        _running[key] = WarmRanks(size)
    return _running[key]


def end_warm_ranks() -> None:
    """End all of them."""
    for ended in _running.values():
        ended.dismiss()  # all before the first is waited for
    while _running:
        _running.popitem()[1].end()
