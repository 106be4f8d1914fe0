"""Scoring: the logits of given tokens, gathered on one rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mpishard.communication.collectives import gather
from mpishard.communication.mesh import Mesh
from mpishard.config.layout import block_sizes
from mpishard.model import Decoder
from mpishard.sequences.inputs import TokenInput
from mpishard.sequences.step import ScheduledChunk, Step, pack


@dataclass(frozen=True)
class LogitsOutput:
    """The `logits` after each token of one sequence, (tokens, vocab), and where asked for the
    residual stream entering each layer and after the final norm: layers + 1 arrays (tokens,
    hidden). All are of the model's compute dtype."""

    logits: np.ndarray
    hidden_states: list[np.ndarray]


def score_sequences(
    decoder: Decoder, sequences: list[TokenInput], hidden_states: bool, chunk: int | None
) -> Iterator[LogitsOutput | None]:
    """The logits of each sequence in turn, on rank 0 of the world; None on the others. The replicas
    score one sequence each at a time."""
    dp = decoder.mesh.dp
    for first in range(0, len(sequences), dp.size):
        at_once = sequences[first : first + dp.size]
        mine = at_once[dp.rank] if dp.rank < len(at_once) else TokenInput([])
        lengths = [len(one.ids) for one in at_once]
        longest, place = max(lengths), first + dp.rank
        scores = _score(decoder, mine, place, hidden_states, chunk or longest, longest)
        lengths += [0] * (dp.size - len(at_once))
        yield from _gather_outputs(decoder.mesh, scores, lengths, len(at_once))


def _score(
    decoder: Decoder, tokens: TokenInput, place: int, hidden_states: bool, chunk: int, longest: int
) -> LogitsOutput:
    """The logits of one sequence, the `place`-th of all, on rank 0 of this replica.

    Each step processes at most `chunk` tokens. There are as many steps as the `longest` sequence of
    any replica takes. The sequence is empty on a replica for which none is left.
    """
    config = decoder.config
    ids_S, encoder_ids_T = (np.array(ids, np.int64) for ids in tokens)
    first = min(chunk, len(ids_S))
    cache = decoder.allocate_cache(len(ids_S), first, encoder_length=len(encoder_ids_T))
    streams = config.layers + 1 if hidden_states else 0
    logits = [np.empty((0, config.vocab), decoder.dtype)]
    hidden = [[np.empty((0, config.hidden), decoder.dtype)] for _ in range(streams)]
    for start in range(0, longest, chunk):
        new_S = ids_S[start : start + chunk]
        remaining = max(0, len(ids_S) - start - len(new_S))
        scheduled = ScheduledChunk(
            new_S, cache, remaining, place, encoder_ids_T=None if start else encoder_ids_T
        )
        step = pack([scheduled] if len(new_S) else [], decoder.sequence_sharding, all_logits=True)

        def observe(layer: int, x_nD: np.ndarray, step: Step = step) -> None:
            hidden[layer].append(decoder.gather_sequence(x_nD, step))

        logits_Nv = decoder.forward(step, observe if hidden_states else None)
        logits.append(_gather_logits(decoder, logits_Nv, step))
    return LogitsOutput(np.concatenate(logits), [np.concatenate(parts) for parts in hidden])


def _gather_logits(decoder: Decoder, logits_Nv: np.ndarray, step: Step) -> np.ndarray:
    """The logits of all of a step's tokens, in their order, on rank 0 of the replica; no rows
    on the others: (W, V)."""
    mesh, vocab = decoder.mesh, decoder.config.vocab
    logits_WV = np.empty((0, vocab), logits_Nv.dtype)
    logits_NV = gather(logits_Nv, mesh.tp, axis=1, sizes=block_sizes(vocab, mesh.tp.size))
    if logits_NV is not None:
        sizes = [len(place) for place in step.global_index]
        rows_WV = gather(logits_NV, mesh.cp, sizes=sizes)
        if rows_WV is not None:
            logits_WV = np.empty_like(rows_WV)
            logits_WV[np.concatenate(step.global_index)] = rows_WV
    return logits_WV


def _gather_outputs(
    mesh: Mesh, output: LogitsOutput, lengths: list[int], count: int
) -> Iterator[LogitsOutput | None]:
    """The outputs of the `count` sequences of one round, from the replicas that made them."""
    if mesh.replica.rank != 0:
        yield from [None] * count
        return
    everything = [output.logits, *output.hidden_states]
    arrays = [gather(array, mesh.dp, sizes=lengths) for array in everything]
    if mesh.dp.rank != 0:
        yield from [None] * count
        return
    bounds = np.cumsum(lengths)[:-1]
    split = [np.split(array, bounds) for array in arrays if array is not None]
    for place in range(count):
        yield LogitsOutput(split[0][place], [parts[place] for parts in split[1:]])
