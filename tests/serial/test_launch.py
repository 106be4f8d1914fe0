"""The edge of the program: cores and threads, the launcher, and how jobs of several ranks end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mpi_runner import Launch, run_mpi

from mpishard.errors import UserError
from mpishard.runtime import launch

pytestmark = pytest.mark.waits(25)

PROGRAM = """
import sys, time
from mpishard.errors import UserError
from mpishard.runtime.launch import run

def main(world):
    rank = world.rank
    {body}

sys.exit(run(main))
"""

# Each rank says so when it is ready to be killed or interrupted, and then works with the others.
ENDLESS = "sys.stderr.write('ready\\n')\n    while True: world.Barrier()"


def program(body: str) -> list[str]:
    """Arguments of a Python whose ranks run `body`."""
    return ["-c", PROGRAM.format(body=body)]


def errors_in(output: str) -> list[str]:
    """The lines that report an error."""
    return [line for line in output.splitlines() if line.startswith("mpishard: error:")]


def ended(body: str, n: int | None = 3) -> subprocess.CompletedProcess[str]:
    """How `n` ranks end that run `body`. They are to end within seconds."""
    return run_mpi(n, program(body), timeout=30)


# Cores and threads


def test_cores_are_shared_by_the_ranks_allowed_on_them():
    assert launch.share_of_cores({0, 1, 2, 3}, [{0, 1, 2, 3}] * 2) == 2
    assert launch.share_of_cores({0, 1, 2, 3}, [{0, 1, 2, 3}] * 3) == 1
    assert launch.share_of_cores({0, 1}, [{0, 1}, {2, 3}]) == 2, "bound ranks share nothing"
    assert launch.share_of_cores({0}, [{0}] * 4) == 1, "a rank cannot have less than a thread"
    assert launch.share_of_cores({0, 1, 2}, [{0, 1, 2}, {2}]) == 2


THREADS = """
import os, sys
from mpishard.runtime.launch import start
world = start()
assert "numpy" not in sys.modules
names = ["OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MPIR_CVAR_ENABLE_HEAVY_YIELD"]
if world.rank == 0:
    print(*[os.environ.get(name) for name in names])
