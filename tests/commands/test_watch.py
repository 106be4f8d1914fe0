"""Runs that would hang: they end, and say where every rank is; and runs that are only slow."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from itertools import takewhile
from pathlib import Path

import pytest
from mpi_runner import Launch, run_mpi

from commands.shell import Finished
from mpishard.runtime.watchdog import RankStatus, _merged

# Seconds for collectives that never end, and for jobs that end long before.
TIMEOUT, PATIENCE = 4, 90

pytestmark = pytest.mark.waits(110)

# A rank that waits for one that never comes leaves its core to other tests.
PATIENT = {"MPIR_CVAR_ENABLE_HEAVY_YIELD": "1"}

# A command whose rank 1 misbehaves at its so-manieth call of one function of one module. The script
# passes for a part of `mpishard.communication`, so that the line which calls it is taken for the
# line that makes the collective.
COMMAND = """
import os, signal, sys, time
from importlib import import_module
from itertools import count
from mpishard import cli

__name__ = "mpishard.communication.misbehaving"
calls = count(1)

def misbehave():
    {misbehaviour}

def patch(world):
    from mpishard.communication.collectives import MAX, all_gather
    module = import_module("mpishard.{module}")
    right = getattr({holder}, "{name}")

    def function(*arguments, **named):
        x, *rest = arguments
        if next(calls) in {when} and world.rank in {who}:
            {instead}
        return right(x, *rest, **named)

    setattr({holder}, "{name}", function)

def run_command(argv, world, *more, right=cli.run_command):
    patch(world)
    right(argv, world, *more)

cli.run_command = run_command
sys.exit(cli.main())
"""

ASKED = ["--prompt", "def on", "--max-tokens", "20", "--ignore-eos"]


def script(
    misbehaviour: str = "pass",
    instead: str = "misbehave()",
    *,
    name: str = "all_reduce",
    module: str = "parallel.tensor",
    holder: str = "module",
    when: str = "(25,)",
    who: str = "(1,)",
) -> str:
    return COMMAND.format(**locals())


def generated(
    program: str, model: Path, n: int = 2, how: str = "--tp 2", timeout: int = TIMEOUT
) -> Finished:
    """What ``mpishard generate`` answers that is started by `program`."""
    words = ["generate", str(model), *ASKED, "--timeout", str(timeout), *how.split()]
    return run_mpi(n, ["-c", program, *words], env=PATIENT, timeout=PATIENCE)


def message(finished: Finished) -> str:
    """The one message with which a job ends whose ranks do not stay together. Hydra now and then
    gives the signal with which it ended the other ranks in place of the status."""
    assert finished.returncode in (1, signal.SIGKILL), finished.stderr
    assert finished.stderr.count("mpishard: error:") == 1, finished.stderr
    assert "Traceback" not in finished.stderr
    return finished.stderr[finished.stderr.index("mpishard: error:") :]


def place(ranks: str, said: str) -> str:
    """The line that says where some ranks are."""
    return next(line for line in said.splitlines() if line.startswith(f"{ranks}: "))


def stack(ranks: str, said: str) -> list[str]:
    """The lines under it."""
    below = said[said.index(place(ranks, said)) :].splitlines()[1:]
    return [line.strip() for line in takewhile(lambda line: line.startswith("    "), below)]


IN_TP = (
    r"in collective \d+ of tp \(ranks 0, 1\), all_reduce of \d+ float32 \(sum\), "
    r"at mpishard/parallel/tensor\.py:\d+; done: \d+ of tp; for \d+\.\d s"
)


# Ranks that do not come


def test_a_rank_that_does_something_else_is_asked_where_it_is(model):
    said = message(generated(script("time.sleep(1000)"), model))
    assert re.fullmatch(
        r"mpishard: error: rank 0 of 2 has been in one collective for longer than the timeout of "
        r"4 s: all_reduce of \d+ float32 \(sum\) \(group tp\)",
        said.splitlines()[0],
    )
    waits, away = place("rank 0", said), place("rank 1", said)
    assert re.fullmatch(f"rank 0: {IN_TP}", waits)
    number, done = map(int, re.findall(r"collective (\d+) of.* done: (\d+) of tp", waits)[0])
    assert number == done + 1
    assert re.search(rf"in no collective; done: .*{done} of tp, \d of world; for \d+\.\d s$", away)
    assert stack("rank 1", said)[-1].endswith("in misbehave")
    assert re.match(r"mpishard/commands/generate\.py:\d+ in run", stack("rank 0", said)[1])
    called = re.search(r"mpishard/parallel/tensor\.py:\d+", waits)
    for rank in ("rank 0", "rank 1"):
        assert called and any(line.startswith(called[0]) for line in stack(rank, said))


def test_the_first_collective_of_a_group(model):
    said = message(generated(script("time.sleep(1000)", when="(1,)"), model))
    assert re.fullmatch(f"rank 0: {IN_TP}", place("rank 0", said))
    assert "in collective 1 of tp" in said and "; done: 0 of tp;" in said


def test_a_rank_that_is_stopped(model):
    said = message(generated(script("os.kill(os.getpid(), signal.SIGSTOP)"), model))
    assert re.fullmatch(f"rank 0: {IN_TP}", place("rank 0", said))
    assert re.search(r"does not answer: process \d+ on \S+ is stopped", place("rank 1", said)), said


def test_a_rank_that_lets_no_other_thread_run_does_not_answer(model):
    """Regular expressions keep Python's lock, and this one takes for ever."""
    said = message(generated(script("__import__('re').match('(a*)*b', 'a' * 60)"), model))
    assert re.search(r"process \d+ on \S+ runs, and keeps Python", place("rank 1", said))


