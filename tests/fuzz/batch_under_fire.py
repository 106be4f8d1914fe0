#!/usr/bin/env python3
"""Kill a batch at random moments, over and over, and show that nothing is lost, nothing done twice
and every answer is that of an uninterrupted run.

    python tests/fuzz/batch_under_fire.py --requests 2000 --kills 10

Each time SIGKILL hits rank 0, another rank, the launcher, or all of them, while the job starts,
computes or writes; then the same command is given again. Ends with status 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
MODEL = CHECKOUT / "data" / "cpython-4m"
MPIRUN = str(Path(sys.executable).parent / "mpirun")
RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK")
BEGINNINGS = ("class Queue", "def read(self", "import", "The module", "    return", "for item in")


def environment(more: dict[str, str]) -> dict[str, str]:
    """That of a process that is to import this checkout, with some variables `more`."""
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **more}


class Batch:
    """The job of a directory, and the one run of it that there is at a time."""

    def __init__(self, directory: Path, requests: list[dict[str, Any]], ranks: int) -> None:
        directory.mkdir()
        self.source, self.target = directory / "in.jsonl", directory / "out.jsonl"
        self.journal = directory / "out.jsonl.journal"
        self.source.write_text("".join(json.dumps(request) + "\n" for request in requests))
        files = ["--input", str(self.source), "--output", str(self.target)]
        how = ["--temperature", "0.8", "--seed", "1", "--dp", str(ranks)]
        program = [sys.executable, "-m", "mpishard", "batch", str(MODEL), *files, *how]
        self.command = [MPIRUN, "-n", str(ranks), *program]

    def start(self) -> None:
        """Give the command, the same each time."""
        self.mark = f"BATCH_UNDER_FIRE_{uuid.uuid4().hex}=1"
        name, _, value = self.mark.partition("=")
        self.log = self.target.with_name("log").open("a+")
        self.process = subprocess.Popen(
            self.command,
            env=environment({name: value}),
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )

    def end(self) -> int:
        """The exit status, once it and every process of it have ended."""
        status = self.process.wait()
        while any(True for _ in self.members()):
            time.sleep(0.01)
        self.log.close()
        return status

    def members(self) -> Iterator[tuple[int, int | None]]:
        """The processes of the run, each with its rank if it has one."""
        return processes_marked(self.mark)

    def kill(self, victim: str) -> None:
        """SIGKILL "rank 0" or another, the "launcher", or "all"."""
        hit = False
        while not hit and self.process.poll() is None:  # the rank may be about to start
            for pid, rank in list(self.members()):
                names = ["all", f"rank {rank}", "launcher" if pid == self.process.pid else ""]
                if victim in names:
                    hit = True
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    def finished(self) -> list[tuple[int, str]]:
        """What the journal has: places of the input and answers, a torn last line left out."""
        if not self.journal.exists():
            return []
        lines = self.journal.read_text(errors="replace").split("\n")[1:-1]
        return [(int(place), answer) for _, place, answer in (s.split(" ", 2) for s in lines)]


def processes_marked(mark: str) -> Iterator[tuple[int, int | None]]:
    """The processes that have the setting `mark` in their environment, each with its rank if it has
    one."""
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            facts = (directory / "environ").read_bytes().decode(errors="replace").split("\0")
            if mark in facts:
                settings = dict(fact.split("=", 1) for fact in facts if "=" in fact)
                ranks = [settings[name] for name in RANK_VARIABLES if name in settings]
                yield int(directory.name), int(ranks[0]) if ranks else None


def main() -> int:
    """Run the job uninterrupted and under fire, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=300, metavar="N")
    parser.add_argument("--kills", type=int, default=10, metavar="N")
    parser.add_argument("--ranks", type=int, default=2, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments")
    args = parser.parse_args()
    requests = make_requests(args.requests)
    with tempfile.TemporaryDirectory(prefix="batch-under-fire-") as directory:
        peaceful = Batch(Path(directory) / "peace", requests, args.ranks)
        started = time.monotonic()
        peaceful.start()
        if peaceful.end() != 0:
            sys.exit(peaceful.target.with_name("log").read_text())
        seconds = time.monotonic() - started
        print(f"uninterrupted: {args.requests} requests in {seconds:.1f} s", flush=True)
        fired = Batch(Path(directory) / "fire", requests, args.ranks)
        lost = fire(fired, args.kills, args.requests, random.Random(args.seed))
        return compare(peaceful.target, fired.target, requests, lost)


def make_requests(count: int) -> list[dict[str, Any]]:
    """Short requests of different lengths."""
    return [
        {
            "id": f"request-{place}",
            "prompt": f"{BEGINNINGS[place % len(BEGINNINGS)]} {place}",
            "max_tokens": 8 + place % 25,
        }
        for place in range(count)
    ]


def fire(batch: Batch, kills: int, requests: int, moments: random.Random) -> int:
    """Run the job to its end through so many kills, each a random moment after a random number of
    answers; how many answers were lost on the way."""
    lost, before = 0, dict[int, str]()
    last_rank = int(batch.command[2]) - 1
    for number, count in enumerate(sorted(moments.sample(range(requests * 9 // 10), kills)), 1):
        batch.start()
        while len(batch.finished()) < count and batch.process.poll() is None:
            time.sleep(0.002)
        time.sleep(moments.expovariate(10))
        victim = moments.choice(["rank 0", f"rank {last_rank}", "launcher", "all"])
        batch.kill(victim)
        batch.end()
        if batch.target.exists():  # the killer had to wait for a processor
            print(f"the job was done before kill {number}: ask for more --requests", flush=True)
            return lost
        finished = batch.finished()
        after = dict(finished)
        lost += len(finished) - len(after)
        lost += sum(after.get(place) != answer for place, answer in before.items())
        before = after
        print(f"kill {number:2} ({victim}): {len(before)} answers in the journal", flush=True)
    batch.start()
    if batch.end() != 0:
        sys.exit(batch.target.with_name("log").read_text())
    totals = batch.target.with_name("log").read_text().splitlines()[-1]
    print(totals.partition("; ")[0].rpartition("/")[2])
    return lost


def compare(
    peaceful: Path, fired: Path, requests: list[dict[str, Any]], lost_on_the_way: int
) -> int:
    """Say what differs; the exit status."""
    right = [json.loads(line) for line in peaceful.read_text().splitlines()]
    found = [json.loads(line) for line in fired.read_text().splitlines()]
    names = [answer["id"] for answer in found]
    missing = len({request["id"] for request in requests} - set(names))
    doubled = len(names) - len(set(names))
    other = sum(one != another for one, another in zip(right, found, strict=False))
    print(
        f"{len(found)} answers: {missing} missing, {doubled} doubled, {lost_on_the_way} lost or "
        f"changed on the way, {other} different from the uninterrupted run"
    )
    in_order = names == [request["id"] for request in requests]
    return 0 if in_order and not missing + doubled + lost_on_the_way + other else 1


if __name__ == "__main__":
    sys.exit(main())
