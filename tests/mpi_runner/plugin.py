"""What pytest loads: the mark ``ranks``, the fixture ``comm``, and the controller.

``pytest`` runs serial tests in its own process, and for each number of ranks one
``mpirun -n N python -m pytest`` that runs all tests of that size, whose reports it merges. When a
test breaks a launch, another goes on with the next test. The tests on one rank run beside serial
tests, so that two cores have work.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from mpi_runner import launch
from mpi_runner.job import Job, failed_report, ranks_of, sizes_and_timeout
from mpi_runner.launch import Launch, allowed_cores, announced_size, sweep_shared_memory
from mpi_runner.warm import end_warm_ranks

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpi_runner.rank import Rank

LAUNCHING = ("cluster", "commands")  # folders of serial tests that start ranks
PLAN = "MPI_RUNNER_PLAN"  # a file, named in the environment of the ranks that a controller starts


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Make this process a rank or the controller, before pytest's plugins are configured."""
    config.addinivalue_line(
        "markers",
        "ranks(*sizes, timeout=60): run the test on each of these numbers of MPI ranks, "
        "by default 1, 2, 3, 4 and 8, within `timeout` seconds",
    )
    by_hand = config.getoption("with_mpi", False)  # an option of pytest-mpi
    if PLAN in os.environ or by_hand:
        # Imported here because it starts MPI, which the controller must leave to the ranks.
        from mpi_runner.rank import Rank

        plan = None if by_hand else Path(os.environ[PLAN])
        config.pluginmanager.register(Rank(config, plan), "mpi-rank")
    elif announced_size() is not None:
        raise pytest.UsageError("pytest runs under mpirun: add --with-mpi")
    else:
        config.pluginmanager.register(Controller(config), "mpi-controller")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A marked test becomes one test for each number of ranks, with ids np1, np2 … In a launch it
    becomes none for other numbers than the launch's: to make them took each rank seconds."""
    mark = metafunc.definition.get_closest_marker("ranks")
    if mark is not None:
        sizes, _ = sizes_and_timeout(*mark.args, **mark.kwargs)
        if rank := metafunc.config.pluginmanager.get_plugin("mpi-rank"):
            sizes = tuple(size for size in sizes if size == cast("Rank", rank).size)
        if "ranks" not in metafunc.fixturenames:
            metafunc.fixturenames.append("ranks")
        metafunc.parametrize("ranks", sizes, ids=[f"np{size}" for size in sizes])


def pytest_unconfigure() -> None:
    end_warm_ranks()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many processes the tests started, which is what takes time."""
    by = launch.launches
    terminalreporter.write_line(
        f"launches: {by['mpirun']} of mpirun, {by['python']} of Python alone; "
        f"commands in warm ranks: {by['commands']}"
    )


@pytest.fixture
def comm(request: pytest.FixtureRequest, ranks: int) -> MPI.Intracomm:
    """A communicator of all ranks that belongs to this test alone: what an earlier test left
    unreceived cannot be mistaken for its messages. The runner frees it."""
    rank = request.config.pluginmanager.get_plugin("mpi-rank")
    return cast("Rank", rank).comm


def _launches(item: pytest.Item) -> bool:
    """Whether a serial test is one of those that start ranks, and have all cores for them."""
    return item.path.parent.name in LAUNCHING


class Controller:
    """Runs multi-rank tests from a process that is no rank itself."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.job: Job | None = None
        self.launch: Launch | None = None
        self.last = ""  # test of the running launch
        self.is_ahead = False  # whether a launch was started before its turn
        self.hopeless: dict[int, str] = {}  # numbers of ranks that cannot be started, and why
        # A time limit around pytest ends it like the keyboard: with its launches, not without.
        signal.signal(signal.SIGTERM, signal.default_int_handler)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: (ranks_of(item) or 0, not _launches(item)))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> object:
        if ranks_of(item) is None:
            self._run_ahead(item)
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._run(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _run_ahead(self, item: pytest.Item) -> None:
        """Start the tests on one rank when only such serial tests are left, `item` first, as start
        no ranks themselves: each side has a core."""
        if self.job is None and not self.is_ahead and not _launches(item) and allowed_cores() > 1:
            self.is_ahead = True
            first = next((other for other in item.session.items if ranks_of(other) == 1), None)
            with suppress(FileNotFoundError):  # no mpirun, which is reported when its turn comes
                if first is not None:
                    self._start(first, 1)

    def _run(self, item: pytest.Item) -> list[pytest.TestReport]:
        """The reports of `item` from the running launch, or from a new one."""
        size = ranks_of(item)
        assert size is not None
        if size in self.hopeless:
            return [failed_report(item, self.hopeless[size])]
        if self.job is None or self.job.size != size:
            try:
                self._start(item, size)
            except FileNotFoundError as error:  # no mpirun
                self.hopeless[size] = str(error)
                return self._run(item)
        assert self.job is not None
        verdict = self.job.wait(item, self._ended)
        if not verdict and item.nodeid == self.last:
            verdict = self._finish()
        reports = self.job.merged(item, verdict, self._output())
        if verdict and not self.job.begun:
            self.hopeless[size] = f"{size} ranks cannot be launched: see the first of their tests"
        if verdict:
            self._stop()
        return reports

    def _start(self, first: pytest.Item, size: int) -> None:
        """Launch the tests of `size` ranks, from `first` on."""
        self._stop()
        items = first.session.items
        todo = [item for item in items[items.index(first) :] if ranks_of(item) == size]
        self.last = todo[-1].nodeid
        factory = self.config._tmp_path_factory  # type: ignore[attr-defined]
        directory: Path = factory.mktemp(f"ranks{size}-")
        plan = directory / "plan.json"
        plan.write_text(json.dumps({"size": size, "tests": [item.nodeid for item in todo]}))
        with open(directory / "output", "w") as output:
            self.launch = Launch(
                size,
                ["-m", "pytest", *self._options(), *sorted({str(item.path) for item in todo})],
                env={PLAN: str(plan)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.job = Job(self.config, directory, size)

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

    def _ended(self) -> str | None:
        """How the launch ended, None while it runs."""
        assert self.launch is not None
        status = self.launch.process.poll()
        return None if status is None else f"mpirun ended with status {status}"

    def _finish(self) -> str | None:
        """After the last test, wait for the ranks to leave MPI; what went wrong if they do not."""
        assert self.launch is not None and self.job is not None
        try:
            status = self.launch.process.wait(30)
            self.job.read()
        except subprocess.TimeoutExpired:
            return "30 s after this last test the ranks had not ended"
        return f"after this last test mpirun ended with status {status}" if status else None

    def _output(self) -> str:
        assert self.job is not None
        lines = (self.job.directory / "output").read_text(errors="replace").splitlines()
        return "\n".join(lines[-30:])

    def _stop(self) -> None:
        if self.launch is not None:
            self.launch.end()
        self.launch = self.job = None

    def pytest_sessionfinish(self) -> None:
        self._stop()
        time.sleep(0.2)  # until what the last launch left is surely nobody's
        sweep_shared_memory()
