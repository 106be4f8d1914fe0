"""The edge where a process becomes a rank: threads, MPI's start, and how a job ends.

NumPy must not be imported before `start`, because its BLAS reads the number of threads once, when
it is loaded; mpi4py does not import it.
"""

from __future__ import annotations

import faulthandler
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from mpishard.errors import CollectiveMismatch, UserError

if TYPE_CHECKING:
    from mpi4py import MPI

# Seconds after which a rank that failed no longer waits for the others to end as well.
AGREEMENT_SECONDS = 1.0
# Seconds in which a launcher takes over what a rank has printed: MPICH's may lose the last words of
# one that aborts right after them.
LAST_WORDS_SECONDS = 0.2

# Seconds that a collective may take, unless told otherwise: see `mpishard.runtime.watchdog`.
TIMEOUT = 1800.0

THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")

# Where launchers say how many ranks they started, in all and on this node, and which one this is.
WORLD_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
NODE_VARIABLES = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE")
RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")

LAUNCHERS = ("mpirun", "mpiexec", "mpiexec.hydra", "orterun", "prterun", "srun")
# What starts ranks on their machine, as the system names it, in 15 letters at most: Slurm's
# daemon of a step, and those of MPI's own launchers.
STEP_DAEMON = "slurmstepd"
DAEMONS = ("hydra_pmi_proxy", "hydra_bstrap_pr", "orted", "prted")

PROCESSES = Path("/proc")

# How often, and after how long each time, a starting rank looks how many processes want to run.
LOOKS, LOOK_SECONDS = 5, 0.004


def start() -> MPI.Intracomm:
    """MPI started, and the threads of this rank's BLAS set to its share of the cores: the world.

    Raises UserError if there is no MPI, or if the launcher announces another number of ranks than
    MPI has found.
    """
    cores = allowed_cores()
    # A launcher that binds each rank to cores of its own is itself allowed on all of theirs.
    if (ranks := _env_int(NODE_VARIABLES)) > len(shared := cores | allowed_cores(os.getppid())):
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")  # Open MPI
        if waiting_should_sleep(ranks, len(shared), _job()):
            os.environ.setdefault("MPIR_CVAR_ENABLE_HEAVY_YIELD", "1")  # MPICH
    mpi = _start_mpi()
    world = mpi.COMM_WORLD
    check_launcher(world.size)
    if not any(name in os.environ for name in THREAD_VARIABLES):
        node = world.Split_type(mpi.COMM_TYPE_SHARED)
        threads = share_of_cores(cores, node.allgather(cores))
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
        node.Free()
    return world


def allowed_cores(process: int = 0) -> set[int]:
    """The cores that a process may run on, none if it cannot be asked; 0 is this process."""
    if not hasattr(os, "sched_getaffinity"):  # not Linux
        return set(range(os.cpu_count() or 1))
    try:
        return os.sched_getaffinity(process)
    except OSError:
        return set()


def waiting_should_sleep(ranks: int, cores: int, job: Iterable[int]) -> bool:
    """Whether ranks that wait for a message should sleep instead of giving up their core.

    MPICH's ranks call sched_yield while they wait. With more ranks than cores, that passes the core
    on to a rank that computes, if no other process wants it: four ranks on two idle cores sum 4 KB
    in 0.03 ms, and in 0.36 ms if they sleep (MPIR_CVAR_ENABLE_HEAVY_YIELD). A busy process that
    gets the core keeps it for a whole time slice: beside one, the same sum takes 1.4 ms, and
    0.38 ms if the ranks sleep. So they should, if others want a quarter of the cores or more.

    `job` are the processes that do not count: the ranks themselves are busy while they start. Ranks
    that decide differently wait differently, and are right all the same. True without Linux's
    /proc, where nobody knows.
    """
    if ranks <= cores:
        return False
    job = list(job)
    try:
        looks = [_running_beside(job) for _ in range(LOOKS)]
    except (OSError, ValueError):
        return True
    return 4 * median(looks) >= cores


