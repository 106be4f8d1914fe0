"""Expert parallelism: the experts of a mixture divided over ranks, tokens sent to theirs.

The ranks of the ``experts`` group hold all experts of a layer: ``ep`` blocks of slots with an
expert in each, times ``etp`` parts of the width of each. An expert is in one slot or, where many
tokens choose it, in several (redundant experts: DeepSeek-V3, arXiv 2412.19437). Every rank routes
its own tokens, each to one slot of each of its experts, in one of two forms:

by_all_to_all  x_nD -> all_gather(experts) of the counts -> rows_mD, a row for each of a token's
               slots -> all_to_all(ep) -> all_gather(etp) -> partial_MD, by expert ->
               reduce_scatter(etp) -> all_to_all(ep) -> the owner's weighted sum, y_nD
               (GShard, arXiv 2006.16668; Megatron-LM's all-to-all dispatcher)
by_gathering   x_nD -> all_gather(experts) of all tokens and their routing -> partial_ND, of this
               rank's experts and nothing of others -> reduce_scatter(experts) -> y_nD
               (vLLM's default; NxD Inference and transformers, whose tokens are whole already,
               send the same in an all_reduce)

A shared expert, to which every token goes, is a dense feed-forward network, tensor parallel. The
owner of a token forms its sum by ascending expert, so that in the first form the order of
additions does not depend on ``ep``. A rank without tokens takes part with no rows.

Nothing is dropped unless a `Capacity` is asked for. It counts the tokens that one rank routes in
one step, the groups of GShard, as Megatron-LM and DeepSpeed do too: so no rank need know of
another's, and what is dropped depends on the layout, on the batch and on the chunks of a prompt. A
dropped row goes to `Slots.nowhere`, is not sent and adds nothing, the other weights of its token
staying what they are: the residual stream carries the token on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import ModuleType
from typing import NamedTuple

import numpy as np

from mpishard.arithmetic.ops import sigmoid
from mpishard.arithmetic.packed import Step
from mpishard.arithmetic.products import linear
from mpishard.arithmetic.routing import Capacity, Router, turns
from mpishard.communication.collectives import all_gather, all_to_all, reduce_scatter
from mpishard.communication.mesh import Mesh
from mpishard.description.layout import block
from mpishard.parallel.tensor import FeedForward


@dataclass(frozen=True)
class Slots:
    """Where the experts of a layer are: slot by slot, block by block of the ``ep`` group's ranks,
    those of a block ascending. An expert with copies has several slots; where none has and they are
    dealt in blocks, a slot's number is its expert's."""

    expert_Z: np.ndarray  # the expert in each slot
    bounds: tuple[int, ...]  # the first slot of each block, and the end of the last
    copies_E: np.ndarray
    slot_EC: np.ndarray  # of each copy; C is the most copies of any

    @classmethod
    def of(cls, held: Sequence[Sequence[int]]) -> Slots:
        """The slots of ranks that have these experts, each expert at least once."""
        sizes = [len(experts) for experts in held]
        expert_Z = np.array([number for experts in held for number in sorted(experts)], np.int64)
        copies_E = np.bincount(expert_Z)
        slot_EC = np.zeros((len(copies_E), copies_E.max()), np.int64)
        slot_EC[expert_Z, turns(expert_Z)] = np.arange(len(expert_Z))
        return cls(expert_Z, (0, *accumulate(sizes)), copies_E, slot_EC)

    def place(self, ids_nA: np.ndarray, kept_nA: np.ndarray, first: int) -> np.ndarray:
        """The slots of tokens' experts, (n, A): an expert's rows go round its copies in the order
        of the tokens, beginning with the `first`; those that are not kept go nowhere."""
        turn_nA = (turns(np.where(kept_nA, ids_nA, -1)) + first) % self.copies_E[ids_nA]
        return np.where(kept_nA, self.slot_EC[ids_nA, turn_nA], self.nowhere)

    @property
    def nowhere(self) -> int:
        """In the place of a slot, that a row is dropped."""
        return len(self.expert_Z)

    def of_rank(self, rank: int) -> slice:
        """The slots of a rank of the ``ep`` group."""
        return slice(self.bounds[rank], self.bounds[rank + 1])


class Routes(NamedTuple):
    """What becomes of this rank's tokens: their experts, ascending, what these weigh, and the slots
    in which they are, or nowhere."""

    ids_nA: np.ndarray
    weights_nA: np.ndarray
    slots_nA: np.ndarray


# Called with the routes of each step in a layer.
Watch = Callable[[Routes, Step, Mesh], None]


def by_router(
    x_nD: np.ndarray, w: Mixture, step: Step, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """The experts of each token, ascending, and their weights: ``(ids_nA, weights_nA)``."""
    return w.how.route(linear(x_nD, w.router, w.router_bias), w.selection_bias)


# Who decides: the router, unless others' decisions are replayed.
Choose = Callable[[np.ndarray, "Mixture", Step, Mesh], tuple[np.ndarray, np.ndarray]]


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
    slots: Slots
    capacity: Capacity | None
    dispatch: Dispatch
    choose: Choose = by_router
    watchers: tuple[Watch, ...] = ()

    def route(self, x_nD: np.ndarray, step: Step, mesh: Mesh) -> Routes:
        """The slots that this rank's tokens go to, rows above the capacity nowhere. Ranks begin
        with different copies, so that those of a few tokens each do not all choose the same."""
        ids_nA, weights_nA = self.choose(x_nD, self, step, mesh)
        kept_nA = np.ones(ids_nA.shape, bool)
        if self.capacity is not None:
            kept_nA = self.capacity.kept(ids_nA, weights_nA, len(self.router))
        return Routes(ids_nA, weights_nA, self.slots.place(ids_nA, kept_nA, mesh.experts.rank))

    def partial(self, rows_MD: np.ndarray, expert_M: np.ndarray) -> np.ndarray:
        """What this rank's experts make of rows, each for its expert, those of an expert together:
        (M, D). It is a partial sum, over this rank's part of each expert's width."""
        partial_MD = np.empty_like(rows_MD)
        for number, w in self.experts.items():
            mine = _places(expert_M, number)
            if len(expert_M[mine]):
                partial_MD[mine] = w.partial(rows_MD[mine])
        return partial_MD

    def add_bias(self, rows_mD: np.ndarray, expert_m: np.ndarray) -> None:
        """Add the bias of the last projection, once the sum over the width is complete."""
        for number, w in self.experts.items():
            if w.down_bias is not None:
                rows_mD[expert_m == number] += w.down_bias


# (x_nD of this rank's tokens, where they go, w, mesh) -> y_nD
Dispatch = Callable[[np.ndarray, Routes, Mixture, Mesh], np.ndarray]


def feed_forward(
    x_nD: np.ndarray, w: Mixture, stream: ModuleType, step: Step, mesh: Mesh
) -> np.ndarray:
    """What the mixture makes of the residual stream's tokens, which are whole on each rank of the
    ``tp`` group or divided over it, as `stream` (tensor or sequence parallelism) has them."""
    mine_nD = stream.deal(x_nD, mesh)
    routes = w.route(mine_nD, step, mesh)
    for watch in w.watchers:
        watch(routes, step, mesh)
    y_nD = stream.join(w.dispatch(mine_nD, routes, w, mesh), step, mesh)
    if w.shared is not None:
        shared_nD = stream.feed_forward(x_nD, w.shared, step, mesh)
        if w.shared_gate is not None:
            shared_nD = shared_nD * sigmoid(linear(x_nD, w.shared_gate))
        y_nD = y_nD + shared_nD
    return y_nD


def routed_here(step: Step, mesh: Mesh) -> slice:
    """The places on the packed axis of the tokens that this rank routes: its block of those that
    the ``tp`` group has, whichever way the residual stream is divided."""
    return block(len(step.ids_N), mesh.tp.size, mesh.tp.rank)


def by_all_to_all(x_nD: np.ndarray, routes: Routes, w: Mixture, mesh: Mesh) -> np.ndarray:
    """Each token goes to the ranks of its experts and comes back: (n, D)."""
    _, weights_nA, slots_nA = routes
    n, A = slots_nA.shape
    counts_Z = np.bincount(slots_nA.reshape(-1), minlength=w.slots.nowhere)[: w.slots.nowhere]
    pair_m = np.argsort(slots_nA, axis=None, kind="stable")  # (token, choice) pairs, by slot
    pair_m = pair_m[: counts_Z.sum()]  # those that go nowhere are the last
    sent_mD = x_nD[pair_m // max(A, 1)]

    counts_RZ = all_gather(counts_Z[np.newaxis], mesh.experts)
    counts = Counts(counts_RZ.reshape(mesh.ep.size, mesh.etp.size, -1), w.slots, mesh)

    came_mD = all_to_all(sent_mD, mesh.ep, counts.sent, counts.came)
    rows_MD = all_gather(came_mD, mesh.etp, sizes=counts.of_sharers)
    partial_MD = w.partial(rows_MD, counts.experts())
    done_mD = reduce_scatter(partial_MD, mesh.etp, sizes=counts.of_sharers)
    w.add_bias(done_mD, counts.experts(mesh.etp.rank))
    back_mD = all_to_all(done_mD, mesh.ep, counts.came, counts.sent)

    dropped = len(pair_m) < slots_nA.size
    y_nAD = (np.zeros if dropped else np.empty)((n, A, x_nD.shape[1]), x_nD.dtype)
    y_nAD.reshape(-1, x_nD.shape[1])[pair_m] = back_mD
    return _weighted(y_nAD, weights_nA)


def by_gathering(x_nD: np.ndarray, routes: Routes, w: Mixture, mesh: Mesh) -> np.ndarray:
    """Every rank has all tokens, and adds what its experts make of those that chose them: (n,
    D)."""
    _, weights_nA, slots_nA = routes
    sizes = all_gather(np.array([len(x_nD)]), mesh.experts).tolist()
    x_ND = all_gather(x_nD, mesh.experts, sizes=sizes)
    slots_NA = all_gather(slots_nA, mesh.experts, sizes=sizes)
    weights_NA = all_gather(weights_nA, mesh.experts, sizes=sizes)
    A = slots_NA.shape[1]

    own = w.slots.of_rank(mesh.ep.rank)
    pair_M = np.flatnonzero((own.start <= slots_NA) & (slots_NA < own.stop))
    expert_M = w.slots.expert_Z[slots_NA.reshape(-1)[pair_M]]
    rows_MD = w.partial(x_ND[pair_M // max(A, 1)], expert_M)
    if mesh.etp.rank == 0:  # of the ranks that divide an expert's width, one adds its bias
        w.add_bias(rows_MD, expert_M)
    partial_NAD = np.zeros((*slots_NA.shape, x_nD.shape[1]), x_nD.dtype)
    partial_NAD.reshape(-1, x_nD.shape[1])[pair_M] = rows_MD
    return reduce_scatter(_weighted(partial_NAD, weights_NA), mesh.experts, sizes=sizes)


DISPATCHES: dict[str, Dispatch] = {"all-to-all": by_all_to_all, "gather": by_gathering}


@dataclass(frozen=True)
class Counts:
    """How many rows go where: `counts` are those for each slot, (ep, etp, Z), of each rank."""

    counts: np.ndarray
    slots: Slots
    mesh: Mesh

    @property
    def own(self) -> slice:
        """The slots of this rank's block."""
        return self.slots.of_rank(self.mesh.ep.rank)

    @property
    def sent(self) -> list[int]:
        """The rows that this rank sends to each block of slots."""
        mine_Z = self.counts[self.mesh.ep.rank, self.mesh.etp.rank]
        return [int(mine_Z[self.slots.of_rank(rank)].sum()) for rank in range(self.mesh.ep.size)]

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
        counts = self.counts[:, :, self.own].transpose(1, 0, 2)  # (etp, ep, z)
        if sharer is not None:
            counts = counts[sharer : sharer + 1]
        numbers_z = self.slots.expert_Z[self.own]
        return np.repeat(np.broadcast_to(numbers_z, counts.shape).reshape(-1), counts.reshape(-1))


def _places(expert_M: np.ndarray, number: int) -> np.ndarray | slice:
    """Where the rows of an expert are: a slice, which copies nothing, if they follow each other."""
    mine = np.flatnonzero(expert_M == number)
    if len(mine) and mine[-1] - mine[0] == len(mine) - 1:
        return slice(mine[0], mine[-1] + 1)
    return mine


def _weighted(y_nAD: np.ndarray, weights_nA: np.ndarray) -> np.ndarray:
    """The sum over a token's experts, one after the other: (n, D)."""
    y_nD = np.zeros((len(y_nAD), y_nAD.shape[2]), y_nAD.dtype)
    for choice in range(y_nAD.shape[1]):
        y_nD += y_nAD[:, choice] * weights_nA[:, choice, np.newaxis]
    return y_nD