def test_a_rank_that_ends_before_the_others(model):
    said = message(generated(script("sys.exit()"), model))
    assert re.fullmatch(f"rank 0: {IN_TP}", place("rank 0", said))
    assert "rank 1: in no collective; done:" in said
    agreeing = r"mpishard/runtime/launch\.py:\d+ in _agree_on_exit"
    assert re.fullmatch(agreeing, stack("rank 1", said)[0])


def test_ranks_in_the_same_place_are_named_together(model):
    said = message(generated(script("time.sleep(1000)"), model, 4, "--tp 4"))
    assert "(ranks 0, 1, 2, 3), all_reduce" in place("ranks 0, 2, 3", said)
    assert place("rank 1", said).startswith("rank 1: in no collective")


def test_a_rank_that_leaves_the_ring(model):
    program = script("time.sleep(1000)", name="isendrecv", module="parallel.context", when="(3,)")
    said = message(generated(program, model, 3, "--cp 3"))
    where = r"isendrecv, at mpishard/parallel/context\.py:\d+; done: \d+ of cp"
    assert re.search(rf"in collective \d+ of cp \(ranks 0, 1, 2\), {where}", said)
    assert place("rank 1", said).startswith("rank 1: in no collective")
    assert stack("rank 1", said)[-1].endswith("in misbehave")


def test_a_rank_that_writes_shards_for_ever(model, tmp_path):
    program = script(
        "time.sleep(1000)",
        name="write",
        module="storage.convert",
        holder="module.Conversion",
        when="(1,)",
    )
    words = ["shard", str(model), str(tmp_path / "out"), "--tp", "2", "--timeout", str(TIMEOUT)]
    said = message(run_mpi(2, ["-c", program, *words], timeout=PATIENCE))
    assert re.match(r"rank 0: in collective \d of world, barrier, at mpish", place("rank 0", said))
    assert stack("rank 1", said)[-1].endswith("in misbehave")


def test_a_rank_that_is_killed_ends_the_job_without_the_watchdog(model):
    finished = generated(script("os.kill(os.getpid(), signal.SIGKILL)"), model, timeout=1000)
    assert finished.returncode != 0
    assert "mpishard: error" not in finished.stderr


def test_a_rank_that_fails_ends_the_job_without_the_watchdog(model):
    finished = generated(script("raise ValueError('odd')"), model, timeout=1000)
    assert finished.returncode in (1, signal.SIGKILL)
    assert finished.stderr.count("mpishard: error: a fault of the program on rank 1 of 2:") == 1
    assert finished.stderr.rstrip().endswith("ValueError: odd")


def test_where_mpi_allows_one_thread_each_rank_speaks_for_itself(model):
    program = script("time.sleep(1000)")
    words = ["-c", program, "generate", str(model), *ASKED, "--timeout", str(TIMEOUT), "--tp", "2"]
    finished = run_mpi(2, words, env={"MPI4PY_RC_THREAD_LEVEL": "serialized"}, timeout=PATIENCE)
    said = message(finished)
    assert re.fullmatch(f"rank 0: {IN_TP}", place("rank 0", said))
    assert "rank 1" not in said


PROGRAM = """
import sys, time
from mpi4py import MPI
import mpishard
comm = MPI.COMM_WORLD
with mpishard.Watchdog(comm, timeout=4) as watch:
    model = mpishard.load(sys.argv[1], comm, tp=2, watch=watch)
    model.generate(["a"], mpishard.SamplingParams(max_tokens=2))
    if comm.rank == 1:
        time.sleep(1000)
    model.generate(["b"], mpishard.SamplingParams(max_tokens=2))
"""