def _running_beside(job: list[int]) -> int:
    """How many threads of the machine run or want to, after a moment, beside those of `job`."""
    time.sleep(LOOK_SECONDS)
    running = int((PROCESSES / "loadavg").read_text().split()[3].partition("/")[0])
    for process in job:
        with suppress(OSError):  # it has ended
            for thread in (PROCESSES / str(process) / "task").iterdir():
                state = (thread / "stat").read_text().rpartition(")")[2].split()[0]
                running -= state == "R"
    return running


def _job() -> list[int]:
    """The processes of this job on this machine: all that its launcher started, and itself; without
    a launcher this process alone. None that cannot be told."""
    job = [os.getpid()]
    with suppress(OSError):
        above = [process for process, name in _ancestors() if name in (*DAEMONS, *LAUNCHERS)]
        job = above[-1:] or job
        for process in job:  # which grows meanwhile
            children = PROCESSES / str(process) / "task" / str(process) / "children"
            job += map(int, children.read_text().split())
    return job


def share_of_cores(mine: set[int], everyones: list[set[int]]) -> int:
    """How many threads a rank may have that is allowed on the cores `mine`, where `everyones` are
    those of all ranks of the node: each core is shared by the ranks allowed on it. At least 1."""
    share = sum(Fraction(1, sum(core in cores for cores in everyones)) for core in mine)
    return max(1, int(share))


def threads_per_rank() -> int:
    """The threads that this rank's BLAS takes."""
    chosen = _env_int(THREAD_VARIABLES)  # read as BLAS reads them
    return chosen or len(allowed_cores())


def check_launcher(size: int) -> None:
    """Refuse to run as one of several separate jobs of one rank, which is what a launcher of
    another MPI than the one mpi4py has loaded starts, and srun where they do not find each other
    (UserError)."""
    announced = _env_int(WORLD_VARIABLES, size)
    if announced == size:
        return
    cause = (
        "mpirun belongs to another MPI than the library that mpi4py loaded; use the mpirun beside "
        f"this Python ({Path(sys.executable).with_name('mpirun')}) or install mpi4py for your MPI"
    )
    if launcher() == "srun":
        cause = (
            "srun does not speak to the library that mpi4py loaded; give one of the types that "
            "`srun --mpi=list` has, `srun --mpi=pmi2` for MPICH, `srun --mpi=pmix` for Open MPI, "
            "or the same as SLURM_MPI_TYPE to the scripts of scripts/slurm"
        )
    raise UserError(f"the launcher started {announced} ranks, but MPI found {size}: {cause}")


def launcher() -> str:
    """The word with which to start ranks as this one was: "srun" where Slurm started it, also
    without ranks beside it, else "mpirun"."""
    try:
        for _, name in _ancestors():
            if name in (STEP_DAEMON, "srun"):
                return "srun"
            if name in (*DAEMONS, *LAUNCHERS):
                break
    except OSError:  # no /proc
        pass
    return "mpirun"


def reaches_terminal() -> bool:
    """Whether what is written to standard error appears on a terminal: directly, or by way of the
    launcher, which passes on what its ranks write, if it is on this machine."""
    if sys.stderr.isatty():
        return True
    try:
        launched = next(process for process, name in _ancestors() if name in LAUNCHERS)
        where = os.readlink(PROCESSES / str(launched) / "fd" / "2")
        return where.startswith(("/dev/pts/", "/dev/tty"))
    except (OSError, StopIteration):
        return False


def _ancestors() -> Iterator[tuple[int, str]]:
    """Process id and name of the process that started this one, of the one that started that, and
    so on. Raises OSError without Linux's /proc."""
    process = os.getppid()
    while process > 1:
        # "PID (name) state parent …", where a name may hold anything.
        facts = (PROCESSES / str(process) / "stat").read_text()
        before, _, after = facts.rpartition(")")
        yield process, before.partition("(")[2]
        process = int(after.split()[1])


class ExitOutcome(NamedTuple):
    """What a rank comes to: its exit status and the message, if any, that explains it. A message
    that says all there is to say needs no rank that it is from."""

    status: int
    message: str = ""
    is_complete: bool = True