"""
UNSET = dict.fromkeys(
    (*launch.THREAD_VARIABLES, "MPIR_CVAR_ENABLE_HEAVY_YIELD", "OMPI_MCA_mpi_yield_when_idle")
)


def settings(n: int | None, **environment: str) -> list[str]:
    """Threads and heavy yield of rank 0 of `n`, in a bare environment with these changes."""
    run = run_mpi(n, ["-c", THREADS], env={**UNSET, **environment})
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_a_rank_takes_its_share_of_the_cores_and_waits_awake_while_there_are_enough():
    cores = len(os.sched_getaffinity(0))
    assert settings(None) == [f"{cores}", f"{cores}", "None"]
    if cores > 1:
        assert settings(2) == [f"{cores // 2}", f"{cores // 2}", "None"]


def test_ranks_sleep_while_they_wait_when_busy_processes_want_their_cores():
    cores = len(os.sched_getaffinity(0))
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        assert settings(cores + 1) == ["1", "1", "1"]
    finally:
        for process in busy:
            process.kill()
            process.wait()


def fake_processes(monkeypatch: pytest.MonkeyPatch, directory: Path, looks: list[int], **states):
    """Let the machine have so many running threads at each look, and processes with threads in
    these states."""
    monkeypatch.setattr(launch, "PROCESSES", directory)
    found = iter(looks)

    def look(_: float) -> None:
        (directory / "loadavg").write_text(f"0.00 0.01 0.05 {next(found)}/99 1234\n")

    monkeypatch.setattr(time, "sleep", look)
    for process, threads in states.items():
        for thread, state in enumerate(threads):
            task = directory / process[1:] / "task" / str(thread)
            task.mkdir(parents=True)
            (task / "stat").write_text(f"{thread} (a) R) {state} 1 1\n")


@pytest.mark.parametrize(
    "ranks, cores, looks, sleep",
    [
        (2, 2, [9, 9, 9, 9, 9], False),  # a core for each
        (3, 2, [3, 3, 3, 3, 3], False),  # the job's own
        (3, 2, [4, 3, 3, 3, 4], False),  # a moment's work of somebody
        (3, 2, [4, 3, 4, 3, 4], True),
        (9, 8, [4, 4, 4, 4, 4], False),  # less than a quarter of the cores
        (9, 8, [5, 5, 9, 5, 5], True),
    ],
)
def test_ranks_sleep_beside_others_that_want_a_quarter_of_the_cores(
    tmp_path, monkeypatch, ranks, cores, looks, sleep
):
    """The job runs three threads of its own, of two processes; a third process has ended."""
    fake_processes(monkeypatch, tmp_path, looks, p7="RSR", p8="R")
    assert launch.waiting_should_sleep(ranks, cores, [7, 8, 9]) == sleep


def test_ranks_that_cannot_see_what_runs_sleep(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "PROCESSES", tmp_path)
    assert launch.waiting_should_sleep(3, 2, [])
    assert not launch.waiting_should_sleep(2, 2, [])


def test_the_job_is_all_that_its_launcher_started(tmp_path, monkeypatch):
    fake_ancestors(monkeypatch, tmp_path, "python", "hydra_pmi_proxy", "mpiexec.hydra", "bash")
    for process, children in {101: "100 55", 102: "101", 55: "56", 100: "", 103: "102 9"}.items():
        task = tmp_path / str(process) / "task" / str(process)
        task.mkdir(parents=True)
        (task / "children").write_text(children)
    assert sorted(launch._job()) == [55, 56, 100, 101, 102]
    monkeypatch.setattr(launch, "PROCESSES", tmp_path / "none")
    assert launch._job() == [os.getpid()]


def test_what_the_user_has_set_stays():
    assert settings(None, OMP_NUM_THREADS="3") == ["None", "3", "None"]
    crowd = len(os.sched_getaffinity(0)) + 1
    assert settings(crowd, MPIR_CVAR_ENABLE_HEAVY_YIELD="0")[2] == "0"


def test_the_announced_number_is_what_a_variable_begins_with(monkeypatch):
    """Slurm writes the tasks of each node as "2(x3),1"."""
    monkeypatch.setenv("SIZE", "2(x3),1")
    assert launch._env_int(("ABSENT", "SIZE")) == 2
    assert launch._env_int(("ABSENT",), 7) == 7


# The launcher


def test_the_launcher_and_the_library_must_agree(monkeypatch):
    for name in launch.WORLD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    launch.check_launcher(1)
    monkeypatch.setattr(launch, "launcher", lambda: "mpirun")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    launch.check_launcher(4)
    with pytest.raises(UserError, match="started 4 ranks, but MPI found 1: mpirun belongs to"):
        launch.check_launcher(1)


def fake_ancestors(monkeypatch: pytest.MonkeyPatch, processes: Path, *names: str) -> None:
    """Let this process have been started by these, the nearest first."""
    monkeypatch.setattr(launch, "PROCESSES", processes)
    monkeypatch.setattr(os, "getppid", lambda: 100)
    for process, name in enumerate(names, 100):
        (processes / str(process)).mkdir()
        parent = process + 1 if process + 1 < 100 + len(names) else 1
        (processes / str(process) / "stat").write_text(f"{process} ({name}) S {parent} 1 1\n")


@pytest.mark.parametrize(
    "ancestors, word",
    [
        ("python bash", "mpirun"),
        ("hydra_pmi_proxy mpiexec.hydra bash", "mpirun"),
        ("slurmstepd slurmd", "srun"),
        ("bash python slurmstepd slurmd", "srun"),
        ("hydra_pmi_proxy slurmstepd slurmd", "mpirun"),
        ("prted slurmstepd slurmd", "mpirun"),
        ("mpirun bash slurmstepd slurmd", "mpirun"),
        ("slurm)(stepd bash", "mpirun"),
    ],
)
def test_the_nearest_of_those_that_start_ranks_is_the_launcher(
    monkeypatch, tmp_path, ancestors, word
):
    fake_ancestors(monkeypatch, tmp_path, *ancestors.split())
    assert launch.launcher() == word


def test_without_processes_to_look_at_the_launcher_is_mpirun(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "PROCESSES", tmp_path / "absent")
    assert launch.launcher() == "mpirun"
    assert not launch.reaches_terminal()


def test_under_srun_the_type_of_mpi_is_the_cause(monkeypatch, tmp_path):
    for name in launch.WORLD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    fake_ancestors(monkeypatch, tmp_path, "slurmstepd")
    with pytest.raises(UserError) as refusal:
        launch.check_launcher(1)
    assert str(refusal.value) == (
        "the launcher started 4 ranks, but MPI found 1: srun does not speak to the library that "
        "mpi4py loaded; give one of the types that `srun --mpi=list` has, `srun --mpi=pmi2` for "
        "MPICH, `srun --mpi=pmix` for Open MPI, or the same as SLURM_MPI_TYPE to the scripts of "
        "scripts/slurm"
    )


@pytest.mark.parametrize("rank, lines", [(0, 1), (2, 0)])
@pytest.mark.parametrize("family", ["PMI", "OMPI_COMM_WORLD"])
def test_separate_jobs_of_one_rank_are_refused_by_one_message(family, rank, lines):
    """What the launcher of another MPI starts; the first of them speaks for all."""
    other = {f"{family}_SIZE": "4", f"{family}_RANK": str(rank)}
    run = run_mpi(None, ["-m", "mpishard", "inspect", "anything"], env=other)
    assert run.returncode == 2
    assert run.stderr.count("\n") == run.stderr.count("the launcher started 4 ranks") == lines


def test_a_python_without_mpi():
    missing = {"MPI4PY_LIBMPI": "/missing/libmpi.so"}
    run = run_mpi(None, ["-m", "mpishard", "inspect", "anything"], env=missing)
    assert run.returncode == 2
    assert run.stderr.startswith("mpishard: error: mpi4py cannot load an MPI library")
    assert run.stderr.count("\n") == 1 and "pip install mpich" in run.stderr


# How jobs end


def test_ranks_that_succeed():
    run = ended("print('result of', rank)")
    assert run.returncode == 0
    assert run.stdout == "result of 0\n", "results come from one rank only"
    assert run.stderr == ""


@pytest.mark.parametrize(
    "code, status, errors",
    [("", 0, []), ("3", 3, []), ("256", 0, []), ("'done'", 1, ["mpishard: error: done"])],
)
def test_ranks_that_exit(code, status, errors):
    run = ended(f"sys.exit({code})", 2 if code == "3" else None)
    assert (run.returncode, errors_in(run.stderr)) == (status, errors)
    assert "Traceback" not in run.stderr


def test_ranks_that_fail_alike_end_in_order_with_one_message():
    run = ended("raise UserError('no model')")
    assert run.returncode == 2
    assert errors_in(run.stderr) == ["mpishard: error: no model"]
    assert "BAD TERMINATION" not in run.stdout and "Abort" not in run.stderr


def test_a_rank_that_fails_when_the_others_have_finished_ends_in_order():
    run = ended("if rank == 1: time.sleep(0.3); raise UserError('late')")
    assert run.returncode == 2
    assert errors_in(run.stderr) == ["mpishard: error: rank 1 of 3: late"]
    assert "BAD TERMINATION" not in run.stdout and "Abort" not in run.stderr


@pytest.mark.parametrize("waiting", ["world.Barrier()", "world.recv()", "time.sleep(60)"])
def test_a_rank_that_fails_alone_ends_those_that_wait(waiting):
    started = time.monotonic()
    run = ended(f"if rank == 1: raise UserError('alone')\n    {waiting}")
    assert run.returncode != 0
    assert errors_in(run.stderr) == ["mpishard: error: rank 1 of 3: alone"]
    assert time.monotonic() - started < 10


def test_some_ranks_that_fail_each_for_itself_end_with_one_message():
    run = ended("if rank: raise UserError('several')\n    world.Barrier()", 4)
    assert run.returncode != 0
    (message,) = errors_in(run.stderr)  # of the rank that was the first
    assert re.fullmatch("mpishard: error: rank [123] of 4: several", message)


def test_the_message_is_that_of_the_rank_that_failed_first():
    """The others may have failed only because of it."""
    run = ended("time.sleep(0.3 * (2 - rank)); raise UserError(f'rank {rank}')")
    assert run.returncode == 2
    assert errors_in(run.stderr) == ["mpishard: error: rank 2"]


def test_a_fault_of_the_program_shows_where_it_is():
    run = ended("if rank == 2: 1 / 0\n    world.Barrier()")
    assert run.returncode != 0
    assert errors_in(run.stderr) == ["mpishard: error: a fault of the program on rank 2 of 3:"]
    assert run.stderr.count("Traceback") == 1
    assert "ZeroDivisionError: division by zero" in run.stderr


# Faults of the launch itself, where `main` has not begun or is over.
BROKEN = """
from mpi4py import MPI
from mpishard.runtime import launch
def broken(*arguments):
    if MPI.COMM_WORLD.rank == 1: raise RuntimeError("broken")
