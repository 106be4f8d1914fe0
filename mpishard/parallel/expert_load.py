"""The load of experts and of their ranks: (token, expert) pairs, counted where tokens are routed.

attach  an MoE layer -> the same, which counts its routing
totals  this rank's counts -> all_reduce(moe) -> the pairs of each physical expert ->
        all_gather(world) -> the pairs of each rank; all_reduce(world) -> the pairs of each expert

Counting needs nothing of other ranks, so that no collective is added before the end: a rank's pairs
are those of its physical experts, whoever sent them. The ranks that shard an expert's width all
compute its pairs, each a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mpishard.communication.collectives import all_gather, all_reduce
from mpishard.communication.mesh import Mesh
from mpishard.parallel.expert import MoELayer, Routing, local_tokens
from mpishard.parallel.physical_experts import PhysicalExperts
from mpishard.sequences.step import Step

PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class LayerLoad:
    """(token, expert) pairs of one layer, of all ranks and steps, in one of the `PHASES`."""

    layer: int
    phase: str
    tokens_per_expert: list[int]  # computed, by expert
    tokens_per_rank: list[int]  # computed, by rank of the world
    dropped: int  # for want of capacity, and so not computed


class ExpertLoad:
    """Counts the pairs that this rank's tokens send to every physical expert."""

    def __init__(self) -> None:
        self._physical_experts: dict[int, PhysicalExperts] = {}
        self._experts = 0
        self._rows: dict[int, np.ndarray] = {}  # by layer: (phases, Z + 1), the last dropped

    def attach(self, layer: int, w: MoELayer) -> MoELayer:
        """The MoE layer `w`, whose pairs are now counted."""
        rows = self._rows[layer] = np.zeros((len(PHASES), w.physical_experts.dropped + 1), np.int64)
        self._physical_experts[layer], self._experts = w.physical_experts, len(w.gate.weight)

        def count(routing: Routing, step: Step, mesh: Mesh) -> None:
            is_decode_n = step.is_decode_N[local_tokens(step, mesh)]
            for phase, of_phase in enumerate((~is_decode_n, is_decode_n)):
                physical_b = routing.physical_ids_nA[of_phase].reshape(-1)
                rows[phase] += np.bincount(physical_b, minlength=rows.shape[1])

        return replace(w, hooks=(*w.hooks, count))

    def totals(self, mesh: Mesh) -> list[LayerLoad]:
        """The rows of each layer and phase, on every rank. Collective."""
        if not self._rows:
            return []
        layers = list(self._rows)
        own = np.concatenate([self._rows[layer] for layer in layers], axis=1)
        # The ranks that hold all experts once compute one another's rows, and no others.
        shared = np.split(all_reduce(own, mesh.moe), self._bounds(layers), axis=1)
        mine = np.stack([self._of_this_rank(*of, mesh) for of in zip(layers, shared, strict=True)])
        tokens_per_rank = all_gather(mine[np.newaxis], mesh.world)  # (ranks, layers, phases)
        by_expert = np.stack([self._by_expert(layer) for layer in layers])
        tokens_per_expert = all_reduce(by_expert, mesh.world)  # (layers, phases, E + 1)
        return [
            LayerLoad(
                layer=layer,
                phase=phase,
                tokens_per_expert=tokens_per_expert[place, number, :-1].tolist(),
                tokens_per_rank=tokens_per_rank[:, place, number].tolist(),
                dropped=int(tokens_per_expert[place, number, -1]),
            )
            for place, layer in enumerate(layers)
            for number, phase in enumerate(PHASES)
        ]

    def _bounds(self, layers: list[int]) -> np.ndarray:
        return np.cumsum([self._rows[layer].shape[1] for layer in layers])[:-1]

    def _of_this_rank(self, layer: int, rows: np.ndarray, mesh: Mesh) -> np.ndarray:
        return rows[:, self._physical_experts[layer].of_rank(mesh.ep.rank)].sum(axis=1)

    def _by_expert(self, layer: int) -> np.ndarray:
        """This rank's counts by expert, the dropped ones last: (phases, E + 1)."""
        rows = np.zeros((self._experts + 1, len(PHASES)), np.int64)
        physical_to_logical_Z = np.append(
            self._physical_experts[layer].physical_to_logical_Z, self._experts
        )
        np.add.at(rows, physical_to_logical_Z, self._rows[layer].T)
        return rows.T


def imbalance(rows: Sequence[float]) -> float | None:
    """The most over the mean; None where there is nothing."""
    return max(rows) * len(rows) / sum(rows) if any(rows) else None
