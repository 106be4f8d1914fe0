"""Probes: what a decoder spends in attention and in experts, and what the machine could do in
the time.

Everything here that depends on how a decoder is built stands together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
from mpi4py import MPI

from mpishard.api import Model
from mpishard.arithmetic.linear import Linear
from mpishard.communication.group import CollectiveCall
from mpishard.communication.ledger import Ledger
from mpishard.communication.mesh import Mesh
from mpishard.layers import Layer
from mpishard.model import Decoder
from mpishard.parallel.attention import AttendCache
from mpishard.parallel.expert import Dispatch, MoELayer, Routing
from mpishard.parallel.tensor import FeedForward, ParallelLayer

# Bytes of matrices that the ranks of a node walk together, beyond the caches that they share, and
# that each walks at least, beyond its own.
NODE_WORKING_SET = 512 * 2**20
RANK_WORKING_SET = 64 * 2**20
# Rows of `x` in the product whose rate is measured, however long the prompt: with more the rate
# hardly rises, and the roofline of a prompt of minutes is still taken in a second.
PRODUCT_ROWS = 512


@dataclass(frozen=True)
class CountedLinear(Linear):
    """The last product of an expert, which says how many rows it computes."""

    count: Callable[[int], None] = lambda rows: None

    def partial(self, x_NI: Any) -> np.ndarray:
        y_NO = super().partial(x_NI)
        self.count(len(y_NO))
        return y_NO


class TimedDecoder(Decoder):
    """A model that adds up the seconds which attention and MoE layers take it, both
    without communication, and what its experts compute."""

    def __init__(self, model: Decoder) -> None:
        self.__dict__.update(model.__dict__)
        self.layers = [self._timed(layer) for layer in model.layers]
        self.attend = self._timed_attend(model.attend)
        self.attention_seconds = self.moe_seconds = 0.0
        self.expert_rows = self.expert_flops = 0

    def _timed(self, layer: Layer | ParallelLayer) -> Layer | ParallelLayer:
        ffn = layer.ffn
        if not isinstance(layer, Layer) or not isinstance(ffn, MoELayer):
            return layer
        experts = {number: self._counted(w) for number, w in ffn.experts.items()}
        dispatch = self._timed_dispatch(ffn.dispatch)
        return replace(layer, ffn=replace(ffn, experts=experts, dispatch=dispatch))

    def _timed_attend(self, attend: AttendCache) -> Any:
        def timed(*operands: Any) -> Any:
            started = arithmetic_clock(self.mesh.ledger)
            output = attend(*operands)
            self.attention_seconds += arithmetic_clock(self.mesh.ledger) - started
            return output

        return timed

    def _timed_dispatch(self, dispatch: Dispatch) -> Dispatch:
        def timed(x_nD: np.ndarray, routes: Routing, w: MoELayer, mesh: Mesh) -> np.ndarray:
            started = arithmetic_clock(mesh.ledger)
            y_nD = dispatch(x_nD, routes, w, mesh)
            self.moe_seconds += arithmetic_clock(mesh.ledger) - started
            return y_nD

        return timed

    def _counted(self, w: FeedForward) -> FeedForward:
        def count(rows: int) -> None:
            self.expert_rows += rows
            sizes = [linear.weight.size for linear in w.linears]
            self.expert_flops += 2 * rows * sum(sizes)

        return replace(w, down=CountedLinear(**vars(w.down), count=count))


class LayerSample(Decoder):
    """The first layer of each kind of a model: of each window, chunk and rotary embedding, and of
    linear attention."""

    def __init__(self, model: Decoder) -> None:
        model = model.map_moe_layers(lambda _, w: replace(w, hooks=()))
        self.__dict__.update(model.__dict__)
        config = model.config
        kinds = [
            (config.windows[n], config.chunks[n], config.ropes[n], config.is_linear(n))
            for n in range(config.layers)
        ]
        firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
        self.layer_numbers = range(len(firsts))
        self.layers = [model.layers[first] for first in firsts]
        self.cache_places = [model.cache_places[first] for first in firsts]
        self.rope = model.rope.of(firsts)


def arithmetic_clock(ledger: Ledger) -> float:
    """The time on a clock that stands still during collectives."""
    return perf_counter() - ledger.seconds


def memory_probe(model: Model) -> tuple[Callable[[], None], int]:
    """Work that reads matrices too large together to stay in this rank's part of the caches, and
    their bytes."""
    with CollectiveCall("split", model.mesh.world):
        node = model.mesh.world.comm.Split_type(MPI.COMM_TYPE_SHARED)
    bytes_of_rank = max(RANK_WORKING_SET, NODE_WORKING_SET // node.size)
    node.Free()
    side, dtype = 2048, model.decoder.dtype
    count = max(1, bytes_of_rank // (side * side * dtype.itemsize))
    matrices, x_I = np.ones((count, side, side), dtype), np.ones(side, dtype)

    def walk() -> None:
        for w_OI in matrices:
            w_OI @ x_I

    return walk, matrices.nbytes


def gemm_probe(layer: Layer | ParallelLayer) -> tuple[Callable[[], None], int]:
    """Work that multiplies PRODUCT_ROWS tokens with a layer's weights plainly, and its flops."""
    attention, ffn = layer.attention, layer.ffn
    if isinstance(ffn, MoELayer):
        ffn = next(iter(ffn.experts.values()))
    weights = [linear.weight for linear in (*attention.linears, *ffn.linears)]
    widths = {w_OI.shape[1] for w_OI in weights}
    x_by_width = {width: np.ones((PRODUCT_ROWS, width), weights[0].dtype) for width in widths}

    def multiply() -> None:
        for w_OI in weights:
            x_by_width[w_OI.shape[1]] @ w_OI.T

    return multiply, 2 * PRODUCT_ROWS * sum(w_OI.size for w_OI in weights)
