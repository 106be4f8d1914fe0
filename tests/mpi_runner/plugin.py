"""What pytest loads: the mark ``ranks``, the fixture ``comm``, and the controller.

``pytest`` runs serial tests in its own process, and for each number of ranks one
``mpirun -n N python -m pytest`` that runs all tests of that size, whose reports it merges. When a
test breaks a launch, another goes on with the next test. So that no core is idle, a second process
runs the serial tests of commands, and others those that mostly wait: see `mpi_runner.lane`.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from mpi_runner import launch
from mpi_runner.controller import Controller
from mpi_runner.job import sizes_and_timeout
from mpi_runner.lane import PLAN
from mpi_runner.launch import announced_size
from mpi_runner.warm import end_warm_ranks

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpi_runner.rank import Rank


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Make this process a rank or the controller, before pytest's plugins are configured."""
    config.addinivalue_line(
        "markers",
        "ranks(*sizes, timeout=60): run the test on each of these numbers of MPI ranks, "
        "by default 1, 2, 3, 4 and 8, within `timeout` seconds",
    )
    config.addinivalue_line(
        "markers",
        "waits(seconds): the tests of this file mostly wait for time to pass, for about so many "
        "seconds in all: they do so beside tests that compute, the longest first",
    )
    by_hand = config.getoption("with_mpi", False)  # an option of pytest-mpi
    if PLAN in os.environ or by_hand:
        # Imported here because it starts MPI, which the controller must leave to the ranks.
        from mpi_runner.rank import Rank

        # Taken away, because what a test starts is no rank of this launch.
        plan = None if by_hand else Path(os.environ.pop(PLAN))
        config.pluginmanager.register(Rank(config, plan), "mpi-rank")
    elif announced_size() is not None:
        raise pytest.UsageError("pytest runs under mpirun: add --with-mpi")
    else:
        if sys.dont_write_bytecode:
            _share_bytecode(config)
        config.pluginmanager.register(Controller(config), "mpi-controller")


def _share_bytecode(config: pytest.Config) -> None:
    """Where Python may not leave bytecode beside modules, leave it in a folder of this run: else
    each of some hundred processes would compile all modules anew."""
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = tempfile.mkdtemp(prefix="mpi_runner-")
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    config.add_cleanup(lambda: shutil.rmtree(str(sys.pycache_prefix), ignore_errors=True))


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


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Where the time went, and how many processes the tests started, which is what takes it."""
    if controller := cast("Controller | None", config.pluginmanager.get_plugin("mpi-controller")):
        terminalreporter.write_line(controller.summary())
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
