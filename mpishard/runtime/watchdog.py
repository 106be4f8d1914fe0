"""The watchdog: a collective that does not end ends the job, and every rank says where it is.

A thread beside the one that computes looks now and then whether that one has been inside the same
collective for longer than the timeout. If so it asks the threads of all ranks where theirs are,
prints that as one message, and aborts. This works because mpi4py lets go of Python's lock inside
MPI, where the other thread waits. A rank that does not answer is stopped, gone, or in code that
keeps Python's lock; for a process of the same machine, the system says which.

MPI is used from that thread only where it allows several threads (MPI_THREAD_MULTIPLE, which
mpi4py asks for unless told otherwise), on a communicator of its own. Elsewhere each rank speaks for
itself.

Only time inside one collective counts; but ranks that wait for one that computes, reads or writes
are inside one. The default is torch.distributed's for processors, Gloo: 30 minutes. (Megatron-LM's,
``--distributed-timeout-minutes``, is 10.)
"""

from __future__ import annotations

import atexit
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import takewhile, zip_longest
from pathlib import Path
from time import perf_counter
from traceback import format_exc, walk_stack
from types import CodeType, FrameType

from mpi4py import MPI

from mpishard.communication.check import caller, check_collective, source_line
from mpishard.communication.group import CallTracker, CollectiveCall, Group
from mpishard.communication.ledger import Ledger
from mpishard.errors import UserError
from mpishard.runtime.launch import TIMEOUT, abort_job, report

# Tags of messages between the threads.
QUESTION, ANSWER = 1, 2

ANSWER_SECONDS = 5.0  # for which answers are awaited
LOOK_SECONDS = 1.0  # between two looks at the clock, at most; at least a hundredth of it

STATES = {
    "T": "is stopped (SIGSTOP, or Ctrl-Z)",
    "t": "is stopped by a debugger",
    "D": "waits for a disk",
    "R": "runs, and keeps Python's lock or waits for a core",
    "S": "sleeps, and keeps Python's lock",
    "Z": "has ended",
}


@dataclass(frozen=True)
class RankStatus:
    """Where a rank is: in words, for how many seconds, and the lines of its stack, outermost
    first."""

    text: str
    seconds: float
    stack: tuple[str, ...] = ()


