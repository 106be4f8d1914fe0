#!/usr/bin/env python3
"""Feed mpishard damaged inputs, and show that each ends in one sentence or in the right answer.

    python tests/fuzz/fuzz_inputs.py --inputs 1000 --seed 0

Inputs of five kinds take turns, each damaged at random: files of requests, the small files of a
checkpoint, its weights, shards, and what lies beside them (journals, routing, placements, loads).
Every twentieth of a kind is read by two ranks under mpirun, the others by one.

A command must end in time, either with status 0 and the right answer, or with status 2 and one line
``mpishard: error: …``; with no other word than those of a run in peace, every file as it was, and
nothing left half written. What the right answer is, `tests/fuzz` says kind by kind. Damage
that changes nothing must change no answer. Ends with status 1 if anything is wrong.

What an input is depends on the seed and its number alone; --only N runs one again and keeps it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from typing import NamedTuple

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests")]

from fuzz.beside import beside  # noqa: E402
from fuzz.corpus import Corpus  # noqa: E402
from fuzz.models import configuration, weights  # noqa: E402
from fuzz.requests import requests  # noqa: E402
from fuzz.running import Finding, Room  # noqa: E402
from fuzz.shards import shards  # noqa: E402

KINDS = (requests, configuration, weights, shards, beside)
EVERY = 20  # of a kind, one on two ranks


class Verdict(NamedTuple):
    """What became of one input: "answered", "refused" with a sentence, or "wrong"."""

    number: int
    kind: str
    ranks: int
    outcome: str
    words: str


def main() -> int:
    """Damage, run and judge; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--inputs", type=int, default=1000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--only", type=int, metavar="N", help="this input alone, which is kept")
    parser.add_argument(
        "--limit", type=float, default=120, metavar="SECONDS", help="of one command (default: 120)"
    )
    args = parser.parse_args()
    numbers = range(args.inputs) if args.only is None else [args.only]
    base = Path(tempfile.mkdtemp(prefix="fuzz-inputs-"))
    started = time.monotonic()
    try:
        Judge.corpus, Judge.seed = Corpus(base / "clean", args.limit), args.seed
        Judge.keep = args.only is not None
        with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
            verdicts = []
            for verdict in pool.imap_unordered(Judge.judge, numbers):
                verdicts.append(verdict)
                if verdict.outcome == "wrong" or args.only is not None:
                    report(verdict, args.seed)
        return conclude(verdicts, time.monotonic() - started)
    finally:
        if args.only is None:
            shutil.rmtree(base)
        else:
            print(f"it is kept in {base}")


class Judge:
    """What the processes that judge inherit."""

    corpus: Corpus
    seed: int
    keep: bool

    @classmethod
    def judge(cls, number: int) -> Verdict:
        """Make the input of this number, run it and judge."""
        kind = KINDS[number % len(KINDS)]
        ranks = 1 if number // len(KINDS) % EVERY else 2
        room = Room(cls.corpus.path.with_name(f"input-{number}"), ranks, cls.corpus.limit)
        room.path.mkdir()
        try:
            words = kind(room, cls.corpus, Random(f"{cls.seed}/{number}"))
            if room.warned:
                raise Finding(f"NumPy warned, although the answer is finite\n{room.last}")
            outcome = "refused" if room.refused else "answered"
            words = f"{words}: {room.refused}" if room.refused else words
        except Finding as finding:
            outcome, words = "wrong", str(finding)
        except Exception:  # of a judge who is surprised
            outcome, words = "wrong", traceback.format_exc()
        if outcome != "wrong" and not cls.keep:
            shutil.rmtree(room.path)
        return Verdict(number, kind.__name__, ranks, outcome, words)


def report(verdict: Verdict, seed: int) -> None:
    """Say what became of an input, and how to see it again."""
    print(
        f"--- input {verdict.number} ({verdict.kind}, {verdict.ranks} ranks) {verdict.outcome}: "
        f"{verdict.words}\n--- again: python tests/fuzz/fuzz_inputs.py --seed {seed} "
        f"--only {verdict.number}",
        flush=True,
    )


def conclude(verdicts: list[Verdict], seconds: float) -> int:
    """Count the verdicts; the exit status."""
    for kind in KINDS:
        of_kind = Counter(one.outcome for one in verdicts if one.kind == kind.__name__)
        print(f"{kind.__name__:<14}{counts(of_kind)}")
    on_two = sum(one.ranks == 2 for one in verdicts)
    total = Counter(one.outcome for one in verdicts)
    print(
        f"{len(verdicts)} inputs, {on_two} of them on two ranks, in {seconds:.0f} s: "
        f"{counts(total)}"
    )
    return 1 if total["wrong"] else 0


def counts(outcomes: Counter[str]) -> str:
    """Numbers of verdicts in words."""
    names = ("answered", "refused", "wrong")
    return ", ".join(f"{outcomes[name]} {name}" for name in names)


if __name__ == "__main__":
    sys.exit(main())
