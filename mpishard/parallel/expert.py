"""Expert parallelism: the experts of an MoE layer sharded over ranks, tokens sent to theirs.

The ranks of the ``moe`` group hold all experts of a layer: ``ep`` ranks shard the experts, and
``etp`` ranks the width of each. Every rank routes its own n tokens, each to A experts, in one of
two forms:

dispatch_all_to_all  x_nD -> all_gather(moe) of the counts -> rows_bD, a row for each (token,
                     expert) pair -> all_to_all(ep) -> all_gather(etp) -> partial_BD, by expert ->
                     reduce_scatter(etp) -> all_to_all(ep) -> combine -> y_nD
                     (GShard, arXiv 2006.16668; Megatron-LM's alltoall token dispatcher)
dispatch_all_gather  x_nD -> all_gather(moe) of all tokens and their routing -> partial_ND, of this
                     rank's experts and nothing of others -> reduce_scatter(moe) -> y_nD
                     (Megatron-LM's allgather dispatcher, vLLM's default; NxD Inference and
                     transformers, whose tokens are whole already, send the same in an all_reduce)

A shared expert, which every token passes, is a dense feed-forward network, tensor parallel. The
owner of a token adds its experts' outputs up in ascending order of the experts, so that in the
first form the order of additions does not depend on ``ep``. A rank without tokens takes part with
no rows.

Nothing is dropped unless the model has a `SequenceCapacity` or an `ExpertCapacity` is asked for.
The latter counts the tokens that one rank routes in one step (GShard's groups), as Megatron-LM and
DeepSpeed do: no rank need know of another's, and what is dropped depends on the layout, on the
batch and on the chunks of a prompt. A dropped row is not sent and adds nothing. The other weights
of its token stay what they are: the residual stream carries the token on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mpishard.arithmetic.linear import Linear
from mpishard.arithmetic.ops import sigmoid
from mpishard.arithmetic.routing import ExpertCapacity, Router
from mpishard.communication.collectives import all_gather, all_to_all, reduce_scatter
from mpishard.communication.mesh import Mesh
from mpishard.config.layout import block
from mpishard.parallel import sequence, tensor
from mpishard.parallel.physical_experts import DispatchCounts, PhysicalExperts
from mpishard.parallel.sequence_capacity import SequenceCapacity, keep_mask
from mpishard.parallel.tensor import FeedForward
from mpishard.sequences.step import Step


class Routing(NamedTuple):
    """Where this rank's tokens go: their experts in ascending order, the weights of these, and the
    physical experts."""

    topk_ids_nA: np.ndarray
    topk_weights_nA: np.ndarray
    physical_ids_nA: np.ndarray


# Called with the routing of each step in a layer.
RoutingHook = Callable[[Routing, Step, Mesh], None]


@dataclass(frozen=True)
class MoELayer:
    """The router and the experts of one layer on this rank."""

    gate: Linear  # (E, D), the router's weight
    e_score_correction_bias: np.ndarray | None  # (E,)
    router: Router
    scale_inputs: bool  # the weights multiply what goes into experts, not what comes out
    experts: dict[int, FeedForward]  # this rank's, by logical number
    shared_expert: FeedForward | None  # tensor parallel
    shared_expert_gate: Linear | None  # (1, D)
    physical_experts: PhysicalExperts
    capacity: ExpertCapacity | None
    sequence_capacity: SequenceCapacity | None
    dispatch: Dispatch
    # Who chooses a token's experts: the router, unless the choice is replayed from a file.
    route_fn: RoutingFn | None = None
    hooks: tuple[RoutingHook, ...] = ()


# (x_nD, w, step, mesh) -> (topk_ids_nA, topk_weights_nA)
RoutingFn = Callable[[np.ndarray, MoELayer, Step, Mesh], tuple[np.ndarray, np.ndarray]]
# (x_nD of this rank's tokens, their routing, w, mesh) -> y_nD
Dispatch = Callable[[np.ndarray, Routing, MoELayer, Mesh], np.ndarray]


def feed_forward(x_ND: np.ndarray, w: MoELayer, step: Step, mesh: Mesh) -> np.ndarray:
    """The MoE layer of a residual stream that every tp rank has whole: (N, D). Each routes its own
    block of the tokens."""
    x_nD = x_ND[local_tokens(step, mesh)]
    y_nD = routed_experts(x_nD, w, step, mesh)
    y_ND = all_gather(y_nD, mesh.tp, sizes=step.tokens_by_tp_rank(mesh.tp.size))
    if w.shared_expert is not None:
        shared_ND = tensor.feed_forward(x_ND, w.shared_expert, step, mesh)
        y_ND = y_ND + _gated(shared_ND, x_ND, w)
    return y_ND


def sequence_feed_forward(x_nD: np.ndarray, w: MoELayer, step: Step, mesh: Mesh) -> np.ndarray:
    """The MoE layer of a residual stream whose tokens are sharded over ``tp``: (n, D). Each rank
    routes the tokens that it has."""
    y_nD = routed_experts(x_nD, w, step, mesh)
    if w.shared_expert is not None:
        shared_nD = sequence.feed_forward(x_nD, w.shared_expert, step, mesh)
        y_nD = y_nD + _gated(shared_nD, x_nD, w)
    return y_nD


def routed_experts(x_nD: np.ndarray, w: MoELayer, step: Step, mesh: Mesh) -> np.ndarray:
    """What the routed experts make of this rank's tokens: (n, D)."""
    routing = route(x_nD, w, step, mesh)
    for hook in w.hooks:
        hook(routing, step, mesh)
    return w.dispatch(x_nD, routing, w, mesh)


