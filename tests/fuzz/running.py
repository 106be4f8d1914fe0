"""Commands of mpishard run many at a time from one process, and the manners every one has to have.

A command on one rank runs in a fork of this process, which has imported everything and not started
MPI; one on several ranks runs under mpirun. Each has a time limit, after which it says where it
hangs and is ended.
"""

from __future__ import annotations

import faulthandler
import os
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# The forks are to start MPI, each for itself; BLAS must have no threads, which a fork would lose.
os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import mpi4py  # noqa: E402

mpi4py.rc.initialize = mpi4py.rc.finalize = False

from mpi4py import MPI  # noqa: E402
from mpi_runner.launch import LAUNCHERS_WORDS  # noqa: E402

import mpishard.commands  # noqa: E402, F401  (so that a fork need not import it)
from fuzz.batch_under_fire import MPIRUN, environment, processes_marked  # noqa: E402
from mpishard import cli  # noqa: E402
from mpishard.commands.batch import ALL_REFUSED  # noqa: E402

CHECKOUT = Path(__file__).parents[2]

# What a process may allocate: less than a machine has, so that asking for all of it is an error
# of that process alone.
MOST_MEMORY = 16 << 30

GRACE = 10.0  # seconds for a process that is over its time to say where it is

LONGEST_SENTENCE = 1500  # characters

# What commands say at the end where damaged weights are infinite.
NOT_FINITE = re.compile(
    r"(overflow|invalid value|divide by zero)( and .*)? in float(32|64) arithmetic: results may be "
)


class Finding(Exception):
    """A command that did what none may do: what that was, in words."""


class Ending(NamedTuple):
    """How a command ended: its exit status, or less than 0 the signal that ended it, and what it
    wrote."""

    status: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"status {self.status}\n{self.out}{self.err}".rstrip()


def run_here(words: list[str], limit: float) -> Ending:
    """Run a command on one rank in a fork, for at most `limit` seconds."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _be_the_command(words, limit, out.fileno(), err.fileno())
        handle = os.pidfd_open(child)
        if not select.select([handle], [], [], limit + GRACE)[0]:
            os.kill(child, signal.SIGKILL)
        os.close(handle)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return Ending(status, *map(_content, (out, err)))


def _be_the_command(words: list[str], limit: float, out: int, err: int) -> None:
    """The fork: does not return."""
    status = 70
    try:
        _bound_memory()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        faulthandler.dump_traceback_later(limit, exit=True)
        sys.argv = ["mpishard", *words]
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
        status = cli.main()
        MPI.Finalize()
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(status)


def _bound_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _content(file) -> str:
    file.seek(0)
    return file.read().decode(errors="backslashreplace")


def run_on_ranks(ranks: int, words: list[str], limit: float) -> Ending:
    """Run a command under mpirun, for at most `limit` seconds, and see all its ranks end."""
    mark = f"FUZZ_INPUTS_{uuid.uuid4().hex}"
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            [MPIRUN, "-n", str(ranks), sys.executable, "-m", "mpishard", *words],
            env=environment({mark: "1"}),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            preexec_fn=_bound_memory,
            start_new_session=True,
        )
        late = ""
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            late = f"still running after {limit:g} s\n"
        late = late or _left_behind(mark)
        for pid, _ in processes_marked(f"{mark}=1"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        said = LAUNCHERS_WORDS.sub("", _content(err))
        return Ending(process.wait(), _content(out), said + late)


def _left_behind(mark: str) -> str:
    """What to say of ranks that have not ended although their launcher has, "" if there are
    none."""
    deadline = time.monotonic() + GRACE
    while left := [rank for _, rank in processes_marked(f"{mark}=1")]:
        if time.monotonic() > deadline:
            return f"ranks {left} are still there although the launcher has ended\n"
        time.sleep(0.02)
    return ""


def _may(name: str, makes: tuple[str, ...], succeeded: bool) -> bool:
    """Whether a command may write the file `name`: one that it `makes`, in a directory that it
    makes; if it did not succeed only a journal, and what bears an unfinished directory's name."""
    for made in makes:
        if made.endswith("/"):
            if name.startswith(made if succeeded else f"{made[:-1]}.incomplete/"):
                return True
        elif name == made and (succeeded or name.endswith(".journal")):
            return True
    return False


@dataclass
class Room:
    """A directory for one input, in which commands run and are held to their manners."""

    path: Path
    ranks: int
    limit: float
    refused: str = ""  # the sentence with which the last command refused its input
    last: Ending = Ending(0, "", "")
    warned: bool = False  # that numbers overflow; no answer has been seen that is no number

    def run(self, *words: object, makes: tuple[str, ...] = (), ranks: int = 0) -> bool:
        """Whether the command succeeds; if not, `refused` is why. Raises Finding unless it ends in
        time, with status 0, having written nothing but the files that it `makes`, or with status 2,
        one sentence, and every file as it was. A batch may begin a journal in either case, and
        end with another status where every line failed. A command may say that numbers overflowed,
        which whoever judges the answer is to excuse."""
        before = self._files()
        given = [str(word) for word in words]
        ranks = ranks or self.ranks
        if ranks == 1:
            self.last = run_here(given, self.limit)
        else:
            self.last = run_on_ranks(ranks, given, self.limit)
        if given[:1] == ["batch"] and self.last.status == ALL_REFUSED:
            self.last = self.last._replace(status=0)
        self._check_words(self.last)
        succeeded, after = self.last.status == 0, self._files()
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name) and not _may(name, makes, succeeded):
                what = "was left" if name not in before else "was changed or removed"
                raise Finding(f"{name} {what}\n{self.last}")
        return succeeded

    def _check_words(self, ending: Ending) -> None:
        # What commands say of themselves: of a file or directory, how it went, experts' load.
        usual = re.compile(
            rf"{re.escape(str(self.path.parent))}/.*: |prefill: \d+ tokens"
            r"|expert load, |layer  phase | +\d+  (prefill|decode) "
        )
        errors, others = [], []
        for line in ending.err.splitlines():
            if line.startswith("mpishard: error: "):
                errors.append(line.removeprefix("mpishard: error: "))
            elif NOT_FINITE.match(line):
                self.warned = True
            elif not usual.match(line):
                others.append(line)
        if ending.status not in (0, 2):
            raise Finding(str(ending))
        if others:
            raise Finding(f"unusual words: {others[0]}\n{ending}")
        if len(errors) != (ending.status == 2):
            raise Finding(f"{len(errors)} errors\n{ending}")
        self.refused = "".join(errors)
        if len(self.refused) > LONGEST_SENTENCE:
            raise Finding(f"a sentence of {len(self.refused)} characters\n{ending}")

    def _files(self) -> dict[str, bytes]:
        """The content of every file, by its path in the room."""
        return {
            str(file.relative_to(self.path)): file.read_bytes()
            for file in self.path.rglob("*")
            if file.is_file()
        }
