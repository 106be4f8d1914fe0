#!/usr/bin/env python3
"""Throughput of a batch of uneven requests, beside the same requests one by one and on replicas,
and how long a job takes from its start to a first token.

    python scripts/make_random_model.py /tmp/mid
    python scripts/batch_throughput.py /tmp/mid --requests 200 --replicas 2

One thread a rank. What the runs answer is compared as well: tokens of a request may differ only
where two candidates are as close as float32 computes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
MPIRUN = str(Path(sys.executable).parent / "mpirun")

SUMMARY = re.compile(r"completion tokens in ([\d.]+) s,")
NOTHING_BUT_MPI = "from mpi4py import MPI"


def main() -> None:
    """Run the jobs in turn and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face directory")
    parser.add_argument("--requests", type=int, default=200, metavar="N")
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=[16, 512], metavar="N")
    parser.add_argument("--max-tokens", type=int, nargs=2, default=[16, 128], metavar="N")
    parser.add_argument("--replicas", type=int, default=2, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the requests")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="batch-throughput-") as directory:
        source = Path(directory) / "in.jsonl"
        source.write_text("".join(json.dumps(one) + "\n" for one in make_requests(args)))
        # The layouts that are compared with each other run one right after the other.
        replicas = ["--dp", str(args.replicas)]
        spread, found_spread = answer(args.model, source, args.replicas, replicas)
        together, found_together = answer(args.model, source, 1, [])
        alone, expected = answer(args.model, source, 1, ["--max-num-seqs", "1"])
        for name, seconds, beside in (
            ("one by one", alone, alone),
            ("together", together, alone),
            (" ".join(replicas), spread, together),
        ):
            print(f"{name:12} {seconds:8.1f} s  {beside / seconds:6.2f} x", flush=True)
        differ = [sum(map(str.__ne__, expected, found)) for found in (found_together, found_spread)]
        print(f"answers unlike those one by one: {differ[0]} and {differ[1]}", flush=True)
        first, mpi = begin(args.model, Path(directory))
        print(f"first token of shards: {first:.2f} s, of which MPI alone takes {mpi:.2f} s")


def make_requests(args: argparse.Namespace) -> list[dict[str, object]]:
    """Requests of any lengths within the bounds asked for."""
    vocabulary = json.loads((args.model / "config.json").read_text())["vocab_size"]
    numbers = random.Random(args.seed)
    return [
        {
            "id": str(place),
            "input_ids": numbers.choices(range(vocabulary), k=numbers.randint(*args.prompt_tokens)),
            "max_tokens": numbers.randint(*args.max_tokens),
        }
        for place in range(args.requests)
    ]


def start(ranks: int, *words: object) -> str:
    """What ``python WORDS`` on so many ranks says on standard error."""
    job = subprocess.run(
        [MPIRUN, "-n", str(ranks), sys.executable, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "OPENBLAS_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    if job.returncode:
        sys.exit(job.stderr)
    return job.stderr


def answer(model: Path, source: Path, ranks: int, options: list[str]) -> tuple[float, list[str]]:
    """The seconds in which a job answers all requests, its model loaded, and the answers."""
    target = source.with_name(f"{'-'.join(options)}.jsonl")
    files = ["--input", source, "--output", target, "--ignore-eos"]
    said = start(ranks, "-m", "mpishard", "batch", model, *files, *options)
    if (found := SUMMARY.search(said)) is None:
        sys.exit(said)
    return float(found[1]), target.read_text().splitlines()


def begin(model: Path, directory: Path) -> tuple[float, float]:
    """The seconds from the start of a job of shards to its first and only token, the end of the
    job included, and those of a job that does nothing but start MPI: the least of three."""
    source, shards = directory / "one.jsonl", directory / "shards"
    source.write_text('{"input_ids": [1, 2, 3], "max_tokens": 1}\n')
    start(1, "-m", "mpishard", "shard", model, shards, "--tp", 1)
    first, mpi = [], []
    for turn in range(3):
        files = ["--input", source, "--output", directory / f"{turn}.jsonl"]
        first.append(seconds_of("-m", "mpishard", "batch", shards, *files))
        mpi.append(seconds_of("-c", NOTHING_BUT_MPI))
    return min(first), min(mpi)


def seconds_of(*words: object) -> float:
    """How long ``python WORDS`` takes on one rank."""
    started = time.perf_counter()
    start(1, *words)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
