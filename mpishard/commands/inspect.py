"""``mpishard inspect``: what a model or shard directory holds."""

from __future__ import annotations

import argparse

from mpi4py import MPI

from mpishard import options
from mpishard.commands.common import progress_bar
from mpishard.storage.inspection import describe, stored_bytes, verify
from mpishard.storage.source import open_source

SUMMARY = "Say what a model or shard directory holds."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    options.add_model(command)
    command.add_argument(
        "--verify", action="store_true", help="read every weight and check all that can be checked"
    )


def run(args: argparse.Namespace, world: MPI.Intracomm) -> None:
    """``mpishard inspect``: one rank does it, however many were started."""
    if world.rank != 0:
        return
    source = open_source(args.model, args.ignore_config)
    print("\n".join(describe(source)), flush=True)
    if args.verify:
        with progress_bar(world, stored_bytes(source), "verifying", "B") as advance:
            verify(source, advance)
        print("verified: every element of every weight is there and sound")
