"""One launch of ranks that run tests together, as seen through the files they write.

Each rank appends events, one JSON object a line, to a file of its own: its process id, the tests it
begins and pytest's report of each setup, call and teardown. Asked by a signal, or when it crashes,
it writes its stack to a second file. Files still speak when MPI does not any more.
"""

from __future__ import annotations

import json
import os
import signal
import sysconfig
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mpi_runner.launch import launches

DEFAULT_SIZES = (1, 2, 3, 4, 8)
DEFAULT_TIMEOUT = 60.0
SERIAL_TIMEOUT = 300.0

# How long the ranks may stay in each state of a test before it is given up, in seconds.
START_LIMIT = 120.0  # until one of them begins it: includes the start of the launch
GRACE = 3.0  # after one of them has failed or died: the others may be waiting for it for ever

# Frames that say nothing about where in a test a rank is.
_FOREIGN = ("<frozen", "site-packages", sysconfig.get_path("stdlib"), str(Path(__file__).parent))


def sizes_and_timeout(
    *sizes: int, timeout: float = DEFAULT_TIMEOUT
) -> tuple[tuple[int, ...], float]:
    """What the arguments of ``@pytest.mark.ranks(...)`` mean."""
    return sizes or DEFAULT_SIZES, timeout


def ranks_of(item: pytest.Item) -> int | None:
    """The number of ranks that `item` runs on, None for a serial test."""
    marked = item.get_closest_marker("ranks") is not None
    return item.callspec.params["ranks"] if marked else None  # type: ignore[attr-defined]


def timeout_of(item: pytest.Item) -> float:
    """The seconds that the ranks may take for `item`, or the process for a serial test."""
    mark = item.get_closest_marker("ranks")
    if mark is None:
        return SERIAL_TIMEOUT
    return sizes_and_timeout(*mark.args, **mark.kwargs)[1]


def events_file(directory: Path, rank: int) -> Path:
    return directory / f"rank{rank}.jsonl"


def stack_file(directory: Path, rank: int) -> Path:
    return directory / f"rank{rank}.stack"


