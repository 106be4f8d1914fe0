"""``mpishard bench``: measures speed and memory."""

from __future__ import annotations

import argparse
import json

from mpi4py import MPI

from mpishard import bench, options
from mpishard.commands.common import check_outputs, load_model, tracked_expert_load
from mpishard.errors import UserError

SUMMARY = "Measure speed, against this machine's roofline, and memory."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    options.add_model(command)
    command.add_argument(
        "--prompt-tokens", type=options.count, nargs="+", default=[512], metavar="N",
        help="lengths of the prompts, each measured on its own (default: 512)",
    )  # fmt: skip
    command.add_argument(
        "--max-tokens", type=options.count, default=32, metavar="N",
        help="tokens to generate in each sequence (default: 32)",
    )  # fmt: skip
    command.add_argument(
        "--batch", type=options.count, nargs="+", default=[1, 8], metavar="N",
        help="sequences of each replica at once (default: 1 8)",
    )  # fmt: skip
    command.add_argument(
        "--repeat",
        type=options.count,
        default=3,
        metavar="N",
        help="rounds, for medians (default: 3)",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    options.add_expert_load(command)
    options.add_layout(command)
    options.add_watchdog(command)


def run(args: argparse.Namespace, world: MPI.Intracomm) -> None:
    """``mpishard bench``: prints one table, or one JSON object."""
    check_outputs(args, world)
    model = load_model(args, world)
    if model.config.encoder is not None:
        raise UserError(
            "bench is not built for a model with an encoder: `mpishard batch` says how many tokens "
            "a second it takes"
        )
    with tracked_expert_load(args, model, world):
        report = bench.measure(model, args.prompt_tokens, args.max_tokens, args.batch, args.repeat)
        if world.rank == 0:
            print(json.dumps(report) if args.json else bench.table(report))
