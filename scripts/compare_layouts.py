#!/usr/bin/env python3
"""How many times as fast as one rank a layout is: both in the same processes, in turn.

    mpirun -n 2 python scripts/compare_layouts.py MODEL [LAYOUT …] [--rounds 12]

Layouts are written as `mpishard.load` takes them: tp=2 dp=2 cp=2,cp_prefill=all-gather …

In each round one rank alone, while the others sleep, and then all ranks in each of the layouts take
in a prompt for each replica and generate after it, so that a slow moment of the machine meets all
of them. Before each turn it is measured how many bytes a second the same ranks' matrix-vector
products read: memory is what ranks share with each other and with whatever else runs there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mpishard.engine.sampling_params import SamplingParams  # noqa: E402
from mpishard.runtime import launch  # noqa: E402

if TYPE_CHECKING:
    from mpi4py import MPI

    import mpishard


PARSER = argparse.ArgumentParser(description="Layouts beside one rank, in the same processes.")
PARSER.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face directory")
PARSER.add_argument(
    "layouts", nargs="*", default=["tp=2", "dp=2"], metavar="LAYOUT", help="tp=2 dp=2 unless given"
)
PARSER.add_argument("--prompt-tokens", type=int, default=512, metavar="N")
PARSER.add_argument("--max-tokens", type=int, default=32, metavar="N")
PARSER.add_argument("--rounds", type=int, default=12, metavar="N", help="after one to warm up")

ALONE = "one rank"
# Seconds between two looks of a rank that has nothing to do.
POLL_SECONDS = 0.002

# Tokens a second of prompts and of generation, and bytes a second of matrix-vector products.
Figures = tuple[float, float, float]


def layout(word: str) -> dict[str, int | str | bool]:
    """The arguments of `mpishard.load` that a word stands for."""
    layout_options: dict[str, int | str | bool] = {}
    for switch in word.split(","):
        name, sign, value = switch.partition("=")
        layout_options[name] = int(value) if value.isdecimal() else value if sign else True
    return layout_options


def main(world: MPI.Intracomm) -> None:
    """Prints the table on rank 0."""
    args = PARSER.parse_args()
    contestants = load(world, args)
    walk = walker(contestants[args.layouts[-1]])
    rounds: dict[str, list[Figures]] = {name: [] for name in contestants}
    for number in range(args.rounds + 1):
        for name, model in contestants.items():
            figures = take_turn(world, model, walk, args)
            if number:  # the first is to warm up
                rounds[name].append(figures)
    if world.rank == 0:
        show(rounds, args)


def load(world: MPI.Intracomm, args: argparse.Namespace) -> dict[str, mpishard.Model | None]:
    """The model in each of the layouts, None where this rank has no part in it."""
    import mpishard

    contestants = {ALONE: mpishard.load(args.model) if world.rank == 0 else None}
    for word in args.layouts:
        contestants[word] = mpishard.load(args.model, world, **layout(word))
    return contestants


def walker(model: mpishard.Model) -> Callable[[], float]:
    """What measures the bytes a second that this rank's matrix-vector products read, for a model of
    all ranks."""
    from mpishard.bench.probes import memory_probe

    work, read = memory_probe(model)

    def walk() -> float:
        started = perf_counter()
        work()
        return read / (perf_counter() - started)

    return walk


def take_turn(
    world: MPI.Intracomm,
    model: mpishard.Model | None,
    walk: Callable[[], float],
    args: argparse.Namespace,
) -> Figures:
    """What all replicas of a model made together, on rank 0; none of it where there is no model."""
    figures = 0.0, 0.0, 0.0
    world.Barrier()
    if model is not None:
        figures = measure(model, walk, args)
    # The others sleep meanwhile, where MPI's own barrier would keep their cores busy.
    request = world.Ibarrier()
    while not request.Test():
        sleep(POLL_SECONDS)
    return figures


def measure(model: mpishard.Model, walk: Callable[[], float], args: argparse.Namespace) -> Figures:
    """The figures of one turn of the ranks of a model, from the slowest's seconds."""
    import numpy as np

    from mpishard.engine.generate import Timing

    replicas, comm = model.mesh.dp.size, model.mesh.world.comm
    vocab = model.config.vocab
    prompts = np.random.default_rng(0).integers(vocab, size=(replicas, args.prompt_tokens))
    timing = Timing()
    comm.Barrier()
    bandwidth = comm.allreduce(walk())
    comm.Barrier()
    params = SamplingParams(max_tokens=args.max_tokens + 1, ignore_eos=True)
    model.generate(prompts.tolist(), params, timing=timing)
    prompt, generation = (
        max(comm.allgather(seconds)) for seconds in (timing.prefill_seconds, timing.decode_seconds)
    )
    return (
        replicas * args.prompt_tokens / prompt,
        replicas * args.max_tokens / generation,
        bandwidth,
    )


def show(rounds: dict[str, list[Figures]], args: argparse.Namespace) -> None:
    """Print what each contestant made in each round and, last, the medians; ratios are those to
    one rank in the same round."""
    width = max(map(len, rounds))
    names = f"prompt {args.prompt_tokens}", f"generation {args.max_tokens}", "memory"
    print(f"{args.model}: tokens/s, times one rank, and GB/s of matrix-vector products")
    print(f"{'round':8}{'layout':{width}}" + "".join(f"{name:>21}" for name in names))
    for number in range(args.rounds):
        print_lines(f"{number + 1}", {name: [some[number]] for name, some in rounds.items()})
    print_lines("median", rounds)


def print_lines(title: str, rounds: dict[str, list[Figures]]) -> None:
    """A line for each contestant, of the medians of some rounds."""
    for name, figures in rounds.items():
        pairs = list(zip(figures, rounds[ALONE], strict=True))
        cells = ""
        for kind, unit in enumerate((1, 1, 1e9)):
            value = median(some[kind] for some, _ in pairs) / unit
            ratio = median(some[kind] / alone[kind] for some, alone in pairs)
            cells += f"{value:13.1f} {ratio:5.2f} x"
        print(f"{title:8}{name:{max(map(len, rounds))}}{cells}")


if __name__ == "__main__":
    sys.exit(launch.run(main))
