"""The load of experts and of the ranks that have them: rows, counted where tokens are routed.

watching  a layer's mixture -> the same, which counts its routes
totals    this rank's counts -> all_reduce(experts) -> the rows of each slot -> all_gather(world) ->
          the rows of each rank; all_reduce(world) -> the rows of each expert

Counting needs nothing of other ranks, so that no collective is added before the end: a rank's rows
are those of its slots, whoever sent them. The ranks that divide an expert's width all compute its
rows, each a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mpishard.arithmetic.packed import Step
from mpishard.communication.collectives import all_gather, all_reduce
from mpishard.communication.mesh import Mesh
from mpishard.parallel.expert import Mixture, Routes, Slots, routed_here

PHASES = ("prompt", "generation")


@dataclass(frozen=True)
class Rows:
    """Rows of one layer, of all ranks and steps, in one of the `PHASES` of their tokens."""

    layer: int
    phase: str
    of_experts: list[int]  # computed, by expert
    of_ranks: list[int]  # computed, by rank of the world
    dropped: int  # for want of capacity, and so not computed


class Load:
    """Counts the rows that this rank's tokens give to every slot."""

    def __init__(self) -> None:
        self._slots: dict[int, Slots] = {}
        self._experts = 0
        self._rows: dict[int, np.ndarray] = {}  # by layer: (phases, Z + 1), the last dropped

    def watching(self, layer: int, w: Mixture) -> Mixture:
        """The mixture `w` of `layer`, which is now counted."""
        rows = self._rows[layer] = np.zeros((len(PHASES), w.slots.nowhere + 1), np.int64)
        self._slots[layer], self._experts = w.slots, len(w.router)

        def count(routes: Routes, step: Step, mesh: Mesh) -> None:
            generated_n = step.generated_N[routed_here(step, mesh)]
            for phase, of_phase in enumerate((~generated_n, generated_n)):
                slots_m = routes.slots_nA[of_phase].reshape(-1)
                rows[phase] += np.bincount(slots_m, minlength=rows.shape[1])

        return replace(w, watchers=(*w.watchers, count))

    def totals(self, mesh: Mesh) -> list[Rows]:
        """The rows of each layer and phase, on every rank. Collective."""
        if not self._rows:
            return []
        layers = list(self._rows)
        own = np.concatenate([self._rows[layer] for layer in layers], axis=1)
        # The ranks that hold all experts once compute one another's rows, and no others.
        shared = np.split(all_reduce(own, mesh.experts), self._bounds(layers), axis=1)
        mine = np.stack([self._of_this_rank(*of, mesh) for of in zip(layers, shared, strict=True)])
        of_ranks = all_gather(mine[np.newaxis], mesh.world)  # (ranks, layers, phases)
        by_expert = np.stack([self._by_expert(layer) for layer in layers])
        of_experts = all_reduce(by_expert, mesh.world)  # (layers, phases, E + 1)
        return [
            Rows(
                layer=layer,
                phase=phase,
                of_experts=of_experts[place, number, :-1].tolist(),
                of_ranks=of_ranks[:, place, number].tolist(),
                dropped=int(of_experts[place, number, -1]),
            )
            for place, layer in enumerate(layers)
            for number, phase in enumerate(PHASES)
        ]

    def _bounds(self, layers: list[int]) -> np.ndarray:
        return np.cumsum([self._rows[layer].shape[1] for layer in layers])[:-1]

    def _of_this_rank(self, layer: int, rows: np.ndarray, mesh: Mesh) -> np.ndarray:
        return rows[:, self._slots[layer].of_rank(mesh.ep.rank)].sum(axis=1)

    def _by_expert(self, layer: int) -> np.ndarray:
        """This rank's counts by expert, the dropped ones last: (phases, E + 1)."""
        rows = np.zeros((self._experts + 1, len(PHASES)), np.int64)
        expert_Z = np.append(self._slots[layer].expert_Z, self._experts)
        np.add.at(rows, expert_Z, self._rows[layer].T)
        return rows.T


def imbalance(rows: Sequence[float]) -> float | None:
    """The most over the mean; None where there is nothing."""
    return max(rows) * len(rows) / sum(rows) if any(rows) else None
