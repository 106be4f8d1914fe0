"""``mpishard shard``: converts a model to one HDF5 file for each rank."""

from __future__ import annotations

import argparse
from math import lcm

from mpi4py import MPI

from mpishard import options
from mpishard.commands.common import progress_bar, say
from mpishard.communication.collectives import barrier
from mpishard.runtime.agreement import raise_on_all
from mpishard.runtime.same_model import open_on_all
from mpishard.storage.convert import Conversion
from mpishard.storage.source import notices

SUMMARY = "Shard a model: one HDF5 file for each rank."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    options.add_model(command)
    command.add_argument("out", metavar="OUT", help="the directory to write; must not exist")
    command.add_argument(
        *options.TP_FLAGS, type=options.count, required=True, metavar="N",
        help="ranks that shard the weights",
    )  # fmt: skip
    command.add_argument(
        *options.EP_FLAGS, type=options.count, default=1, metavar="N",
        help="ranks that shard the experts of an MoE model (default: 1)",
    )  # fmt: skip
    command.add_argument(
        *options.CP_FLAGS, type=options.count, default=1, metavar="N",
        help="context-parallel ranks, which shard the width of an MoE model's experts as well "
        "(default: 1)",
    )  # fmt: skip
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the stored weights; float32 is mapped into memory without a copy "
        "(default: float32)",
    )  # fmt: skip
    options.add_watchdog(command)


def run(args: argparse.Namespace, world: MPI.Intracomm) -> None:
    """``mpishard shard``: the ranks share the files to be written."""
    source = open_on_all(args.model, world, args.ignore_config, args.watch.calls)
    if world.rank == 0 and (said := notices(source)):
        say(f"{args.model}: {'; '.join(said)}")
    with raise_on_all(world, args.watch.calls):
        ranks = lcm(args.tp * args.cp, args.ep)
        conversion = Conversion(source, args.out, args.tp, args.dtype, args.ep, ranks)
        if world.rank == 0:
            conversion.prepare()
    with progress_bar(
        world, conversion.worker_bytes(world.rank, world.size), "writing", "B"
    ) as advance:
        conversion.write(world.rank, world.size, advance)
    barrier(args.watch.world)
    with raise_on_all(world, args.watch.calls):
        if world.rank == 0:
            conversion.finish()
    if world.rank == 0:
        ranks = conversion.sharding.ranks
        say(f"{args.out}: {conversion.total_bytes / 1e6:.1f} MB for {ranks} ranks")
