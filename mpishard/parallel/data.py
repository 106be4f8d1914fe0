"""Data parallelism: whole replicas of the model, each with requests of its own.

Replicas are the lines of ranks along the ``dp`` axis. They never meet in the forward pass; only the
finished results travel, over the ``dp`` group, and come back in the order of the requests.

deal      count of requests -> the places of this replica's
collect   this replica's results -> all_gather(dp) -> all results, in the order of the requests
"""

from __future__ import annotations

import numpy as np

from mpishard.communication.collectives import all_gather
from mpishard.communication.mesh import Mesh


def assign_requests(count: int, mesh: Mesh) -> range:
    """Which of `count` requests this replica takes: every dp-th, so that a list sorted by length
    is shared fairly."""
    return range(mesh.dp.rank, count, mesh.dp.size)


def gather_results(results: list[bytes], count: int, mesh: Mesh) -> list[bytes]:
    """The results of all `count` requests in their order, on every rank, from each replica's own
    `results` in the order in which it was dealt them."""
    lengths = np.zeros(count, np.int64)
    lengths[list(assign_requests(count, mesh))] = [len(result) for result in results]
    mine = np.frombuffer(b"".join(results), np.uint8)
    lengths_RC = all_gather(lengths[np.newaxis], mesh.dp)
    sizes = [int(total) for total in lengths_RC.sum(axis=1)]
    everything = all_gather(mine, mesh.dp, sizes=sizes).tobytes()
    starts = np.cumsum([0, *sizes[:-1]])
    ordered = []
    for place in range(count):
        replica = place % mesh.dp.size
        start, length = int(starts[replica]), int(lengths_RC[replica, place])
        ordered.append(everything[start : start + length])
        starts[replica] += length
    return ordered