launch.{name} = broken
"""


@pytest.mark.parametrize("name", ["check_launcher", "_flush_or_discard"])
def test_a_rank_that_fails_before_or_after_its_work_ends_those_that_wait(name):
    script = BROKEN.format(name=name) + PROGRAM.format(body="world.Barrier()")
    run = run_mpi(3, ["-c", script], timeout=30)
    assert run.returncode != 0
    assert errors_in(run.stderr) == [
        "mpishard: error: rank 1 of 3: a fault of the start or the end of this rank:"
    ]
    assert run.stderr.count("RuntimeError: broken") == 1


def test_ranks_that_differ_in_a_collective_need_no_traceback():
    run = ended(
        "from mpishard.errors import CollectiveMismatch as Mismatch; "
        "raise Mismatch('0 makes a, 1 makes b')",
        2,
    )
    assert run.returncode == 1
    assert run.stderr == "mpishard: error: 0 makes a, 1 makes b\n"


@pytest.mark.parametrize(
    "fault, message",
    [
        ("raise MemoryError('Unable to allocate 12 GiB')", "out of memory: Unable to allocate"),
        ("raise OSError(28, 'No space left')", "the system refused: [Errno 28] No space left"),
    ],
)
def test_what_the_machine_lacks_is_no_fault_of_the_program(fault, message):
    run = ended(fault, None)
    assert run.returncode == 1
    assert run.stderr.startswith(f"mpishard: error: {message}")
    assert "Traceback" not in run.stderr


def test_standard_output_that_cannot_be_written():
    with (
        open("/dev/full", "w") as full,
        Launch(None, program("print('result')"), stdout=full, stderr=subprocess.PIPE) as job,
    ):
        _, err = job.process.communicate(timeout=30)
    assert job.process.returncode == 1
    assert err == "mpishard: error: the system refused: [Errno 28] No space left on device\n"


def test_a_reader_that_leaves_ends_the_program_quietly():
    body = "[print('line', flush=True) for _ in range(100000)]"
    pipe = subprocess.PIPE
    with Launch(None, program(body), stdout=pipe, stderr=pipe) as job:
        assert job.process.stdout and job.process.stderr
        assert job.process.stdout.readline() == "line\n"
        job.process.stdout.close()
        assert job.process.wait(30) == 1
        assert job.process.stderr.read() == ""


@contextmanager
def working(n: int | None) -> Iterator[Launch]:
    """`n` ranks that have begun to work together and will not stop."""
    pipe = subprocess.PIPE
    with Launch(n, program(ENDLESS), stdout=pipe, stderr=pipe) as job:
        assert job.process.stderr
        for _ in range(n or 1):
            assert job.process.stderr.readline() == "ready\n"
        yield job


def test_a_rank_that_is_killed_ends_the_job():
    with working(3) as job:
        os.kill(job.pid(1), signal.SIGKILL)
        assert job.process.wait(10) != 0


def test_an_interrupt_ends_the_job_with_one_message():
    """Ctrl-C reaches the launcher, and through it every rank."""
    with working(3) as job:
        job.process.send_signal(signal.SIGINT)
        _, err = job.process.communicate(timeout=15)
        assert job.process.returncode != 0
        assert "Traceback" not in err
        assert len(errors_in(err)) <= 1  # some launchers pass on nothing after an interrupt


def test_an_interrupt_without_a_launcher():
    with working(None) as job:
        job.process.send_signal(signal.SIGINT)
        _, err = job.process.communicate(timeout=15)
        assert err == "mpishard: error: interrupted\n"
        assert job.process.returncode == 130


def test_the_message_reaches_the_terminal_of_the_launcher():
    """A rank writes to a pipe, whose other end is at a terminal or not."""
    script = "from mpishard.runtime.launch import reaches_terminal; print(reaches_terminal())"
    assert run_mpi(1, ["-c", script]).stdout == "False\n"
    terminal, end = os.openpty()
    try:
        with Launch(1, ["-c", script], stdout=subprocess.PIPE, stderr=end) as job:
            assert job.process.communicate(timeout=30)[0] == "True\n"
        with Launch(None, ["-c", script], stdout=subprocess.PIPE, stderr=end) as job:
            assert job.process.communicate(timeout=30)[0] == "True\n"
    finally:
        os.close(terminal)
        os.close(end)


def test_ctrl_c_in_a_callback_is_not_lost():
    """There Python cannot raise it; it would print a traceback and go on."""
    body = (
        "class Callback:\n"
        "        def __del__(self): __import__('signal').raise_signal(2)\n"
        "    Callback()\n"
        "    time.sleep(99)"
    )
    run = ended(body, None)  # which waits less long
    assert run.returncode == 130
    assert run.stderr == "mpishard: error: interrupted\n"
