"""Linear attention (Gated DeltaNet: arXiv 2412.06464), its states sharded by heads over ``tp``.

In place of keys and values, a sequence has one state for each value head, a matrix of K x Y
numbers. A rank has the states of its value heads, as it has query heads elsewhere, and updates them
with each token (`mpishard.arithmetic.delta_rule`). Over ``tp`` nothing is communicated but what
attention communicates: the residual stream.

recur            each rank has all tokens: nothing is communicated
recur_over_cp    the tokens of a sequence lie on several cp ranks, each of which keeps the state
                 after the last of them:
  first chunks   a run of tokens is an affine map of the state. Each rank makes the maps of its
                 runs; all_gather(cp) of the rows that the convolution looks back at, all_gather(cp)
                 of the maps; each rank composes those before its own runs: a prefix scan, of which
                 no byte depends on the length of the prompt
  extends        all_gather(cp) of the inputs of the new tokens; each rank updates its states with
                 all of them
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mpishard.arithmetic.delta_rule import (
    AffineMap,
    causal_conv,
    gated_delta_map,
    gated_delta_rule,
)
from mpishard.arithmetic.linear import Linear
from mpishard.arithmetic.ops import RMSNorm, sigmoid, silu
from mpishard.communication.collectives import all_gather
from mpishard.communication.mesh import Mesh
from mpishard.config.layout import Layout
from mpishard.sequences.step import Segment, Step


class DeltaInputs(NamedTuple):
    """What a token brings to the state of each of this rank's heads."""

    qkv_NX: np.ndarray  # before the convolution; X: channels of q, k and v
    log_decay_Nh: np.ndarray
    rate_Nh: np.ndarray

    def rows(self, index: np.ndarray | slice) -> DeltaInputs:
        """Those of some tokens."""
        return DeltaInputs(*(x[index] for x in self))


