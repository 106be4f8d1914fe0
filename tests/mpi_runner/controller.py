"""The process that pytest was called in: it runs some serial tests itself, has lanes run all the
others, and reports for everybody."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

import pytest

from mpi_runner.job import failed_report
from mpi_runner.lane import Lane, divide, fits
from mpi_runner.launch import allowed_cores, sweep_shared_memory


class Controller:
    """Runs multi-rank tests, and most serial ones, from a process that is no rank itself."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.lanes: list[Lane] = []
        self.lane_of: dict[pytest.Item, Lane] = {}
        self.pending: list[Lane] = []
        self.is_busy = False  # with tests of its own
        self.start = self.end = time.monotonic()  # of its own tests
        self.hopeless: dict[int | None, str] = {}  # sizes that cannot be started, and why
        # A time limit around pytest ends it like the keyboard: with its launches, not without.
        signal.signal(signal.SIGTERM, signal.default_int_handler)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Divide the tests: first those of this process, then lane after lane."""
        option = self.config.option
        # Where somebody looks on, nothing runs out of sight that need not.
        is_watched = option.usepdb or option.capture == "no"
        own, self.lanes = divide(items, is_watched)
        self.pending = list(self.lanes)
        self.lane_of = {item: lane for lane in self.lanes for item in lane.items}
        items[:] = [*own, *self.lane_of]
        self.start, self.end = time.monotonic(), 0.0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> object:
        """A test of this process takes pytest's way, and that of a lane is only reported."""
        lane = self.lane_of.get(item)
        self.is_busy = lane is None
        self._start_those_that_fit()
        if lane is None:
            return None
        self.end = self.end or time.monotonic()
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._run(lane, item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _start_those_that_fit(self) -> None:
        """Start lanes before their turn to be reported, as many as the machine carries."""
        for lane in list(self.pending):
            running = [other for other in self.lanes if other.is_running]
            if fits(lane, running, self.is_busy, allowed_cores()):
                with suppress(FileNotFoundError):  # no mpirun, which is reported in its turn
                    self._start(lane, lane.items[0])

    def _start(self, lane: Lane, first: pytest.Item) -> None:
        if lane in self.pending:
            self.pending.remove(lane)
        factory = self.config._tmp_path_factory  # type: ignore[attr-defined]
        name = "serial" if lane.size is None else f"ranks{lane.size}"
        lane.start(first, self._options(), factory.mktemp(f"{name}-"))

    def _run(self, lane: Lane, item: pytest.Item) -> list[pytest.TestReport]:
        """The reports of `item` from the running launch of its lane, or from a new one."""
        if lane.size in self.hopeless:
            return [failed_report(item, self.hopeless[lane.size])]
        while lane in self.pending and any(other.is_running for other in self.lanes):
            time.sleep(0.05)  # lanes that started before it leave no room
            self._start_those_that_fit()
        if lane.job is None:
            try:
                self._start(lane, item)
            except FileNotFoundError as error:  # no mpirun
                self.hopeless[lane.size] = str(error)
                return self._run(lane, item)
        assert lane.job is not None
        job = lane.job

        def ended() -> str | None:
            self._start_those_that_fit()
            return lane.how_ended()

        verdict = job.wait(item, ended)
        if not verdict and item is lane.items[-1]:
            verdict = lane.finish()
        reports = job.merged(item, verdict, lane.output())
        if verdict and not job.begun:
            what = "serial tests" if lane.size is None else f"{lane.size} ranks"
            self.hopeless[lane.size] = f"{what} cannot be launched: see the first of their tests"
        if verdict or item is lane.items[-1]:
            lane.stop()
        return reports

    def _options(self) -> list[str]:
        """What makes the ranks collect the same tests, and show failures as asked for here."""
        option = self.config.option
        options = ["--no-header", "-p", "no:cacheprovider", f"--rootdir={self.config.rootpath}"]
        if self.config.inipath is not None:
            options += ["-c", str(self.config.inipath)]
        if self.config.getoption("exhaustive", False):
            options.append("--exhaustive")
        if option.showlocals:
            options.append("--showlocals")
        return [*options, f"--tb={option.tbstyle}", *["-v"] * option.verbose]

    def summary(self) -> str:
        """What each lane took, of processors also where it ran in processes of its own."""
        own = (self.end or time.monotonic()) - self.start
        others = [f"{lane.name} {lane.seconds:.0f} s ({lane.cpu:.0f} s)" for lane in self.lanes]
        total = f"{sum(os.times()[:4]):.0f} s of processors in all"
        return f"lanes: {', '.join([f'serial {own:.0f} s', *others])}; {total}"

    def pytest_sessionfinish(self) -> None:
        self.end = self.end or time.monotonic()
        for lane in self.lanes:
            lane.stop()
        time.sleep(0.2)  # until what the last launch left is surely nobody's
        sweep_shared_memory()