class StopRequest:
    """Whether this process has been told to stop, from `listen` on: by SIGTERM, which batch systems
    send some time before the end, or by SIGUSR1, which they can be asked to."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.came = False

    def listen(self) -> None:
        """Take notice of these signals, also of one that was held back: blocked by who started this
        process, until somebody listens."""
        for number in self.SIGNALS:
            signal.signal(number, self._take)
            # Libraries are not to find their system calls interrupted, while MPI starts above all.
            signal.siginterrupt(number, False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)

    def _take(self, *_: object) -> None:
        self.came = True


def run(main: Callable[[MPI.Intracomm], None]) -> int:
    """`main`, called with the world; the exit status of the job.

    An exception on any rank ends all of them with one message, which names the rank unless all
    fail alike: status 2 after a UserError, 1 after anything else, with its traceback where it is a
    fault of the program.
    """
    try:
        return _run(main)
    except KeyboardInterrupt:
        return _end_alone(130, "")
    except BaseException:  # before `main` or after it
        fault = traceback.format_exc()
        return _end_alone(1, f"a fault of the start or the end of this rank:\n{fault}")


def _end_alone(status: int, message: str) -> int:
    """The exit status of a rank that failed where no other rank expects it to, and could wait for
    it: with MPI started, all ranks end here."""
    world = getattr(sys.modules.get("mpi4py.MPI"), "COMM_WORLD", None)
    if world is None:
        report(message)
        return status
    report(message and _signed(message, world))
    abort_job(world, status)
    return status


def _run(main: Callable[[MPI.Intracomm], None]) -> int:
    sys.unraisablehook = _interrupt_later
    if not faulthandler.is_enabled():
        faulthandler.enable()  # launchers do not say which rank was killed by a signal, nor where
    try:
        world = start()
    except UserError as error:
        if not _env_int(RANK_VARIABLES):  # of jobs that do not know of each other, the first
            report(str(error))
        return 2
    return run_on(world, main)


def run_on(world: MPI.Intracomm, main: Callable[[MPI.Intracomm], None]) -> int:
    """The same on ranks that have started already. Where one fails that others wait for, it ends
    the process."""
    alarm = world.Dup()  # a private context: no message of the program can match its messages
    if world.rank > 0:
        sys.stdout = open(os.devnull, "w")  # results come from one rank only
    return _agree_on_exit(alarm, _attempt(main, world))


def _attempt(main: Callable[[MPI.Intracomm], None], world: MPI.Intracomm) -> ExitOutcome:
    """What `main` comes to on this rank."""
    where = f" on rank {world.rank} of {world.size}" if world.size > 1 else ""
    try:
        main(world)
        sys.stdout.flush()
    except SystemExit as end:  # --help and --version
        if isinstance(end.code, str):
            return ExitOutcome(1, end.code, is_complete=False)
        return ExitOutcome((end.code or 0) & 255)
    except UserError as error:
        return ExitOutcome(2, str(error), is_complete=False)
    except CollectiveMismatch as error:  # which names two ranks
        return ExitOutcome(1, str(error))
    except KeyboardInterrupt:  # which the launcher passes on to all ranks
        return ExitOutcome(130, "interrupted")
    except BrokenPipeError:  # the reader of our output has left
        return ExitOutcome(1)
    except MemoryError as error:
        return ExitOutcome(1, f"out of memory{where}: {error}")
    except OSError as error:
        return ExitOutcome(1, f"the system refused{where}: {error}")
    except BaseException:
        return ExitOutcome(1, f"a fault of the program{where}:\n{traceback.format_exc()}")
    return ExitOutcome(0)


def _agree_on_exit(alarm: MPI.Intracomm, mine: ExitOutcome) -> int:
    """The exit status of the job, after one of the ranks that failed has printed its message.

    Where all ranks come here, they exchange their statuses and return, so that MPI ends in order
    and the launcher has nothing to add. Where some do not come they would wait for a rank that
    failed for ever: it aborts them.

    The first to fail speaks, because the others may have failed only in consequence; it gives
    notice of that to all. Of several that fail before they hear from each other the lowest speaks.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _flush_or_discard()
    others = [rank for rank in range(alarm.size) if rank != alarm.rank]
    speaks = mine.status != 0 and not _notice_from(others, alarm)
    notices = [alarm.Isend(b"", rank) for rank in others if speaks]
    outcomes = bytearray(2 * alarm.size)
    exchange = alarm.Iallgather(bytes([mine.status, speaks]), outcomes)
    deadline = time.monotonic() + (AGREEMENT_SECONDS if mine.status else math.inf)
    while not exchange.Test():
        if time.monotonic() > deadline:
            _abort(alarm, mine.status, _alone(mine, alarm) if speaks else "")
        time.sleep(0.002)
    speakers = [rank for rank in range(alarm.size) if outcomes[2 * rank + 1]]
    for rank in speakers:
        if rank != alarm.rank:
            alarm.Recv(bytearray(0), rank)
    for notice in notices:
        notice.Wait()
    if alarm.rank in speakers[:1]:
        alike = set(outcomes[::2]) == {mine.status}
        report(mine.message if alike else _alone(mine, alarm))
    return outcomes[2 * speakers[0]] if speakers else 0


