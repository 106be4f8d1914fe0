"""Which rank holds which experts, and how many rows go where: arithmetic alone.

Experts are logical, as the checkpoint numbers them. A rank holds *physical* experts: usually a
block of the logical ones, but an expert that many tokens choose may have replicas on several ranks
(redundant experts: DeepSeek-V3, arXiv 2412.19437; vLLM's EPLB has the same words).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from mpishard.arithmetic.routing import position_in_expert
from mpishard.communication.mesh import Mesh


@dataclass(frozen=True)
class PhysicalExperts:
    """The physical experts of a layer, rank by rank of the ``ep`` group, those of a rank in
    ascending order.

    Without replicas and placement, physical expert z is logical expert z.

    >>> experts = PhysicalExperts.of([[0, 1], [0, 2]])  # expert 0 has two replicas
    >>> experts.physical_to_logical_Z
    array([0, 1, 0, 2])
    >>> experts.logical_to_physical_EX[0]
    array([0, 2])
    """

    physical_to_logical_Z: np.ndarray
    bounds: tuple[int, ...]  # the first physical expert of each rank, and the end of the last
    replica_count_E: np.ndarray
    logical_to_physical_EX: np.ndarray  # X: the most replicas of any expert

    @classmethod
    def of(cls, held: Sequence[Sequence[int]]) -> PhysicalExperts:
        """The physical experts of ranks that hold these logical ones, each at least once."""
        sizes = [len(experts) for experts in held]
        logical_Z = np.array([number for experts in held for number in sorted(experts)], np.int64)
        count_E = np.bincount(logical_Z)
        physical_EX = np.zeros((len(count_E), count_E.max()), np.int64)
        physical_EX[logical_Z, position_in_expert(logical_Z)] = np.arange(len(logical_Z))
        return cls(logical_Z, (0, *accumulate(sizes)), count_E, physical_EX)

    def physical_ids(self, topk_ids_nA: np.ndarray, keep_nA: np.ndarray, first: int) -> np.ndarray:
        """The physical experts of tokens' experts, (n, A): an expert's rows go to its replicas in
        turn, in the order of the tokens, beginning with replica `first`. Rows that are not kept get
        `dropped`."""
        position_nA = position_in_expert(np.where(keep_nA, topk_ids_nA, -1))
        replica_nA = (position_nA + first) % self.replica_count_E[topk_ids_nA]
        physical_nA = self.logical_to_physical_EX[topk_ids_nA, replica_nA]
        return np.where(keep_nA, physical_nA, self.dropped)

    @property
    def dropped(self) -> int:
        """In the place of a physical expert: the row is dropped."""
        return len(self.physical_to_logical_Z)

    def of_rank(self, rank: int) -> slice:
        """The physical experts of a rank of the ``ep`` group."""
        return slice(self.bounds[rank], self.bounds[rank + 1])


@dataclass(frozen=True)
class DispatchCounts:
    """How many rows each rank sends to each physical expert: `counts`, (ep, etp, Z)."""

    counts: np.ndarray
    physical_experts: PhysicalExperts
    mesh: Mesh

    @property
    def own(self) -> slice:
        """This rank's physical experts."""
        return self.physical_experts.of_rank(self.mesh.ep.rank)

    @property
    def send_counts(self) -> list[int]:
        """The rows that this rank sends to each rank of the ``ep`` group."""
        own_Z = self.counts[self.mesh.ep.rank, self.mesh.etp.rank]
        ranks = range(self.mesh.ep.size)
        return [int(own_Z[self.physical_experts.of_rank(rank)].sum()) for rank in ranks]

    @property
    def recv_counts(self) -> list[int]:
        """The rows that this rank receives from each rank of the ``ep`` group."""
        return self.counts[:, self.mesh.etp.rank, self.own].sum(axis=1).tolist()

    @property
    def etp_counts(self) -> list[int]:
        """The rows that each rank of the ``etp`` group receives."""
        return self.counts[:, :, self.own].sum(axis=(0, 2)).tolist()

    def expert_of_rows(self, etp_rank: int | None = None) -> np.ndarray:
        """The logical expert of each row that `etp_rank` receives, or all of them, in the order in
        which they lie: by etp rank, by sender, by expert."""
        counts = self.counts[:, :, self.own].transpose(1, 0, 2)  # (etp, ep, z)
        if etp_rank is not None:
            counts = counts[etp_rank : etp_rank + 1]
        logical_z = self.physical_experts.physical_to_logical_Z[self.own]
        return np.repeat(np.broadcast_to(logical_z, counts.shape).reshape(-1), counts.reshape(-1))
