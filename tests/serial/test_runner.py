"""The multi-rank runner itself: what it says of tests that fail, hang, leave or crash on one rank,
and that nothing of a launch outlives it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from mpi_runner import Launch, run_mpi

pytestmark = pytest.mark.waits(35)

BROKEN_TESTS = """
import atexit, ctypes, os, pytest

def test_serial():
    pass

@pytest.mark.waits(1)
def test_waits_and_fails():
    print("words of one that waits")
    assert 7 == 8

@pytest.mark.waits(1)
def test_waits_and_leaves():
    os._exit(3)

@pytest.mark.waits(1)
def test_waits():
    assert "MPI_RUNNER_PLAN" not in os.environ

@pytest.mark.ranks(1)
def test_ends_badly():
    atexit.register(os._exit, 5)

@pytest.mark.ranks(2)
def test_all_fail(comm):
    print("words of rank", comm.rank)
    assert comm.rank == 7

@pytest.mark.ranks(2)
def test_one_fails_at_last(comm):
    comm.Barrier()
    assert comm.rank == 0

@pytest.mark.ranks(2)
def test_one_fails(comm):
    if comm.rank == 1:
        raise ValueError("only rank 1")
    comm.Barrier()  # rank 0 waits here

@pytest.mark.ranks(2, timeout=2)
def test_hangs(comm):
    comm.recv(source=1 - comm.rank)  # both wait here

@pytest.mark.ranks(2)
def test_leaves(comm):
    if comm.rank == 1:
        os._exit(3)
    comm.Barrier()

@pytest.mark.ranks(2)
def test_crashes(comm):
    if comm.rank == 1:
        ctypes.string_at(0)  # a null pointer
    comm.Barrier()

@pytest.mark.ranks(2)
def test_skips(comm):
    pytest.skip("for a reason")

@pytest.mark.ranks(2)
def test_good(comm, ranks, tmp_path, mpi_tmp_path):
    assert comm.size == ranks == comm.allreduce(1)
    assert len(set(comm.allgather(tmp_path))) == ranks
    assert len(set(comm.allgather(mpi_tmp_path))) == 1

@pytest.mark.ranks
def test_default_sizes(comm):
    pass
"""

# A launcher of another MPI starts the processes, but each finds itself alone.
FOREIGN_MPIRUN = """
import subprocess, sys
n, command = int(sys.argv[2]), sys.argv[3:]
ranks = [subprocess.Popen(command) for _ in range(n)]
sys.exit(max(rank.wait() for rank in ranks))
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tests that uses the runner as the project's own tests do."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "pytest.ini").write_text(f"[pytest]\npythonpath = {Path(__file__).parents[1]}\n")
    (folder / "conftest.py").write_text("pytest_plugins = ['mpi_runner.plugin']\n")
    (folder / "test_broken.py").write_text(BROKEN_TESTS)
    return folder


def run_pytest(n: int | None, suite: Path, *options: str, **env: str) -> tuple[int, str]:
    """Exit status and output of pytest in `suite`, on `n` ranks by hand or by the controller."""
    command = ["-m", "pytest", "-p", "no:cacheprovider", "--color=no", *options]
    clean = {"PYTEST_ADDOPTS": None, **env}
    answer = run_mpi(n, command, timeout=120, cwd=suite, env=clean)
    return answer.returncode, answer.stdout + answer.stderr


@pytest.fixture(scope="module")
def verdicts(suite: Path) -> dict[str, str]:
    """For each test of the suite, what its failure says; nothing for one that passed."""
    status, output = run_pytest(None, suite, "--junitxml=results.xml", "-k", "not default")
    assert status == 1, output
    cases = ElementTree.parse(suite / "results.xml").iter("testcase")
    return {case.attrib["name"]: "".join(case.itertext()) for case in cases}


def test_a_failure_of_all_ranks_is_told_once(verdicts):
    told = verdicts["test_all_fail[np2]"]
    assert told.startswith("all 2 ranks failed: assert 0 == 7\n")
    assert told.count(">       assert comm.rank == 7") == 1
    assert "--- rank 1: assert 1 == 7" in told


def test_a_failure_of_one_rank_names_it(verdicts):
    assert verdicts["test_one_fails_at_last[np2]"].startswith("rank 1 failed: assert 1 == 0\n")


def test_a_failure_that_others_wait_for_shows_where_they_wait(verdicts):
    told = verdicts["test_one_fails[np2]"]
    assert told.startswith("2 ranks: rank 1 failed; still inside the test 3 s later: rank 0\n")
    assert "ValueError: only rank 1" in told
    line = line_of("# rank 0 waits here")
    assert "--- rank 0 was at" in told and f"line {line} in test_one_fails" in told


