"""``mpishard eplb``: places experts, some of them several times, by the load that was counted."""

from __future__ import annotations

import argparse
from pathlib import Path

from mpi4py import MPI

from mpishard import options
from mpishard.arithmetic.eplb import rank_loads, rebalance_experts
from mpishard.commands.common import say, write_json
from mpishard.commands.expert_load import read_loads
from mpishard.config.expert_placement import ExpertPlacement, num_physical_per_rank
from mpishard.config.layout import block
from mpishard.parallel.expert_load import imbalance
from mpishard.storage.output_file import check_output

SUMMARY = "Place experts on ranks by their load, with redundant experts if asked for (EPLB)."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    command.add_argument("stats", metavar="LOAD.json", help="the file that --expert-load wrote")
    command.add_argument(
        *options.EP_FLAGS, type=options.count, required=True, metavar="N",
        help="ranks that shard the experts",
    )  # fmt: skip
    command.add_argument(
        "--redundant-experts", type=options.integer, default=0, metavar="N",
        help="replicas of experts in each layer, beyond one of each expert (default: 0)",
    )  # fmt: skip
    command.add_argument(
        "-o", "--output", required=True, metavar="FILE.json",
        help="the file to write, for --expert-placement",
    )  # fmt: skip


def run(args: argparse.Namespace, world: MPI.Intracomm) -> None:
    """``mpishard eplb``: one rank does it, however many were started."""
    if world.rank != 0:
        return
    source, target = Path(args.stats), Path(args.output)
    loads = read_loads(source)
    check_output("--output", target, source, "what is read")
    placement = rebalance(loads, args.ep, args.redundant_experts)
    write_json("--output", target, placement.content)
    say(f"{target}: {placement_summary(loads, placement)}")


def rebalance(loads: dict[int, list[int]], ep: int, redundant_experts: int) -> ExpertPlacement:
    """The experts of `ep` ranks in each layer, with so many further copies, by the experts' loads.
    UserError where the slots cannot be the same on all ranks."""
    experts = len(next(iter(loads.values())))
    slots = num_physical_per_rank(experts, redundant_experts, ep)
    layers = {layer: rebalance_experts(loads_E, ep, slots) for layer, loads_E in loads.items()}
    return ExpertPlacement(experts, layers)


def placement_summary(loads: dict[int, list[int]], placement: ExpertPlacement) -> str:
    """The imbalance over ranks, of the counted load, in blocks of experts and as placed."""
    experts, ep = placement.experts, placement.ep
    blocks = [range(experts)[block(experts, ep, rank)] for rank in range(ep)]
    before = [_imbalance(rank_loads(loads_E, blocks)) for loads_E in loads.values()]
    after = [
        _imbalance(rank_loads(loads_E, placement.layers[layer])) for layer, loads_E in loads.items()
    ]
    slots = sum(map(len, next(iter(placement.layers.values())))) // ep
    return (
        f"{slots} experts on each of {ep} ranks; imbalance (maximum over mean, averaged over "
        f"layers): {sum(before) / len(before):.2f} before, {sum(after) / len(after):.2f} after"
    )


def _imbalance(loads: list[float]) -> float:
    return imbalance(loads) or 1.0
