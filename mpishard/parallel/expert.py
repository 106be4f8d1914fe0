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

Nothing is dropped unless a `ExpertCapacity` is asked for. It counts the tokens that one rank routes
in one step, the groups of GShard, as Megatron-LM and DeepSpeed do too: so no rank need know of
another's, and what is dropped depends on the layout, on the batch and on the chunks of a prompt. A
dropped row goes to `PhysicalExperts.dropped`, is not sent and adds nothing, the other weights of
its token staying what they are: the residual stream carries the token on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import ModuleType
from typing import NamedTuple

import numpy as np

from mpishard.arithmetic.gemm import linear
from mpishard.arithmetic.ops import sigmoid
from mpishard.arithmetic.routing import ExpertCapacity, Router, position_in_expert
from mpishard.communication.collectives import all_gather, all_to_all, reduce_scatter
from mpishard.communication.mesh import Mesh
from mpishard.config.layout import block
from mpishard.parallel.tensor import FeedForward
from mpishard.sequences.step import Step


@dataclass(frozen=True)
class PhysicalExperts:
    """Where the experts of a layer are: slot by slot, block by block of the ``ep`` group's ranks,
    those of a block ascending. An expert with copies has several slots; where none has and they are
    dealt in blocks, a slot's number is its expert's."""

    physical_to_logical_Z: np.ndarray  # the expert in each slot
    bounds: tuple[int, ...]  # the first slot of each block, and the end of the last
    replica_count_E: np.ndarray
    logical_to_physical_EC: np.ndarray  # of each copy; C is the most copies of any

    @classmethod
    def of(cls, held: Sequence[Sequence[int]]) -> PhysicalExperts:
        """The slots of ranks that have these experts, each expert at least once."""
        sizes = [len(experts) for experts in held]
        physical_to_logical_Z = np.array(
            [number for experts in held for number in sorted(experts)], np.int64
        )
        replica_count_E = np.bincount(physical_to_logical_Z)
        logical_to_physical_EC = np.zeros((len(replica_count_E), replica_count_E.max()), np.int64)
        logical_to_physical_EC[physical_to_logical_Z, position_in_expert(physical_to_logical_Z)] = (
            np.arange(len(physical_to_logical_Z))
        )
        return cls(
            physical_to_logical_Z, (0, *accumulate(sizes)), replica_count_E, logical_to_physical_EC
        )

    def physical_ids(self, topk_ids_nA: np.ndarray, keep_nA: np.ndarray, first: int) -> np.ndarray:
        """The slots of tokens' experts, (n, A): an expert's rows go round its copies in the order
        of the tokens, beginning with the `first`; those that are not kept go nowhere."""
        turn_nA = (
            position_in_expert(np.where(keep_nA, topk_ids_nA, -1)) + first
        ) % self.replica_count_E[topk_ids_nA]
        return np.where(keep_nA, self.logical_to_physical_EC[topk_ids_nA, turn_nA], self.dropped)

    @property
    def dropped(self) -> int:
        """In the place of a slot, that a row is dropped."""
        return len(self.physical_to_logical_Z)

    def of_rank(self, rank: int) -> slice:
        """The slots of a rank of the ``ep`` group."""
        return slice(self.bounds[rank], self.bounds[rank + 1])


class Routing(NamedTuple):
    """What becomes of this rank's tokens: their experts, ascending, what these weigh, and the slots
    in which they are, or nowhere."""

    topk_ids_nA: np.ndarray
    topk_weights_nA: np.ndarray
    physical_ids_nA: np.ndarray


# Called with the routes of each step in a layer.
RoutingHook = Callable[[Routing, Step, Mesh], None]