def test_a_program_that_watches(model):
    said = message(run_mpi(2, ["-c", PROGRAM, str(model)], timeout=PATIENCE))
    assert re.fullmatch(f"rank 0: {IN_TP}", place("rank 0", said))
    assert stack("rank 1", said) == ["<string>:10 in <module>"]


# Ranks that are only slow


def test_ranks_that_wait_for_a_slow_one_less_than_the_timeout_at_a_time(model):
    """Together for longer than the timeout."""
    slow = generated(script("time.sleep(2)", when="(5, 6, 7, 8)"), model, timeout=6)
    assert slow.returncode == 0, slow.stderr
    assert slow.stdout == generated(script(), model).stdout


def test_arithmetic_of_any_length_in_which_no_rank_waits(model):
    slow = generated(script("time.sleep(5)", who="(0, 1)"), model, timeout=3)
    assert slow.returncode == 0, slow.stderr


STOPPED = """
import sys, time
from mpishard.communication.collectives import barrier
from mpishard.runtime.launch import run

def main(world):
    from mpishard.runtime.watchdog import Watchdog
    with Watchdog(world, timeout=4) as watch:
        barrier(watch.world)
        if world.rank == 1:
            sys.stderr.write("ready\\n")
            for _ in range(40):
                time.sleep(0.05)
        barrier(watch.world)

sys.exit(run(main))
"""


def test_a_job_that_was_stopped_as_a_whole_goes_on():
    """Ctrl-Z and, after longer than the timeout, fg, while one rank waits for the other."""
    pipe = subprocess.PIPE
    with Launch(2, ["-c", STOPPED], stdout=pipe, stderr=pipe) as job:
        assert job.process.stderr
        assert job.process.stderr.readline() == "ready\n"
        ranks = [job.pid(rank) for rank in range(2)]
        for rank in ranks:
            os.kill(rank, signal.SIGSTOP)
        time.sleep(6)
        for rank in ranks:
            os.kill(rank, signal.SIGCONT)
        _, err = job.process.communicate(timeout=PATIENCE)
    assert (job.process.returncode, err) == (0, "")


# Ranks that are compared


AT = r"\(number \d+ of the group, at mpishard/(?:parallel/tensor|engine/sampling)\.py:\d+\)"


@pytest.mark.parametrize(
    "instead, other",
    [
        ("return x", r"all_(reduce|gather) of .*"),
        ("rest.append(MAX)", r"all_reduce of \d+ float32 \(maximum\)"),
    ],
    ids=["left out", "operator"],
)
def test_a_rank_that_makes_another_collective_is_named(model, instead, other):
    """Where the comparison is off, these would hang, or mix up their data. `test_check` has all
    that ranks may differ in."""
    program = script(instead=instead)
    said = message(generated(program, model, how="--tp 2 --check-collectives", timeout=30))
    one = rf"rank 0 makes all_reduce of \d+ float32 \(sum\) {AT}"
    start = "mpishard: error: the ranks of tp do not make the same collective:"
    found = re.fullmatch(rf"{start} {one}, but rank 1 makes {other} {AT}\n*", said)
    assert found, said
    if instead == "return x":
        lines = re.findall(r"\w+\.py:\d+", said)
        assert lines[0] != lines[1]


def test_a_rank_that_sends_something_else_round_the_ring_is_named(model):
    program = script(
        instead="x = x[:, :, :1]", name="isendrecv", module="parallel.context", when="(3,)"
    )
    said = message(generated(program, model, how="--cp 2 --check-collectives", timeout=30))
    assert re.search(
        r"error: isendrecv, on all ranks at mpishard/parallel/context\.py:\d+: rank 1 sends "
        r"\d+ float32 to rank 0, which expects \d+ float32\n",
        said,
    )


def test_the_watchdog_speaks_where_a_comparison_waits_for_ever(model):
    how = "--tp 2 --check-collectives"
    said = message(generated(script("sys.exit()"), model, how=how))
    assert re.fullmatch(f"rank 0: {IN_TP}", place("rank 0", said))
    checking = r"mpishard/communication/check\.py:\d+ in check_collective"
    assert re.match(checking, stack("rank 0", said)[-1])


# The report


def test_ranks_are_merged_by_what_they_say():
    waits = RankStatus("waits", 2.0, ("a.py:1 in f", "b.py:2 in g"))
    places = {2: waits, 0: waits, 1: RankStatus("is gone", 0.0), 3: RankStatus("waits", 1.0)}
    places[4] = RankStatus("waits", 3.25, ("a.py:1 in f", "b.py:2 in g"))
    assert list(_merged(places)) == [
        "ranks 0, 2, 4: waits; for 3.2 s",
        "    a.py:1 in f",
        "    b.py:2 in g",
        "rank 1: is gone",
        "rank 3: waits; for 1.0 s",
    ]
