"""Data parallelism: whole replicas of the model, each with requests of its own.

Each replica is a block of neighbouring ranks; the ``dp`` group has the ranks that hold the same
weights in different replicas. In the forward pass replicas exchange nothing, with one exception: if
``ep`` is larger than a replica, its replicas exchange tokens in every MoE layer and run in lockstep
(`mpishard.parallel.expert`, `mpishard.engine.generate`). A fixed list of requests is assigned
beforehand, as here; the requests of a batch job are drawn by whichever replica becomes free
(`mpishard.batch.dispatch`).

assign_requests  the number of requests -> the indices of this replica's
gather_results   this replica's results -> all_gather(dp) -> all results, in the order of the
                 requests
"""

from __future__ import annotations

import numpy as np

from mpishard.communication.collectives import all_gather
from mpishard.communication.mesh import Mesh


def assign_requests(count: int, mesh: Mesh) -> range:
    """The indices of the requests, of `count`, that this replica serves: every dp-th, so that a
    list sorted by length is shared fairly."""
    return range(mesh.dp.rank, count, mesh.dp.size)


def gather_results(results: list[bytes], count: int, mesh: Mesh) -> list[bytes]:
    """The results of all `count` requests in their order, on every rank, from each replica's own
    `results` in the order in which they were assigned to it."""
    lengths = np.zeros(count, np.int64)  # X: all requests
    lengths[list(assign_requests(count, mesh))] = [len(result) for result in results]
    mine = np.frombuffer(b"".join(results), np.uint8)
    lengths_RX = all_gather(lengths[np.newaxis], mesh.dp)
    sizes = [int(total) for total in lengths_RX.sum(axis=1)]
    everything = all_gather(mine, mesh.dp, sizes=sizes).tobytes()
    starts = np.cumsum([0, *sizes[:-1]])
    ordered = []
    for index in range(count):
        replica = index % mesh.dp.size
        start, length = int(starts[replica]), int(lengths_RX[replica, index])
        ordered.append(everything[start : start + length])
        starts[replica] += length
    return ordered
