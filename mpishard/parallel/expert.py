"""Expert parallelism: the experts of a mixture divided over ranks, tokens sent to theirs.

The ranks of the ``experts`` group hold all experts of a layer once: ``ep`` blocks of experts, times
``etp`` parts of the width of each. Every rank routes its own tokens, and nothing is dropped, in one
of two forms:

by_all_to_all  x_nD -> all_gather(experts) of the counts -> rows_mD, a row for each of a token's
               experts -> all_to_all(ep) -> all_gather(etp) -> partial_MD, by expert ->
               reduce_scatter(etp) -> all_to_all(ep) -> the owner's weighted sum, y_nD
               (GShard, arXiv 2006.16668; Megatron-LM's all-to-all dispatcher)
by_gathering   x_nD -> all_gather(experts) of all tokens and their routing -> partial_ND, of this
               rank's experts and nothing of others -> reduce_scatter(experts) -> y_nD
               (vLLM's default; NxD Inference and transformers, whose tokens are whole already,
               send the same in an all_reduce)

A shared expert, to which every token goes, is a dense feed-forward network, tensor parallel. The
owner of a token forms its sum by ascending expert, so that in the first form the order of
additions does not depend on ``ep``. A rank without tokens takes part with no rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from mpishard.arithmetic.ops import sigmoid
from mpishard.arithmetic.packed import Step
from mpishard.arithmetic.products import linear
from mpishard.arithmetic.routing import Router
from mpishard.communication.collectives import all_gather, all_to_all, reduce_scatter
from mpishard.communication.mesh import Mesh
from mpishard.description.layout import block
from mpishard.parallel.tensor import FeedForward


@dataclass(frozen=True)
class Mixture:
    """The router and the experts of one layer on this rank."""

    router: np.ndarray  # (E, D)
    router_bias: np.ndarray | None  # (E,)
    selection_bias: np.ndarray | None  # (E,)
    experts: dict[int, FeedForward]  # this rank's, by number
    shared: FeedForward | None  # the expert to which every token goes, tensor parallel
    shared_gate: np.ndarray | None  # (1, D)
    how: Router
    dispatch: Dispatch

    def route(self, x_nD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The experts of each token, ascending, and their weights: ``(ids_nA, weights_nA)``."""
        return self.how.route(linear(x_nD, self.router, self.router_bias), self.selection_bias)

    def partial(self, rows_MD: np.ndarray, expert_M: np.ndarray) -> np.ndarray:
        """What this rank's experts make of rows, each for its expert and all in the order of the
        experts: (M, D). It is a partial sum, over this rank's part of each expert's width."""
        partial_MD = np.empty_like(rows_MD)
        for number, w in self.experts.items():
            mine = slice(*np.searchsorted(expert_M, [number, number + 1]))
            if mine.start < mine.stop:
                partial_MD[mine] = w.partial(rows_MD[mine])
        return partial_MD

    def add_bias(self, rows_mD: np.ndarray, expert_m: np.ndarray) -> None:
        """Add the bias of the last projection, once the sum over the width is complete."""
        for number, w in self.experts.items():
            if w.down_bias is not None:
                rows_mD[expert_m == number] += w.down_bias


# (x_nD of this rank's tokens, w, mesh) -> y_nD
Dispatch = Callable[[np.ndarray, Mixture, Mesh], np.ndarray]


def feed_forward(
    x_nD: np.ndarray, w: Mixture, stream: ModuleType, step: Step, mesh: Mesh
) -> np.ndarray:
    """What the mixture makes of the residual stream's tokens, which are whole on each rank of the
    ``tp`` group or divided over it, as `stream` (tensor or sequence parallelism) has them."""
    y_nD = stream.join(w.dispatch(stream.deal(x_nD, mesh), w, mesh), step, mesh)
    if w.shared is not None:
        shared_nD = stream.feed_forward(x_nD, w.shared, step, mesh)
        if w.shared_gate is not None:
            shared_nD = shared_nD * sigmoid(linear(x_nD, w.shared_gate))
        y_nD = y_nD + shared_nD
    return y_nD