class Watchdog:
    """Watches over the collectives of this rank, from its making to `close`, or to the end of a
    ``with`` statement. Collective: all ranks of `comm` make one, with the same arguments.

        with mpishard.Watchdog(comm, timeout=600) as watch:
            model = mpishard.load("data/cpython-4m", comm, tp=2, watch=watch)

    When a collective of what was loaded with it takes longer than `timeout` seconds, the job ends
    with status 1 after one message that says where every rank of `comm` is; 0 never does that. With
    `check_collectives` the ranks of a group compare each collective before they make it, and one
    that differs raises `mpishard.errors.CollectiveMismatch`.

    Raises UserError for a timeout that is no number of seconds.
    """

    def __init__(
        self, comm: MPI.Intracomm, timeout: float = TIMEOUT, check_collectives: bool = False
    ) -> None:
        if not 0 <= timeout < math.inf:
            raise UserError(
                f"timeout {timeout:g} must be the seconds that a collective may take, or 0 for "
                "any time"
            )
        self.calls = CallTracker(check_collective if check_collectives else None)
        self.world = Group(comm, "world", Ledger(), self.calls)
        self.timeout = timeout
        # Whether the thread may use MPI beside the other one.
        self._talks = MPI.Query_thread() == MPI.THREAD_MULTIPLE
        self._closing = threading.Event()
        self._watched = threading.get_ident()
        self._above = [code for code, _ in _lines(sys._getframe(1).f_back)]
        self._thread: threading.Thread | None = None
        if timeout:
            self._comm = comm.Dup()  # no message of the program can match its messages
            self._homes = self._comm.allgather((socket.gethostname(), os.getpid()))
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()
            atexit.register(self.close)  # before MPI ends, after which nobody may call it

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Watch no longer. All ranks are to do this; a rank that has is one that does not answer
        where it is."""
        if self._thread is not None:
            self._closing.set()
            self._thread.join()
            self._thread = None
            self._comm.Free()
            atexit.unregister(self.close)

    def _run(self) -> None:
        """What the thread does."""
        try:
            self._watch()
        except BaseException:  # nobody would watch, and nobody would know
            self._end(f"a fault of the watchdog:\n{format_exc()}")

    def _watch(self) -> None:
        """Look, until this is closed, for a collective that takes too long, and for questions."""
        look = max(LOOK_SECONDS / 100, min(LOOK_SECONDS, self.timeout / 8))
        last, entry, inside = perf_counter(), None, 0.0
        while not self._closing.wait(look):
            call, now = self.calls.current, perf_counter()
            if call is None:
                entry = None
            else:
                # Time in which this whole process was stopped is none that it waited.
                passed = min(now - last, 2 * look)
                same = entry == (id(call), call.entered)
                inside = inside + passed if same else min(now - call.entered, passed)
                entry = id(call), call.entered
                if inside > self.timeout:
                    self._report_and_abort(call)
            last = now
            if self._talks and self._comm.Iprobe(MPI.ANY_SOURCE, QUESTION):
                self._answer()

    def _report_and_abort(self, overdue: CollectiveCall) -> None:
        """Say where all ranks are and end them, unless a lower rank is about to."""
        comm = self._comm
        places = {comm.rank: self._whereabouts()}
        if self._talks:
            places |= self._ask()
        self._end(
            f"rank {comm.rank} of {comm.size} has been in one collective for longer than the "
            f"timeout of {self.timeout:g} s: {overdue} (group {overdue.group.name})\n"
            + "\n".join(_merged(places))
        )

    def _ask(self) -> dict[int, RankStatus]:
        """Where all other ranks are. Does not return if a lower rank asks as well."""
        comm = self._comm
        others = [rank for rank in range(comm.size) if rank != comm.rank]
        questions = [comm.Isend(b"", rank, QUESTION) for rank in others]
        places: dict[int, RankStatus] = {}
        deadline = time.monotonic() + ANSWER_SECONDS
        while len(places) < len(others) and time.monotonic() < deadline:
            if any(comm.Iprobe(rank, QUESTION) for rank in range(comm.rank)):
                self._answer()
            places |= dict(self._answers())
            MPI.Request.Testall(questions)
            time.sleep(0.01)
        return {rank: places.get(rank) or self._unresponsive(rank) for rank in others}

    def _answers(self) -> Iterator[tuple[int, RankStatus]]:
        """What other ranks have answered by now."""
        status = MPI.Status()
        while self._comm.Iprobe(MPI.ANY_SOURCE, ANSWER, status):
            text = bytearray(status.Get_count(MPI.BYTE))
            self._comm.Recv(text, status.source, ANSWER)
            yield status.source, RankStatus(**json.loads(text))

    def _answer(self) -> None:
        """Tell all ranks that ask where this one is, until the end comes from one of them."""
        text = json.dumps(asdict(self._whereabouts())).encode()
        status, answers = MPI.Status(), []
        deadline = time.monotonic() + 3 * ANSWER_SECONDS
        while time.monotonic() < deadline:
            if self._comm.Iprobe(MPI.ANY_SOURCE, QUESTION, status):
                self._comm.Recv(bytearray(0), status.source, QUESTION)
                answers.append(self._comm.Isend(text, status.source, ANSWER))
            MPI.Request.Testall(answers)
            time.sleep(0.01)
        abort_job(self._comm, 1)  # it did not come

    def _end(self, message: str) -> None:
        report(message)
        if not self._talks:
            time.sleep(ANSWER_SECONDS)  # in which other ranks speak for themselves
        abort_job(self._comm, 1)

    def _whereabouts(self) -> RankStatus:
        """Where the watched thread of this rank is."""
        calls, now = self.calls, perf_counter()
        call = calls.current
        frame = sys._current_frames().get(self._watched)
        stack = tuple(self._stack(frame))
        if call is None or frame is None:
            done = ", ".join(f"{n} of {name}" for name, n in sorted(calls.done.copy().items()))
            text = f"in no collective; done: {done or 'none'}"
            return RankStatus(text, now - calls.left, stack)
        name = call.group.name
        ranks = ", ".join(map(str, call.group.members))
        group = f"{name} (ranks {ranks})" if call.group.members else name
        return RankStatus(
            f"in collective {call.number} of {group}, {call}, at {source_line(caller(frame))}; "
            f"done: {calls.done.get(name, 0)} of {name}",
            now - call.entered,
            stack,
        )

    def _stack(self, frame: FrameType | None) -> Iterator[str]:
        """The lines that the watched thread is in, outermost first, without those above the
        function that made this watch, which are the same on all ranks."""
        lines = _lines(frame)
        above = zip_longest(self._above, [code for code, _ in lines])
        same = takewhile(lambda codes: codes[0] is codes[1], above)
        return (line for _, line in lines[len(list(same)) :])

    def _unresponsive(self, rank: int) -> RankStatus:
        """Where a rank is that does not answer."""
        (here, _), (host, process) = self._homes[self._comm.rank], self._homes[rank]
        text = f"does not answer: process {process} on {host}"
        if host == here:
            text += f" {_state(process)}"
        return RankStatus(text, 0.0)


def _lines(frame: FrameType | None) -> list[tuple[CodeType, str]]:
    """The functions that a thread is in, outermost first, each with the line it has come to; none
    if the thread has ended."""
    stack = list(walk_stack(frame)) if frame else []
    return [
        (f.f_code, f"{source_line(f, line)} in {f.f_code.co_name}") for f, line in reversed(stack)
    ]


def _merged(places: dict[int, RankStatus]) -> Iterator[str]:
    """The whereabouts of all ranks, those that are in the same place together."""
    together: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for rank, one in sorted(places.items()):
        together.setdefault((one.text, tuple(one.stack)), []).append(rank)
    for (text, stack), ranks in together.items():
        longest = max(places[rank].seconds for rank in ranks)
        who = f"rank{'s' if ranks[1:] else ''} {', '.join(map(str, ranks))}"
        yield f"{who}: {text}" + (f"; for {longest:.1f} s" if longest else "")
        yield from (f"    {line}" for line in stack)


def _state(process: int) -> str:
    """What the system says of a process of this machine."""
    try:
        facts = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return STATES["Z"]
    except OSError:
        return ""
    return STATES.get(facts.rpartition(")")[2].split()[0], "")