def test_a_hang_shows_where_every_rank_is(verdicts):
    told = verdicts["test_hangs[np2]"]
    assert told.startswith("2 ranks: timeout after 2 s: all 2 ranks still inside the test\n")
    assert told.count(f"line {line_of('# both wait here')} in test_hangs") == 2


def test_a_rank_that_leaves_ends_the_test(verdicts):
    assert "2 ranks: mpirun ended with status" in verdicts["test_leaves[np2]"]


def test_a_crash_shows_its_line(verdicts):
    told = verdicts["test_crashes[np2]"]
    assert "--- rank 1 was at (innermost call first):\nFatal Python error: Segm" in told
    assert f"line {line_of('# a null pointer')} in test_crashes" in told


def test_ranks_that_do_not_end_well_fail_the_last_test(verdicts):
    told = verdicts["test_ends_badly[np1]"]
    assert "after this last test mpirun ended with status 5" in told


def test_a_serial_test_of_another_lane_is_reported_as_any(verdicts):
    told = verdicts["test_waits_and_fails"]
    assert told.startswith("rank 0 failed: assert 7 == 8\n") and "words of one that waits" in told
    told = verdicts["test_waits_and_leaves"]
    assert "pytest ended with status 3, and rank 0 never finished the test" in told


def test_good_tests_pass_between_bad_ones(verdicts):
    assert verdicts["test_good[np2]"] == verdicts["test_serial"] == verdicts["test_waits"] == ""
    assert "for a reason" in verdicts["test_skips[np2]"]


def test_a_mark_without_sizes_means_the_usual_ones(suite):
    _, output = run_pytest(None, suite, "--collect-only", "-q", "-k", "default")
    ids = [f"test_broken.py::test_default_sizes[np{size}]" for size in (1, 2, 3, 4, 8)]
    assert output.splitlines()[:5] == ids


def test_by_hand_one_rank_speaks_for_all(suite):
    chosen = "all_fail or at_last or good or skips"
    status, output = run_pytest(2, suite, "--with-mpi", "-k", chosen)
    assert status != 0
    assert output.count("test session starts") == 1
    assert "2 failed, 1 passed, 1 skipped" in output
    assert "all 2 ranks failed: assert 0 == 7" in output
    assert "words of rank 0" in output and "words of rank 1" in output
    assert "rank 1 failed: assert 1 == 0" in output


def test_by_hand_a_failure_that_others_wait_for_ends_the_run(suite):
    start = time.monotonic()
    status, output = run_pytest(2, suite, "--with-mpi", "-k", "test_one_fails and not at_last")
    assert status != 0
    assert time.monotonic() - start < 30  # it took 60 s if it was the time limit
    assert "ValueError: only rank 1" in output and "--- rank 0 was at" in output


def test_pytest_under_mpirun_by_mistake_is_refused(suite):
    status, output = run_pytest(2, suite)
    assert status != 0 and "add --with-mpi" in output


def test_an_mpirun_of_another_mpi_is_found_out(suite):
    (suite / "foreign.py").write_text(FOREIGN_MPIRUN)
    launcher = f"{sys.executable} {suite / 'foreign.py'}"
    status, output = run_pytest(None, suite, "-k", "np2", MPISHARD_MPIRUN=launcher)
    assert status == 1
    assert "mpirun started 2 processes, but each is in a world of 1" in output
    assert output.count("cannot be launched: see the first of their tests") > 1


def test_a_command_that_runs_too_long_is_ended_and_shown():
    script = "import time; print('so far', flush=True); time.sleep(60)"
    with pytest.raises(pytest.fail.Exception, match=r"(?s)running after 1 s: .*so far"):
        run_mpi(2, ["-c", script], timeout=1)


def test_nothing_outlives_a_launch():
    stubborn = """
        import signal, subprocess
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        from mpi4py import MPI
        MPI.COMM_WORLD.Barrier()
        subprocess.Popen(["sleep", "60"], start_new_session=True)
        print("ready", flush=True)
        signal.pause()
    """
    pipe = subprocess.PIPE
    with Launch(2, ["-c", "if True:" + stubborn], stdout=pipe, stderr=pipe) as launch:
        assert launch.process.stdout is not None
        while "ready" not in launch.process.stdout.readline():
            pass
        assert launch.pid(0) != launch.pid(1)
    assert list(launch.members()) == []
    with pytest.raises(LookupError, match="rank 1 is not running"):
        launch.pid(1)


def line_of(words: str) -> int:
    """The line of the broken tests that has `words`."""
    lines = BROKEN_TESTS.splitlines()
    return 1 + next(place for place, line in enumerate(lines) if words in line)