def _alone(mine: ExitOutcome, comm: MPI.Intracomm) -> str:
    """The message of a rank that failed where others did not, which says so."""
    return mine.message if mine.is_complete else _signed(mine.message, comm)


def _signed(message: str, comm: MPI.Intracomm) -> str:
    return f"rank {comm.rank} of {comm.size}: {message}" if comm.size > 1 else message


def _abort(alarm: MPI.Intracomm, status: int, message: str) -> None:
    """End all ranks, after printing `message`, unless a rank that comes first is about to."""
    if message and not _notice_from(range(alarm.rank), alarm):
        report(message)
    else:
        time.sleep(AGREEMENT_SECONDS)  # the end comes within that time from the rank that speaks
    abort_job(alarm, status)


def abort_job(comm: MPI.Intracomm, status: int) -> None:
    """End all ranks of the job, wherever they are. MPI_Abort."""
    time.sleep(LAST_WORDS_SECONDS)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # MPI has lines of its own for this
    comm.Abort(status)


def _notice_from(ranks: Iterable[int], alarm: MPI.Intracomm) -> bool:
    """Whether one of `ranks` has failed and is about to say so. MPI may need a first look to take
    in what has arrived, and find it only at the second."""
    return any([alarm.Iprobe(rank) for rank in ranks for _ in range(5)])


def report(message: str) -> None:
    """Print what ends the job, if there is anything to say."""
    if message:
        sys.stderr.write(f"mpishard: error: {message}\n")  # at once; print would write it in pieces


def _interrupt_later(unraisable: sys.UnraisableHookArgs) -> None:
    """Ctrl-C that hit a callback in which Python cannot raise, and would only report it, comes
    once more a moment later."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        main = threading.main_thread().ident
        threading.Timer(0.05, signal.pthread_kill, [main, signal.SIGINT]).start()
    else:
        sys.__unraisablehook__(unraisable)


def _flush_or_discard() -> None:
    """Write out the rest of standard output, or forget it: else Python would try once more, at
    its very end, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _env_int(variables: tuple[str, ...], otherwise: int = 0) -> int:
    """The number with which the first of these environment variables begins that has one."""
    for name in variables:
        if number := re.match(r"\d+", os.environ.get(name, "")):
            return int(number[0])
    return otherwise


def _start_mpi() -> ModuleType:
    with warnings.catch_warnings():
        # `check_launcher` refuses what this warns of.
        warnings.filterwarnings("ignore", "suspicious MPI execution environment")
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            problem = " ".join(str(error).split())
            raise UserError(
                f"mpi4py cannot load an MPI library ({problem}): install an MPI, "
                "for example with `pip install mpich`, and use its mpirun"
            ) from None
    return MPI