def local_tokens(step: Step, mesh: Mesh) -> slice:
    """The tokens that this rank routes, on its cp rank's packed axis: its block of them, whichever
    way the residual stream is sharded."""
    return block(len(step.ids_N), mesh.tp.size, mesh.tp.rank)


def route(x_nD: np.ndarray, w: MoELayer, step: Step, mesh: Mesh) -> Routing:
    """The experts of this rank's tokens, rows above the capacity dropped. Ranks begin with
    different replicas of an expert, so that those of a few tokens each do not all choose the
    same."""
    route_fn = w.route_fn or route_by_router
    topk_ids_nA, topk_weights_nA = route_fn(x_nD, w, step, mesh)
    keep_nA = np.ones(topk_ids_nA.shape, bool)
    if w.capacity is not None:
        keep_nA = w.capacity.keep_mask(topk_ids_nA, topk_weights_nA, len(w.gate.weight))
    if w.sequence_capacity is not None:
        keep_nA = keep_mask(topk_ids_nA, w.sequence_capacity, step, mesh)
    physical_ids_nA = w.physical_experts.physical_ids(topk_ids_nA, keep_nA, mesh.moe.rank)
    return Routing(topk_ids_nA, topk_weights_nA, physical_ids_nA)


def route_by_router(
    x_nD: np.ndarray, w: MoELayer, step: Step, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """The experts of each token, ascending, and their weights: ``(topk_ids_nA,
    topk_weights_nA)``."""
    return w.router.route(w.gate(x_nD), w.e_score_correction_bias)


def dispatch_all_to_all(x_nD: np.ndarray, routing: Routing, w: MoELayer, mesh: Mesh) -> np.ndarray:
    """Each token goes to the ranks of its experts and comes back: (n, D)."""
    n, A = routing.physical_ids_nA.shape
    dropped = w.physical_experts.dropped
    counts_Z = np.bincount(routing.physical_ids_nA.reshape(-1), minlength=dropped)[:dropped]
    pair_b = np.argsort(routing.physical_ids_nA, axis=None, kind="stable")  # by physical expert
    pair_b = pair_b[: counts_Z.sum()]  # the dropped ones are last
    dispatched_bD = x_nD[pair_b // max(A, 1)]
    if w.scale_inputs:
        dispatched_bD *= routing.topk_weights_nA.reshape(-1)[pair_b, np.newaxis]

    counts_RZ = all_gather(counts_Z[np.newaxis], mesh.moe)
    by_rank = counts_RZ.reshape(mesh.ep.size, mesh.etp.size, -1)
    counts = DispatchCounts(by_rank, w.physical_experts, mesh)

    received_bD = all_to_all(dispatched_bD, mesh.ep, counts.send_counts, counts.recv_counts)
    rows_BD = all_gather(received_bD, mesh.etp, sizes=counts.etp_counts)
    partial_BD = partial_experts(rows_BD, counts.expert_of_rows(), w)
    computed_bD = reduce_scatter(partial_BD, mesh.etp, sizes=counts.etp_counts)
    add_expert_biases(computed_bD, counts.expert_of_rows(mesh.etp.rank), w)
    returned_bD = all_to_all(computed_bD, mesh.ep, counts.recv_counts, counts.send_counts)

    some_dropped = len(pair_b) < routing.physical_ids_nA.size
    y_nAD = (np.zeros if some_dropped else np.empty)((n, A, x_nD.shape[1]), x_nD.dtype)
    y_nAD.reshape(-1, x_nD.shape[1])[pair_b] = returned_bD
    return combine(y_nAD, output_weights(routing.topk_weights_nA, w))


def dispatch_all_gather(x_nD: np.ndarray, routing: Routing, w: MoELayer, mesh: Mesh) -> np.ndarray:
    """Every rank has all tokens of the ``moe`` group, here N, and adds what its experts make of
    those that chose them: (n, D)."""
    sizes = all_gather(np.array([len(x_nD)]), mesh.moe).tolist()
    x_ND = all_gather(x_nD, mesh.moe, sizes=sizes)
    physical_ids_NA = all_gather(routing.physical_ids_nA, mesh.moe, sizes=sizes)
    topk_weights_NA = all_gather(routing.topk_weights_nA, mesh.moe, sizes=sizes)
    A = physical_ids_NA.shape[1]

    own = w.physical_experts.of_rank(mesh.ep.rank)
    pair_B = np.flatnonzero((own.start <= physical_ids_NA) & (physical_ids_NA < own.stop))
    logical_B = w.physical_experts.physical_to_logical_Z[physical_ids_NA.reshape(-1)[pair_B]]
    dispatched_BD = x_ND[pair_B // max(A, 1)]
    if w.scale_inputs:
        dispatched_BD *= topk_weights_NA.reshape(-1)[pair_B, np.newaxis]
    rows_BD = partial_experts(dispatched_BD, logical_B, w)
    if mesh.etp.rank == 0:  # of the ranks that shard an expert's width, one adds its bias
        add_expert_biases(rows_BD, logical_B, w)
    partial_NAD = np.zeros((*physical_ids_NA.shape, x_nD.shape[1]), x_nD.dtype)
    partial_NAD.reshape(-1, x_nD.shape[1])[pair_B] = rows_BD
    partial_ND = combine(partial_NAD, output_weights(topk_weights_NA, w))
    return reduce_scatter(partial_ND, mesh.moe, sizes=sizes)


DISPATCHERS: dict[str, Dispatch] = {
    "all-to-all": dispatch_all_to_all,
    "all-gather": dispatch_all_gather,
}


def partial_experts(rows_BD: np.ndarray, expert_B: np.ndarray, w: MoELayer) -> np.ndarray:
    """What this rank's experts make of rows, each for its expert, those of an expert together:
    (B, D). It is a partial sum, over this rank's part of each expert's width."""
    partial_BD = np.empty_like(rows_BD)
    for number, expert in w.experts.items():
        own = _rows_of(expert_B, number)
        if len(expert_B[own]):
            rows = rows_BD[own]
            partial_BD[own] = expert.down.partial(expert.hidden(rows))
    return partial_BD


def add_expert_biases(rows_bD: np.ndarray, expert_b: np.ndarray, w: MoELayer) -> None:
    """Add the bias of the last projection, once the sum over the width is complete."""
    for number, expert in w.experts.items():
        if expert.down.bias is not None:
            rows_bD[expert_b == number] += expert.down.bias


def combine(y_nAD: np.ndarray, topk_weights_nA: np.ndarray) -> np.ndarray:
    """The weighted sum over a token's experts, one after the other: (n, D)."""
    y_nD = np.zeros((len(y_nAD), y_nAD.shape[2]), y_nAD.dtype)
    for choice in range(y_nAD.shape[1]):
        y_nD += y_nAD[:, choice] * topk_weights_nA[:, choice, np.newaxis]
    return y_nD


def output_weights(topk_weights_nA: np.ndarray, w: MoELayer) -> np.ndarray:
    """What the outputs of a token's experts are multiplied with: (n, A)."""
    return np.ones_like(topk_weights_nA) if w.scale_inputs else topk_weights_nA


def _rows_of(expert_B: np.ndarray, number: int) -> np.ndarray | slice:
    """The rows of an expert: a slice, which copies nothing, if they follow each other."""
    own = np.flatnonzero(expert_B == number)
    if len(own) and own[-1] - own[0] == len(own) - 1:
        return slice(own[0], own[-1] + 1)
    return own


def _gated(shared_nD: np.ndarray, x_nD: np.ndarray, w: MoELayer) -> np.ndarray:
    """The shared expert's output, times the sigmoid of its gate if it has one."""
    if w.shared_expert_gate is None:
        return shared_nD
    return shared_nD * sigmoid(w.shared_expert_gate(x_nD))
