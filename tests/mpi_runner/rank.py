"""The plugin inside a launch: this process is one rank, and runs each test with the others."""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol
from mpi4py import MPI

from mpi_runner.job import Job, events_file, ranks_of, stack_file, timeout_of
from mpi_runner.launch import announced_size, launches
from mpi_runner.warm import end_warm_ranks


class Rank:
    """Runs the tests in step with the other ranks, and writes what came of them to files.

    The controller reads them, if it made the launch and its `plan`. In a launch by hand, ``mpirun …
    pytest --with-mpi``, rank 0 does, and is the only one that prints.
    """

    def __init__(self, config: pytest.Config, plan: Path | None) -> None:
        self.config = config
        self.plan = json.loads(plan.read_text()) if plan else None
        self.start = time.monotonic()
        self.world = MPI.COMM_WORLD
        self.rank, self.size = self.world.rank, self.world.size
        started = self.plan["size"] if self.plan else announced_size()
        if started not in (None, self.size):
            raise pytest.UsageError(
                f"mpirun started {started} processes, but each is in a world of {self.size}: "
                "mpirun and the MPI library of mpi4py do not belong together"
            )
        self.sync = self.world.Dup()  # the runner's own messages
        self.comm = self.world  # of the running test
        self.stderr = os.fdopen(os.dup(2), "w")  # pytest captures only later
        self.directory = plan.parent if plan else self._agree_on_directory()
        config.option.basetemp = self.directory / f"tmp{self.rank}"
        self.events = events_file(self.directory, self.rank).open("a", buffering=1)
        self.stack = stack_file(self.directory, self.rank).open("w")
        self.job = Job(config, self.directory, self.size)

    def _agree_on_directory(self) -> Path:
        mine = tempfile.mkdtemp(prefix="mpi_runner-") if self.rank == 0 else None
        return Path(self.sync.bcast(mine))

    @property
    def speaks(self) -> bool:
        """Whether this rank reports: no rank does that has a controller."""
        return self.plan is None and self.rank == 0

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """After pytest's own plugins: silence all ranks but one, and be ready to show the stack."""
        if self.rank:
            quiet = pytest.TerminalReporter(config, open(os.devnull, "w"))
            config.pluginmanager.unregister(name="terminalreporter")
            config.pluginmanager.register(quiet, "terminalreporter")
        if self.plan:
            faulthandler.enable(self.stack)
        faulthandler.register(signal.SIGUSR1, self.stack, all_threads=False)
        self._write(pid=os.getpid())

    def pytest_sessionfinish(self) -> None:
        end_warm_ranks()
        if self.rank == 0:
            self._write(launches=launches)  # of commands, by tests
        self._write(seconds=time.monotonic() - self.start, cpu=sum(os.times()[:4]))

    def pytest_unconfigure(self) -> None:
        if self.speaks:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _write(self, **event: object) -> None:
        self.events.write(json.dumps(event, default=str) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Keep the tests of this number of ranks. A serial test is a test on one rank."""
        if self.plan:
            order = {nodeid: place for place, nodeid in enumerate(self.plan["tests"])}
            mine = sorted((i for i in items if i.nodeid in order), key=lambda i: order[i.nodeid])
        else:
            mine = [item for item in items if (ranks_of(item) or 1) == self.size]
        config.hook.pytest_deselected(items=list(set(items) - set(mine)))
        items[:] = mine
        everyones = self.sync.allgather((session.testsfailed, [item.nodeid for item in mine]))
        for rank, theirs in enumerate(everyones):
            if theirs != everyones[0]:
                raise pytest.UsageError(f"ranks 0 and {rank} do not collect the same tests")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> object:
        """Run one test in step with the other ranks, each in a fresh communicator."""
        if ranks_of(item) is None:
            return self._run_serially(item, nextitem) if self.plan else None
        if self.speaks:
            item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
            guard = threading.Thread(target=self._guard, args=(item,), daemon=True)
            guard.start()
        # The last resort, should whoever watches over the ranks be gone.
        faulthandler.dump_traceback_later(timeout_of(item) + 60, exit=True, file=self.stderr)
        self._write(begin=item.nodeid)
        self.comm = self.world.Dup()
        runtestprotocol(item, log=False, nextitem=nextitem)
        self._meet()
        self.comm.Free()
        faulthandler.cancel_dump_traceback_later()
        if self.speaks:
            guard.join()
            for report in self.job.merged(item, None):
                item.ihook.pytest_runtest_logreport(report=report)
            item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        stop = self.sync.bcast(item.session.shouldfail or item.session.shouldstop)
        if stop and self.rank:
            item.session.shouldstop = stop
        return True

    def _run_serially(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        """Run one serial test, for a controller."""
        self._write(begin=item.nodeid)
        runtestprotocol(item, log=False, nextitem=nextitem)
        return True

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Write down each report at once: what comes after it may hang."""
        report = yield
        to_data = self.config.hook.pytest_report_to_serializable
        self._write(report=to_data(config=self.config, report=report))
        return report

    def _meet(self) -> None:
        """Wait, asleep, until every rank is here: a failed one must not run ahead alone."""
        request = self.sync.Ibarrier()
        while not request.Test():
            time.sleep(0.001)

    def _guard(self, item: pytest.Item) -> None:
        """Abort the launch, and say why, when the ranks will not finish `item`."""
        if verdict := self.job.wait(item):
            report = self.job.merged(item, verdict)[0]
            self._abort(f"\nFAILED {item.nodeid}\n{report.longreprtext}\n")

    def pytest_internalerror(self, excrepr: Any) -> None:
        self._abort(f"[rank {self.rank}] {excrepr}\n")

    def _abort(self, text: str) -> None:
        self.stderr.write(text)
        self.stderr.flush()
        self.pytest_unconfigure()
        self.world.Abort(1)