def route_by_router(
    x_nD: np.ndarray, w: MoELayer, step: Step, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """The experts of each token, ascending, and their weights: ``(topk_ids_nA,
    topk_weights_nA)``."""
    return w.router_fn.route(linear(x_nD, w.router, w.router_bias), w.e_score_correction_bias)


# Who decides: the router, unless others' decisions are replayed.
RoutingFn = Callable[[np.ndarray, "MoELayer", Step, Mesh], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class MoELayer:
    """The router and the experts of one layer on this rank."""

    router: np.ndarray  # (E, D)
    router_bias: np.ndarray | None  # (E,)
    e_score_correction_bias: np.ndarray | None  # (E,)
    experts: dict[int, FeedForward]  # this rank's, by number
    shared: FeedForward | None  # the expert to which every token goes, tensor parallel
    shared_gate: np.ndarray | None  # (1, D)
    router_fn: Router
    physical_experts: PhysicalExperts
    capacity: ExpertCapacity | None
    dispatch: Dispatch
    route_fn: RoutingFn = route_by_router
    hooks: tuple[RoutingHook, ...] = ()

    def route(self, x_nD: np.ndarray, step: Step, mesh: Mesh) -> Routing:
        """The slots that this rank's tokens go to, rows above the capacity nowhere. Ranks begin
        with different copies, so that those of a few tokens each do not all choose the same."""
        topk_ids_nA, topk_weights_nA = self.route_fn(x_nD, self, step, mesh)
        keep_nA = np.ones(topk_ids_nA.shape, bool)
        if self.capacity is not None:
            keep_nA = self.capacity.keep_mask(topk_ids_nA, topk_weights_nA, len(self.router))
        return Routing(
            topk_ids_nA,
            topk_weights_nA,
            self.physical_experts.physical_ids(topk_ids_nA, keep_nA, mesh.moe.rank),
        )

    def partial(self, rows_MD: np.ndarray, expert_M: np.ndarray) -> np.ndarray:
        """What this rank's experts make of rows, each for its expert, those of an expert together:
        (M, D). It is a partial sum, over this rank's part of each expert's width."""
        partial_MD = np.empty_like(rows_MD)
        for number, w in self.experts.items():
            mine = _rows_of(expert_M, number)
            if len(expert_M[mine]):
                partial_MD[mine] = w.partial(rows_MD[mine])
        return partial_MD

    def add_bias(self, rows_mD: np.ndarray, expert_m: np.ndarray) -> None:
        """Add the bias of the last projection, once the sum over the width is complete."""
        for number, w in self.experts.items():
            if w.down_bias is not None:
                rows_mD[expert_m == number] += w.down_bias


# (x_nD of this rank's tokens, where they go, w, mesh) -> y_nD
Dispatch = Callable[[np.ndarray, Routing, MoELayer, Mesh], np.ndarray]


def feed_forward(
    x_nD: np.ndarray, w: MoELayer, stream: ModuleType, step: Step, mesh: Mesh
) -> np.ndarray:
    """What the mixture makes of the residual stream's tokens, which are whole on each rank of the
    ``tp`` group or divided over it, as `stream` (tensor or sequence parallelism) has them."""
    mine_nD = stream.scatter_tokens(x_nD, mesh)
    routing = w.route(mine_nD, step, mesh)
    for hook in w.hooks:
        hook(routing, step, mesh)
    y_nD = stream.gather_tokens(w.dispatch(mine_nD, routing, w, mesh), step, mesh)
    if w.shared is not None:
        shared_nD = stream.feed_forward(x_nD, w.shared, step, mesh)
        if w.shared_gate is not None:
            shared_nD = shared_nD * sigmoid(linear(x_nD, w.shared_gate))
        y_nD = y_nD + shared_nD
    return y_nD


def local_tokens(step: Step, mesh: Mesh) -> slice:
    """The places on the packed axis of the tokens that this rank routes: its block of those that
    the ``tp`` group has, whichever way the residual stream is divided."""
    return block(len(step.ids_N), mesh.tp.size, mesh.tp.rank)


def dispatch_all_to_all(x_nD: np.ndarray, routing: Routing, w: MoELayer, mesh: Mesh) -> np.ndarray:
    """Each token goes to the ranks of its experts and comes back: (n, D)."""
    _, topk_weights_nA, physical_ids_nA = routing
    n, A = physical_ids_nA.shape
    counts_Z = np.bincount(physical_ids_nA.reshape(-1), minlength=w.physical_experts.dropped)[
        : w.physical_experts.dropped
    ]
    pair_m = np.argsort(physical_ids_nA, axis=None, kind="stable")  # (token, choice) pairs, by slot
    pair_m = pair_m[: counts_Z.sum()]  # those that go nowhere are the last
    dispatched_mD = x_nD[pair_m // max(A, 1)]

    counts_RZ = all_gather(counts_Z[np.newaxis], mesh.moe)
    counts = Counts(counts_RZ.reshape(mesh.ep.size, mesh.etp.size, -1), w.physical_experts, mesh)

    received_mD = all_to_all(dispatched_mD, mesh.ep, counts.send_counts, counts.recv_counts)
    rows_MD = all_gather(received_mD, mesh.etp, sizes=counts.etp_counts)
    partial_MD = w.partial(rows_MD, counts.experts())
    computed_mD = reduce_scatter(partial_MD, mesh.etp, sizes=counts.etp_counts)
    w.add_bias(computed_mD, counts.experts(mesh.etp.rank))
    combined_mD = all_to_all(computed_mD, mesh.ep, counts.recv_counts, counts.send_counts)

    dropped = len(pair_m) < physical_ids_nA.size
    y_nAD = (np.zeros if dropped else np.empty)((n, A, x_nD.shape[1]), x_nD.dtype)
    y_nAD.reshape(-1, x_nD.shape[1])[pair_m] = combined_mD
    return combine(y_nAD, topk_weights_nA)


def dispatch_all_gather(x_nD: np.ndarray, routing: Routing, w: MoELayer, mesh: Mesh) -> np.ndarray:
    """Every rank has all tokens, and adds what its experts make of those that chose them: (n,
    D)."""
    _, topk_weights_nA, physical_ids_nA = routing
    sizes = all_gather(np.array([len(x_nD)]), mesh.moe).tolist()
    x_ND = all_gather(x_nD, mesh.moe, sizes=sizes)
    physical_ids_NA = all_gather(physical_ids_nA, mesh.moe, sizes=sizes)
    topk_weights_NA = all_gather(topk_weights_nA, mesh.moe, sizes=sizes)
    A = physical_ids_NA.shape[1]

    own = w.physical_experts.of_rank(mesh.ep.rank)
    pair_M = np.flatnonzero((own.start <= physical_ids_NA) & (physical_ids_NA < own.stop))
    expert_M = w.physical_experts.physical_to_logical_Z[physical_ids_NA.reshape(-1)[pair_M]]
    rows_MD = w.partial(x_ND[pair_M // max(A, 1)], expert_M)
    if mesh.etp.rank == 0:  # of the ranks that divide an expert's width, one adds its bias
        w.add_bias(rows_MD, expert_M)
    partial_NAD = np.zeros((*physical_ids_NA.shape, x_nD.shape[1]), x_nD.dtype)
    partial_NAD.reshape(-1, x_nD.shape[1])[pair_M] = rows_MD
    return reduce_scatter(combine(partial_NAD, topk_weights_NA), mesh.moe, sizes=sizes)


TOKEN_DISPATCHERS: dict[str, Dispatch] = {
    "all-to-all": dispatch_all_to_all,
    "all-gather": dispatch_all_gather,
}


@dataclass(frozen=True)
class Counts:
    """How many rows go where: `counts` are those for each slot, (ep, etp, Z), of each rank."""

    counts: np.ndarray
    physical_experts: PhysicalExperts
    mesh: Mesh

    @property
    def own(self) -> slice:
        """The slots of this rank's block."""
        return self.physical_experts.of_rank(self.mesh.ep.rank)

    @property
    def send_counts(self) -> list[int]:
        """The rows that this rank sends to each block of slots."""
        mine_Z = self.counts[self.mesh.ep.rank, self.mesh.etp.rank]
        return [
            int(mine_Z[self.physical_experts.of_rank(rank)].sum())
            for rank in range(self.mesh.ep.size)
        ]

    @property
    def recv_counts(self) -> list[int]:
        """The rows that come to this rank from each of the ``ep`` group."""
        return self.counts[:, self.mesh.etp.rank, self.own].sum(axis=1).tolist()

    @property
    def etp_counts(self) -> list[int]:
        """The rows that come to each of the ranks that divide the width of the same experts."""
        return self.counts[:, :, self.own].sum(axis=(0, 2)).tolist()

    def experts(self, etp_rank: int | None = None) -> np.ndarray:
        """The expert of each row that comes to `etp_rank`, or to all of them, in the order in which
        they lie: by sharer, by sender, by expert."""
        counts = self.counts[:, :, self.own].transpose(1, 0, 2)  # (etp, ep, z)
        if etp_rank is not None:
            counts = counts[etp_rank : etp_rank + 1]
        numbers_z = self.physical_experts.physical_to_logical_Z[self.own]
        return np.repeat(np.broadcast_to(numbers_z, counts.shape).reshape(-1), counts.reshape(-1))


def _rows_of(expert_M: np.ndarray, number: int) -> np.ndarray | slice:
    """Where the rows of an expert are: a slice, which copies nothing, if they follow each other."""
    mine = np.flatnonzero(expert_M == number)
    if len(mine) and mine[-1] - mine[0] == len(mine) - 1:
        return slice(mine[0], mine[-1] + 1)
    return mine


def combine(y_nAD: np.ndarray, topk_weights_nA: np.ndarray) -> np.ndarray:
    """The sum over a token's experts, one after the other: (n, D)."""
    y_nD = np.zeros((len(y_nAD), y_nAD.shape[2]), y_nAD.dtype)
    for choice in range(y_nAD.shape[1]):
        y_nD += y_nAD[:, choice] * topk_weights_nA[:, choice, np.newaxis]
    return y_nD