def by_all_to_all(x_nD: np.ndarray, w: Mixture, mesh: Mesh) -> np.ndarray:
    """Each token goes to the ranks of its experts and comes back: (n, D)."""
    ids_nA, weights_nA = w.route(x_nD)
    n, A = ids_nA.shape
    pair_m = np.argsort(ids_nA, axis=None, kind="stable")  # (token, choice) pairs, by expert
    sent_mD = x_nD[pair_m // max(A, 1)]

    counts_E = np.bincount(ids_nA.reshape(-1), minlength=len(w.router))
    counts_RE = all_gather(counts_E[np.newaxis], mesh.experts)
    counts = Counts(counts_RE.reshape(mesh.ep.size, mesh.etp.size, -1), mesh)

    came_mD = all_to_all(sent_mD, mesh.ep, counts.sent, counts.came)
    rows_MD = all_gather(came_mD, mesh.etp, sizes=counts.of_sharers)
    expert_M = counts.experts()
    by_expert_M = np.argsort(expert_M, kind="stable")
    partial_MD = np.empty_like(rows_MD)
    partial_MD[by_expert_M] = w.partial(rows_MD[by_expert_M], expert_M[by_expert_M])
    done_mD = reduce_scatter(partial_MD, mesh.etp, sizes=counts.of_sharers)
    w.add_bias(done_mD, counts.experts(mesh.etp.rank))
    back_mD = all_to_all(done_mD, mesh.ep, counts.came, counts.sent)

    y_mD = np.empty_like(back_mD)
    y_mD[pair_m] = back_mD
    return _weighted(y_mD.reshape(n, A, x_nD.shape[1]), weights_nA)


def by_gathering(x_nD: np.ndarray, w: Mixture, mesh: Mesh) -> np.ndarray:
    """Every rank has all tokens, and adds what its experts make of those that chose them: (n,
    D)."""
    ids_nA, weights_nA = w.route(x_nD)
    sizes = all_gather(np.array([len(x_nD)]), mesh.experts).tolist()
    x_ND = all_gather(x_nD, mesh.experts, sizes=sizes)
    ids_NA = all_gather(ids_nA, mesh.experts, sizes=sizes)
    weights_NA = all_gather(weights_nA, mesh.experts, sizes=sizes)
    A = ids_NA.shape[1]

    mine_NA = np.isin(ids_NA, list(w.experts))
    pair_M = np.flatnonzero(mine_NA)
    pair_M = pair_M[np.argsort(ids_NA.reshape(-1)[pair_M], kind="stable")]
    expert_M = ids_NA.reshape(-1)[pair_M]
    rows_MD = w.partial(x_ND[pair_M // max(A, 1)], expert_M)
    if mesh.etp.rank == 0:  # of the ranks that divide an expert's width, one adds its bias
        w.add_bias(rows_MD, expert_M)
    partial_NAD = np.zeros((*ids_NA.shape, x_nD.shape[1]), x_nD.dtype)
    partial_NAD.reshape(-1, x_nD.shape[1])[pair_M] = rows_MD
    return reduce_scatter(_weighted(partial_NAD, weights_NA), mesh.experts, sizes=sizes)


DISPATCHES: dict[str, Dispatch] = {"all-to-all": by_all_to_all, "gather": by_gathering}


@dataclass(frozen=True)
class Counts:
    """How many rows go where: `counts` are those for each expert, (ep, etp, E), of each rank."""

    counts: np.ndarray
    mesh: Mesh

    @property
    def own(self) -> slice:
        """The experts of this rank's block."""
        return block(self.counts.shape[2], self.mesh.ep.size, self.mesh.ep.rank)

    @property
    def sent(self) -> list[int]:
        """The rows that this rank sends to each block of experts."""
        mine_E = self.counts[self.mesh.ep.rank, self.mesh.etp.rank]
        blocks = [block(len(mine_E), self.mesh.ep.size, rank) for rank in range(self.mesh.ep.size)]
        return [int(mine_E[experts].sum()) for experts in blocks]

    @property
    def came(self) -> list[int]:
        """The rows that come to this rank from each of the ``ep`` group."""
        return self.counts[:, self.mesh.etp.rank, self.own].sum(axis=1).tolist()

    @property
    def of_sharers(self) -> list[int]:
        """The rows that come to each of the ranks that divide the width of the same experts."""
        return self.counts[:, :, self.own].sum(axis=(0, 2)).tolist()

    def experts(self, sharer: int | None = None) -> np.ndarray:
        """The expert of each row that comes to `sharer`, or to all of them, in the order in which
        they lie: by sharer, by sender, by expert."""
        counts = self.counts[:, :, self.own].transpose(1, 0, 2)  # (etp, ep, e)
        if sharer is not None:
            counts = counts[sharer : sharer + 1]
        numbers = np.arange(self.own.start, self.own.stop)
        return np.repeat(np.broadcast_to(numbers, counts.shape).reshape(-1), counts.reshape(-1))


def _weighted(y_nAD: np.ndarray, weights_nA: np.ndarray) -> np.ndarray:
    """The sum over a token's experts, one after the other: (n, D)."""
    y_nD = np.zeros((len(y_nAD), y_nAD.shape[2]), y_nAD.dtype)
    for choice in range(y_nAD.shape[1]):
        y_nD += y_nAD[:, choice] * weights_nA[:, choice, np.newaxis]
    return y_nD
