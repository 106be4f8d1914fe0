"""Router replay: routing recorded, and replayed in place of the router's, on any layout (as
training frameworks replay the routing of rollouts: arXiv 2510.11370).

record_layer    an MoE layer -> the same, which remembers its routing
gather_routing  what the ranks remember -> gather(world) -> the whole trace, on rank 0
replay_layer    an MoE layer -> the same, which asks the trace and not its router

Every token is routed by one rank, which knows its request and position. So both communicate
nothing while the model runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mpishard.communication.collectives import all_gather, gather
from mpishard.communication.mesh import Mesh
from mpishard.errors import UserError
from mpishard.parallel.expert import MoELayer, Routing, local_tokens
from mpishard.sequences.step import Step
from mpishard.storage.routing_trace import RoutingTrace


class RoutingRecorder:
    """Remembers the routing of all tokens that this rank routes."""

    def __init__(self) -> None:
        self._top_k = 0
        self._tokens: list[np.ndarray] = []  # of each step: requests, positions and ids, (3, n)
        self._experts: dict[int, list[np.ndarray]] = {}  # by layer
        self._weights: dict[int, list[np.ndarray]] = {}

    def record_layer(self, layer: int, w: MoELayer) -> MoELayer:
        """The MoE layer `w`, whose routing is now remembered."""
        self._top_k = w.router.top_k
        is_first = not self._experts
        experts = self._experts.setdefault(layer, [])
        weights = self._weights.setdefault(layer, [])

        def record(routing: Routing, step: Step, mesh: Mesh) -> None:
            own = local_tokens(step, mesh)
            if is_first:
                tokens = (step.requests_N[own], step.positions_N[own], step.ids_N[own])
                self._tokens.append(np.stack(tokens))
            experts.append(routing.topk_ids_nA)
            weights.append(routing.topk_weights_nA)

        return replace(w, hooks=(*w.hooks, record))

    def gather_routing(
        self, mesh: Mesh, request_ids: Sequence[str], dtype: np.dtype
    ) -> RoutingTrace | None:
        """The trace of all ranks, on rank 0, for requests of these ids; the others get None.
        Collective. UserError if a request was processed more than once."""
        tokens_3n = np.concatenate([np.empty((3, 0), np.int64), *self._tokens], axis=1)
        counts = all_gather(np.array([tokens_3n.shape[1]]), mesh.world).tolist()
        tokens_3T = gather(tokens_3n, mesh.world, axis=1, sizes=counts)
        experts_TLA = gather(self._stacked(self._experts, np.int64), mesh.world, sizes=counts)
        weights_TLA = gather(self._stacked(self._weights, dtype), mesh.world, sizes=counts)
        if tokens_3T is None or experts_TLA is None or weights_TLA is None:
            return None
        request_T, position_T, token_T = tokens_3T
        trace = RoutingTrace(
            request_T=request_T,
            position_T=position_T,
            token_T=token_T,
            layers=tuple(self._experts),
            experts_TLA=experts_TLA,
            weights_TLA=weights_TLA,
            request_ids=tuple(request_ids),
        ).sorted_as(request_T, tuple(request_ids))
        if trace.has_duplicates():
            raise UserError("a request was fed more than once while its routing was recorded")
        return trace

    def _stacked(self, by_layer: dict[int, list[np.ndarray]], dtype: np.typing.DTypeLike):
        """What was remembered of this rank's tokens: (n, L, A)."""
        nothing = np.empty((0, self._top_k), dtype)
        return np.stack([np.concatenate([nothing, *rows]) for rows in by_layer.values()], axis=1)


def replay_layer(trace: RoutingTrace, layer: int, w: MoELayer) -> MoELayer:
    """The MoE layer `w`, with the routing of `trace` in place of its router's."""
    place = trace.layers.index(layer)

    def route_fn(
        x_nD: np.ndarray, w: MoELayer, step: Step, mesh: Mesh
    ) -> tuple[np.ndarray, np.ndarray]:
        own = local_tokens(step, mesh)
        found_n = trace.find(step.requests_N[own], step.positions_N[own], step.ids_N[own])
        topk_weights_nA = trace.weights_TLA[found_n, place].astype(x_nD.dtype, copy=False)
        return trace.experts_TLA[found_n, place], topk_weights_nA

    return replace(w, route_fn=route_fn)