class Job:
    """The progress of `size` ranks that write into `directory`."""

    def __init__(self, config: pytest.Config, directory: Path, size: int) -> None:
        self.config = config
        self.directory = directory
        self.size = size
        self.pids: dict[int, int] = {}
        self.begun: set[str] = set()
        self.reports: dict[str, dict[int, list[pytest.TestReport]]] = defaultdict(dict)
        self.seconds = 0.0  # that the ranks took until they ended well, and of processors
        self.cpu = 0.0
        self._bytes_read = [0] * size

    def wait(self, item: pytest.Item, ended: Callable[[], str | None] = lambda: None) -> str | None:
        """None as soon as all ranks have finished `item`, or a sentence on why they will not.

        `ended` says how the launch ended, once it has.
        """
        limits = {"starting": START_LIMIT, "running": timeout_of(item), "broken": GRACE}
        state, since = "starting", time.monotonic()
        while True:
            end = ended()  # asked before the files are read, so that they are complete if it ended
            self.read()
            inside = self.unfinished(item)
            if not inside:
                return None
            if end:
                return f"{end}, and {self.name(inside)} never finished the test"
            now_in = self._state(item, inside)
            if now_in != state:
                state, since = now_in, time.monotonic()
            if time.monotonic() > since + limits[state]:
                return self._verdict(item, state, limits[state])
            time.sleep(0.01)

    def unfinished(self, item: pytest.Item) -> list[int]:
        """The ranks that have not reported the end of `item`."""
        reports = self.reports[item.nodeid]
        return [
            rank
            for rank in range(self.size)
            if not any(report.when == "teardown" for report in reports.get(rank, []))
        ]

    def failures(self, item: pytest.Item) -> dict[int, pytest.TestReport]:
        """The first failed report of each rank that has one."""
        return {
            rank: next(report for report in reports if report.failed)
            for rank, reports in sorted(self.reports[item.nodeid].items())
            if any(report.failed for report in reports)
        }

    def _state(self, item: pytest.Item, inside: list[int]) -> str:
        if self.failures(item) or self._dead(inside):
            return "broken"
        return "running" if item.nodeid in self.begun else "starting"

    def _dead(self, ranks: Iterable[int]) -> list[int]:
        return [rank for rank in ranks if rank in self.pids and not _alive(self.pids[rank])]

    def _verdict(self, item: pytest.Item, state: str, limit: float) -> str:
        inside = self.unfinished(item)
        if state == "starting":
            return f"no rank began the test within {limit:g} s"
        if state == "running":
            return f"timeout after {limit:g} s: {self.name(inside)} still inside the test"
        failed, dead = list(self.failures(item)), self._dead(inside)
        first = f"{self.name(failed)} failed" if failed else f"{self.name(dead)} died"
        others = [rank for rank in inside if rank not in dead]
        waiting = f"; still inside the test {limit:g} s later: {self.name(others)}"
        return first + (waiting if others else "")

    def name(self, ranks: list[int]) -> str:
        """`ranks` in words: ``rank 2``, ``ranks 0, 1, 3``, ``all 4 ranks``."""
        if len(ranks) == self.size > 1:
            return f"all {self.size} ranks"
        return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))

    def read(self) -> None:
        """Take in what the ranks have written since the last call."""
        for rank in range(self.size):
            with suppress(FileNotFoundError), events_file(self.directory, rank).open("rb") as file:
                file.seek(self._bytes_read[rank])
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # the rank is still writing it: the rest would pass for a line
                    self._bytes_read[rank] += len(line)
                    self._note(rank, json.loads(line))

    def _note(self, rank: int, event: dict[str, Any]) -> None:
        if "pid" in event:
            self.pids[rank] = event["pid"]
        elif "begin" in event:
            self.begun.add(event["begin"])
        elif "launches" in event:
            for by, count in event["launches"].items():
                launches[by] += count
        elif "cpu" in event:
            self.seconds = max(self.seconds, event["seconds"])
            self.cpu += event["cpu"]
        else:
            data = event["report"]
            if isinstance(data["longrepr"], list):  # a skip's reason, a tuple before it was JSON
                data["longrepr"] = tuple(data["longrepr"])
            report = self.config.hook.pytest_report_from_serializable(config=self.config, data=data)
            self.reports[report.nodeid].setdefault(rank, []).append(report)

    def merged(
        self, item: pytest.Item, verdict: str | None, output: str = ""
    ) -> list[pytest.TestReport]:
        """The reports of `item` for all ranks together: rank 0's if nobody failed, else one that
        shows every rank's failure, and with a `verdict` where the other ranks were.

        `output` is the launcher's own, shown when no rank can say what happened.
        """
        failures = self.failures(item)
        if not verdict and not failures:
            return self.reports[item.nodeid][0]
        if verdict:
            parts = [f"{self.size} ranks: {verdict}", *self._stacks(self.unfinished(item))]
            when = "call"
        else:
            first = next(iter(failures.values()))
            parts = [f"{self.name(list(failures))} failed: {_message(first)}"]
            when = first.when
        parts[1:1] = self._tracebacks(failures)
        if output and len(parts) == 1:
            parts.append(f"--- output of the launch, its end:\n{output}")
        return [failed_report(item, "\n".join(parts), when, _captured(failures))]

    def _tracebacks(self, failures: dict[int, pytest.TestReport]) -> list[str]:
        """Every rank's failure, those of the same line together: one traceback for them, and the
        messages that differ."""
        alike: dict[object, list[int]] = defaultdict(list)
        for rank, report in failures.items():
            alike[_place(report)].append(rank)
        parts = []
        for ranks in alike.values():
            first = failures[ranks[0]]
            parts.append(f"--- {self.name(ranks)} failed in {first.when}:\n{first.longreprtext}")
            for rank in ranks[1:]:
                if _message(failures[rank]) != _message(first):
                    parts.append(f"--- rank {rank}: {_message(failures[rank])}")
        return parts

    def _stacks(self, ranks: list[int]) -> list[str]:
        """Where each of `ranks` is, innermost call first; asks those that still run."""
        for rank in ranks:
            with suppress(KeyError, ProcessLookupError):
                os.kill(self.pids[rank], signal.SIGUSR1)
        time.sleep(0.3)
        parts = []
        for rank in ranks:
            with suppress(FileNotFoundError):
                lines = stack_file(self.directory, rank).read_text().splitlines()
                if told := "\n".join(filter(_tells, lines)):
                    parts.append(f"--- rank {rank} was at (innermost call first):\n{told}")
        return parts


def failed_report(
    item: pytest.Item,
    text: str,
    when: Any = "call",
    sections: Iterable[tuple[str, str]] = (),
) -> pytest.TestReport:
    """A failure of `item` in pytest's terms; the first line of `text` goes into its summary."""
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords=dict.fromkeys(item.keywords, 1),
        outcome="failed",
        longrepr=text,
        when=when,
        sections=sections,
    )


def _captured(failures: dict[int, pytest.TestReport]) -> list[tuple[str, str]]:
    return [
        (f"{title}, rank {rank}", text)
        for rank, report in failures.items()
        for title, text in report.sections
    ]


def _place(report: pytest.TestReport) -> object:
    """The line where the test failed, or the whole text for failures that have no such line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return (report.when, crash.path, crash.lineno) if crash else (report.when, report.longreprtext)


def _message(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else report.longreprtext).partition("\n")[0]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _tells(line: str) -> bool:
    """Whether a line of faulthandler's output shows a crash or a frame of the project."""
    if line.startswith("Fatal Python error"):
        return True
    return line.startswith("  File") and not any(name in line for name in _FOREIGN)
