"""How the tests run, and what they have at hand.

- ``pytest`` runs everything: serial tests in its own process and, beside it, in one for each of
  ``commands`` and ``cluster``; and for each number of ranks one ``mpirun -n N`` with all tests of
  that size. ``pytest -k np4`` runs those on four ranks. With ``-s`` or ``--pdb`` all serial tests
  run in pytest's process.
- ``pytestmark = pytest.mark.waits(60)`` says that the tests of a module mostly wait, for about a
  minute in all: they run in a process of their own, beside tests that compute.
- ``mpirun -n 4 python -m pytest --with-mpi`` runs the tests on four ranks, without the controller.
- ``@pytest.mark.ranks`` on a test (or ``pytestmark = pytest.mark.ranks`` in a module) makes it a
  multi-rank test, on 1, 2, 3, 4 and 8 ranks; ``@pytest.mark.ranks(2, 4, timeout=20)`` chooses.
  Every rank runs the whole test. It may take the fixtures ``comm``, a communicator of its own, and
  ``ranks``, the number of ranks. ``tmp_path`` differs from rank to rank; ``mpi_tmp_path``, of
  pytest-mpi, is rank 0's on all.
- ``@over(layouts_of)`` of `sweep` makes a test one for each tiny model that has layouts of that
  number of ranks. ``pytest --exhaustive`` has all degrees for all models, on 6 and 8 ranks too.
- ``from mpi_runner import run_mpi`` runs a real command under mpirun, in a serial test:
  ``run_mpi(4, ["-m", "mpishard", "generate", …])`` answers with returncode, stdout and stderr;
  ``run_mpi(None, …)`` goes without mpirun. ``Launch`` is the same as a running process, whose
  ranks a test can stop or kill.
- ``from mpi_runner import run_warm`` runs a command of mpishard in ranks that are kept for the next
  one: the same answers without the time that launches take. `commands.shell.mpishard` does.
- The mpirun beside the running Python is taken, else the one on the PATH; ``$MPISHARD_MPIRUN``
  (a command with its options) overrides both.

Files of tests need names of their own, whatever folder they are in.
"""

import covering
import pytest

pytest_plugins = ["mpi_runner.plugin"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--exhaustive",
        action="store_true",
        help="sweep every tiny model over all degrees on every number of ranks, not over a few "
        "layouts in which all options meet",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "sweep(layouts_of): for the variants for which layouts_of(ranks, variant) is not empty",
    )
    covering.exhaustive = config.getoption("exhaustive")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def is_left_out(item: pytest.Item) -> bool:
        mark = item.get_closest_marker("sweep")
        if mark is None:
            return False
        params = item.callspec.params  # type: ignore[attr-defined]
        return not mark.args[0](params["ranks"], params["variant"])

    left_out = [item for item in items if is_left_out(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]
