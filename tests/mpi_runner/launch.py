"""Commands under mpirun: found, started, ended for certain, and cleaned up after."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mpishard.runtime.launch import waiting_should_sleep

CHECKOUT = Path(__file__).resolve().parents[2]
SESSION_START = time.time()

# What tests have started: mpirun, Python without it, and commands in ranks that are kept.
launches = {"mpirun": 0, "python": 0, "commands": 0}

# A launcher tells its ranks the size of the world: MPICH's and Slurm's PMI, Open MPI.
ANNOUNCED_SIZE = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
ANNOUNCED_RANK = ("PMI_RANK", "OMPI_COMM_WORLD_RANK")
LAUNCHER_VARIABLES = ("PMI_", "PMIX_", "OMPI_", "PRTE_", "HYDI_", "MPI_LOCAL", "MPI_RUNNER_PLAN")

# Each MPI reads its own of these and leaves the others alone. A rank is one thread, and tests run
# more ranks than cores, in containers also as root.
RANK_SETTINGS = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",  # Open MPI 4
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",  # Open MPI 5
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}

# With more ranks than cores, for Open MPI always and for MPICH where other processes are busy: see
# `mpishard.runtime.launch.waiting_should_sleep`.
CROWDED_SETTINGS = {"OMPI_MCA_mpi_yield_when_idle": "1"}
BUSY_SETTINGS = {"MPIR_CVAR_ENABLE_HEAVY_YIELD": "1"}

# What Open MPI and its launcher add to what ranks say that end with a status of their own.
LAUNCHERS_WORDS = re.compile(
    r"^-{70,}\n(?:prterun|mpirun|MPI_ABORT) .*?^-{70,}\n\0?|^\[\S+:\d+\] PMIX ERROR: .*?\n",
    re.DOTALL | re.MULTILINE,
)


def announced_size() -> int | None:
    """How many ranks the launcher of this process says it started, None without a launcher."""
    for name in ANNOUNCED_SIZE:
        if name in os.environ:
            return int(os.environ[name])
    return None


def mpirun() -> list[str]:
    """The command that starts ranks: ``$MPISHARD_MPIRUN``, else the mpirun beside the running
    Python, else the one on the PATH. Raises FileNotFoundError when there is none."""
    if chosen := os.environ.get("MPISHARD_MPIRUN"):
        return shlex.split(chosen)
    beside = str(Path(sys.executable).parent)
    found = shutil.which("mpirun", path=beside) or shutil.which("mpirun")
    if found is None:
        raise FileNotFoundError(
            f"there is no mpirun in {beside} or on the PATH: install an MPI, "
            "for example with `pip install mpich`"
        )
    return [found]


def allowed_cores() -> int:
    """How many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def environment(ranks: int, changes: Mapping[str, str | None]) -> dict[str, str]:
    """The environment for a command on `ranks` ranks; a change to None removes the variable.

    What a launcher around this process has set is left out, or the command would take itself for
    a rank of that launch. The checkout comes first on the import path, so that the tests are about
    it and not about an installed copy.
    """
    nested = announced_size() is not None
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not (nested and name.startswith(LAUNCHER_VARIABLES))
    }
    settings = {**inherited, **RANK_SETTINGS}
    if ranks > (cores := allowed_cores()):
        settings = {**CROWDED_SETTINGS, **settings}
        if waiting_should_sleep(ranks, cores, [os.getpid()]):
            settings = {**BUSY_SETTINGS, **settings}
    for name, change in changes.items():
        settings.pop(name, None)
        if change is not None:
            settings[name] = change
    path = [str(CHECKOUT), settings.get("PYTHONPATH", "")]
    settings["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    return settings


class Launch:
    """``python *args`` on `n` ranks, or without mpirun if `n` is None, as a running process.

    To be used in a ``with`` statement, whose end is the end of every process of the launch. They
    are known by a mark in their environment, because not every mpirun keeps its ranks in one
    process group. Further arguments go to `subprocess.Popen`.
    """

    def __init__(
        self,
        n: int | None,
        args: Sequence[str | os.PathLike[str]],
        env: Mapping[str, str | None] | None = None,
        **popen: Any,
    ) -> None:
        mark = f"MPI_RUNNER_LAUNCH_{uuid.uuid4().hex}"
        self.mark = f"{mark}=1"
        launcher = [] if n is None else [*mpirun(), "-n", str(n)]
        launches["mpirun" if launcher else "python"] += 1
        self.process: subprocess.Popen[str] = subprocess.Popen(
            [*launcher, sys.executable, *[os.fspath(arg) for arg in args]],
            env=environment(n or 1, {**(env or {}), mark: "1"}),
            start_new_session=True,  # the keyboard's interrupt is for pytest, which ends the ranks
            encoding="utf-8",
            errors="replace",
            **popen,
        )

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    def members(self) -> Iterator[tuple[int, list[str]]]:
        """Process id and environment of every living process of this launch."""
        for directory in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it ended meanwhile, or it is another user's
                settings = (directory / "environ").read_bytes().decode(errors="replace").split("\0")
                if self.mark in settings:
                    yield int(directory.name), settings

    def pid(self, rank: int) -> int:
        """The process id of `rank`, for tests that stop or kill one. Raises LookupError if there
        is no such process (yet)."""
        wanted = {f"{name}={rank}" for name in ANNOUNCED_RANK}
        found = [pid for pid, settings in self.members() if wanted.intersection(settings)]
        if not found:
            raise LookupError(f"rank {rank} is not running")
        return min(found)  # a rank's own children are younger

    def end(self) -> None:
        """End what is left of the launch, politely and then for certain, and remove its traces."""
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(3)
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        while left := [pid for pid, _ in self.members()]:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        sweep_shared_memory()


def run_mpi(
    n: int | None,
    args: Sequence[str | os.PathLike[str]],
    timeout: float = 60.0,
    env: Mapping[str, str | None] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    input: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """What ``mpirun -n N python *args`` answers: returncode, stdout and stderr, whatever they are;
    what the launcher has to say of a status is left out.

    `n` None runs it without mpirun. The test fails, with the output so far, if the command still
    runs after `timeout` seconds.
    """
    stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
    pipe = subprocess.PIPE
    with Launch(n, args, env, cwd=cwd, stdin=stdin, stdout=pipe, stderr=pipe) as launch:
        process = launch.process
        try:
            out, err = process.communicate(input, timeout)
        except subprocess.TimeoutExpired:
            launch.end()
            out, err = process.communicate()
            command = shlex.join(map(str, process.args))  # type: ignore[arg-type]
            pytest.fail(f"still running after {timeout:g} s: {command}\n{out}\n{err}", False)
    words = LAUNCHERS_WORDS.sub("", err)
    return subprocess.CompletedProcess(process.args, process.returncode, out, words)


def sweep_shared_memory() -> None:
    """Remove the shared memory that killed ranks leave behind: files of an MPI, made by this user
    since this session began, that no process maps any more.

    A file younger than a moment may belong to ranks that are just starting; the next call finds it.
    """
    shared = Path("/dev/shm")
    made = [*shared.glob("mpich_shm_*"), *shared.glob("sm_segment.*"), *shared.glob("vader_*")]
    for path in made:
        with suppress(FileNotFoundError):
            facts = path.stat()
            ours = facts.st_uid == os.getuid() and SESSION_START < facts.st_ctime
            if ours and facts.st_ctime < time.time() - 0.2 and not _is_mapped(path):
                path.unlink()


def _is_mapped(path: Path) -> bool:
    """Whether some process has `path` in its memory."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            if str(path) in maps.read_text():
                return True
    return False