@dataclass(frozen=True)
class GatedDeltaNet:
    """The weights of a linear-attention layer on this rank."""

    q: Linear  # (g*K, D)
    k: Linear  # (g*K, D)
    v: Linear  # (h*Y, D)
    o_gate: Linear  # (h*Y, D)
    rate: Linear  # (h, D)
    decay: Linear  # (h, D)
    taps_XT: np.ndarray  # of the channels of q, k and v
    log_a_h: np.ndarray  # a head's decay is exp(-a softplus(decay + dt_bias))
    dt_bias_h: np.ndarray
    norm: RMSNorm  # (Y,)
    o: Linear  # (D, h*Y)
    key_head_h: np.ndarray  # which of this rank's g key heads each value head uses
    key_width: int  # K
    value_width: int  # Y

    @property
    def linears(self) -> list[Linear]:
        """The weights that tokens are multiplied with."""
        return [self.q, self.k, self.v, self.o_gate, self.rate, self.decay, self.o]

    def project(self, x_ND: np.ndarray) -> DeltaInputs:
        """What each token brings to the states of this rank's heads."""
        qkv_NX = np.concatenate([self.q(x_ND), self.k(x_ND), self.v(x_ND)], axis=1)
        step_Nh = np.logaddexp(0, self.decay(x_ND) + self.dt_bias_h)  # softplus
        return DeltaInputs(qkv_NX, -np.exp(self.log_a_h) * step_Nh, sigmoid(self.rate(x_ND)))

    def convolve(
        self, qkv_SX: np.ndarray, before_TX: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The queries, keys and values of consecutive tokens, one of each for each value head, from
        their rows and those before them: ``(q_ShK, k_ShK, v_ShY)``."""
        keys = self.q.weight.shape[0]
        qkv_SX = causal_conv(qkv_SX, before_TX, self.taps_XT)
        q_SX, k_SX, v_SX = np.split(qkv_SX, [keys, 2 * keys], axis=1)
        S, K = len(qkv_SX), self.key_width
        q_ShK = q_SX.reshape(S, -1, K)[:, self.key_head_h]
        k_ShK = k_SX.reshape(S, -1, K)[:, self.key_head_h]
        return q_ShK, k_ShK, v_SX.reshape(S, -1, self.value_width)

    def merge_heads(self, out_NhY: np.ndarray, x_ND: np.ndarray) -> np.ndarray:
        """The heads' output, normalized, gated and side by side: (N, h*Y)."""
        gate_NX = silu(self.o_gate(x_ND))
        return self.norm(out_NhY).reshape(gate_NX.shape) * gate_NX


# (inputs, w, layer, step, mesh) -> out_NhY; `layer` counts the layers that have a state
Recur = Callable[[DeltaInputs, GatedDeltaNet, int, Step, Mesh], np.ndarray]


def recur(inputs: DeltaInputs, w: GatedDeltaNet, layer: int, step: Step, mesh: Mesh) -> np.ndarray:
    """Each sequence's new tokens after its state, which is then the one after them: (N, h, Y)."""
    out_NhY = _empty_output(inputs, w)
    for segment in step.segments:
        new = segment.token_slice
        out_NhY[new] = _advance(segment, layer, w, inputs.rows(new))
    return out_NhY


def recur_over_cp(
    inputs: DeltaInputs, w: GatedDeltaNet, layer: int, step: Step, mesh: Mesh
) -> np.ndarray:
    """The same where the tokens of a sequence lie on several cp ranks: (N, h, Y)."""
    out_NhY = _empty_output(inputs, w)
    if step.first_chunks:
        scan(inputs, w, layer, step, mesh, out_NhY)
    if step.extends:
        gather(inputs, w, layer, step, mesh, out_NhY)
    return out_NhY


def select_linear_attention(layout: Layout) -> Recur:
    """The form that `layout` asks for."""
    return recur if layout.cp == 1 else recur_over_cp


class Run(NamedTuple):
    """Consecutive tokens of a sequence on one cp rank. Runs sort by sequence and position."""

    sequence: int  # the number of the sequence among the first chunks
    start: int  # the position of its first token
    length: int
    rank: int
    row: int  # of its first token, on the packed axis of this rank if it is this rank's

    @property
    def rows(self) -> slice:
        """Its tokens on the packed axis."""
        return slice(self.row, self.row + self.length)

    def tail(self, most: int) -> slice:
        """The last of them, at `most` so many."""
        return slice(self.row + self.length - min(most, self.length), self.row + self.length)


def runs_of(first_chunks: list[Segment]) -> list[Run]:
    """The runs of all ranks, in order."""
    runs = []
    for sequence, segment in enumerate(first_chunks):
        for rank, positions_S in enumerate(segment.positions_by_rank):
            row = segment.token_slice.start
            for part_S in np.split(positions_S, np.flatnonzero(np.diff(positions_S) > 1) + 1):
                if len(part_S):
                    runs.append(Run(sequence, int(part_S[0]), len(part_S), rank, row))
                row += len(part_S)
    return sorted(runs)


def scan(
    inputs: DeltaInputs,
    w: GatedDeltaNet,
    layer: int,
    step: Step,
    mesh: Mesh,
    out_NhY: np.ndarray,
) -> None:
    """First chunks: the outputs of this rank's runs go to `out_NhY`, and the state after the last
    run of each sequence to its cache."""
    cp, back = mesh.cp, w.taps_XT.shape[1] - 1
    (_, h, Y), K = out_NhY.shape, w.key_width
    runs = runs_of(step.first_chunks)
    by_rank = [[run for run in runs if run.rank == rank] for rank in range(cp.size)]
    received = [run for some in by_rank for run in some]  # in the order of an all_gather

    own = [inputs.qkv_NX[run.tail(back)] for run in by_rank[cp.rank]]
    own_TX = np.concatenate([inputs.qkv_NX[:0], *own])
    sizes = [sum(min(back, run.length) for run in some) for some in by_rank]
    all_TX = all_gather(own_TX, cp, sizes=sizes)
    ends = np.cumsum([min(back, run.length) for run in received])[:-1]
    tails = dict(zip(received, np.split(all_TX, ends), strict=True))

    reach_by_run, maps = {}, [np.empty((0, h, K, K + Y), out_NhY.dtype)]
    for run in by_rank[cp.rank]:
        before_TX = _rows_before(run, tails, back)
        mine = inputs.rows(run.rows)
        qkv = w.convolve(mine.qkv_NX, before_TX)
        out_NhY[run.rows], reach_by_run[run], change = gated_delta_map(
            *qkv, mine.log_decay_Nh, mine.rate_Nh
        )
        maps.append(np.concatenate(change, axis=2)[np.newaxis])
    all_maps_XhK = all_gather(np.concatenate(maps), cp, sizes=[len(some) for some in by_rank])
    map_of = dict(zip(received, all_maps_XhK, strict=True))  # X: runs

    for sequence, segment in enumerate(step.first_chunks):
        state_hKY = segment.cache.states.heads_LhKY[layer]  # zeros: the sequence begins
        for run in (run for run in runs if run.sequence == sequence):
            if run.rank == cp.rank:
                out_NhY[run.rows] += np.einsum("shk,hky->shy", reach_by_run[run], state_hKY)
            transfer_hKK, update_hKY = np.split(map_of[run], [K], axis=2)
            state_hKY = AffineMap(transfer_hKK, update_hKY)(state_hKY)
        segment.cache.states.heads_LhKY[layer] = state_hKY
        end = Run(sequence, segment.cache.length, 0, 0, 0)
        segment.cache.states.rows_LTX[layer] = _rows_before(end, tails, back)


def gather(
    inputs: DeltaInputs,
    w: GatedDeltaNet,
    layer: int,
    step: Step,
    mesh: Mesh,
    out_NhY: np.ndarray,
) -> None:
    """Extended sequences: every cp rank updates the states with all new tokens, and keeps the
    outputs of its own."""
    own_N = step.extend_token_index
    rows_pX = np.concatenate(inputs.rows(own_N), axis=1)  # X: channels, decays and rates
    rows_WX = all_gather(rows_pX, mesh.cp, sizes=step.extend_counts)
    h = out_NhY.shape[1]
    for segment, (index_S, pos_S) in zip(step.extends, step.extend_global_index, strict=True):
        qkv_SX, log_decay_Sh, rate_Sh = np.split(rows_WX[index_S], [-2 * h, -h], axis=1)
        out_ShY = _advance(segment, layer, w, DeltaInputs(qkv_SX, log_decay_Sh, rate_Sh))
        mine = np.isin(pos_S, segment.positions_by_rank[mesh.cp.rank])
        out_NhY[segment.token_slice] = out_ShY[mine]


def _advance(segment: Segment, layer: int, w: GatedDeltaNet, new: DeltaInputs) -> np.ndarray:
    """The outputs of all `new` tokens of a sequence, (S, h, Y), after which its state is the one
    after them."""
    states = segment.cache.states
    before_TX = states.rows_LTX[layer]
    qkv = w.convolve(new.qkv_NX, before_TX)
    out_ShY, states.heads_LhKY[layer] = gated_delta_rule(
        *qkv, new.log_decay_Nh, new.rate_Nh, states.heads_LhKY[layer]
    )
    rows_TX = np.concatenate([before_TX, new.qkv_NX])
    states.rows_LTX[layer] = rows_TX[len(rows_TX) - len(before_TX) :]
    return out_ShY


def _rows_before(run: Run, tails: dict[Run, np.ndarray], back: int) -> np.ndarray:
    """The `back` rows of a sequence before a run, zeros before its beginning."""
    earlier = sorted(one for one in tails if one.sequence == run.sequence and one < run)
    any_TX = next(iter(tails.values()))
    before_TX = np.zeros((back, any_TX.shape[1]), any_TX.dtype)
    rows_TX = np.concatenate([before_TX, *(tails[one] for one in earlier)])
    return rows_TX[len(rows_TX) - back :]


def _empty_output(inputs: DeltaInputs, w: GatedDeltaNet) -> np.ndarray:
    """An array for the outputs, with anything in it: (N, h, Y)."""
    N, h = inputs.rate_Nh.shape
    return np.empty((N, h, w.value_width), inputs.qkv_NX.dtype)
