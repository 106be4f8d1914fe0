"""Packed steps: the new tokens of all running sequences in one array, one after the other.

A step has no batch axis and no padding. Prompts, single tokens, sequences of different lengths
and mixtures of them are the same array ``x_ND`` with other bounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


class KVCache:
    """The keys and values of one sequence on this rank, allocated once for all its positions.

    Keys and values are (layers, g, capacity, K): one head's positions are one run of memory, which
    is how attention reads them. Pages that no position has reached take no memory.
    """

    def __init__(self, layers: int, kv_heads: int, capacity: int, width: int, dtype: np.dtype):
        self.k = np.empty((layers, kv_heads, capacity, width), dtype)
        self.v = np.empty((layers, kv_heads, capacity, width), dtype)
        self.length = 0  # positions of the sequence up to and including the present step

    @property
    def capacity(self) -> int:
        """The number of positions there is room for."""
        return self.k.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values of the positions reached so far."""
        return (self.k.nbytes + self.v.nbytes) // max(1, self.capacity) * self.length

    def store(
        self, layer: int, k_SgK: np.ndarray, v_SgK: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Put the step's last S positions in their place; all keys and values of the sequence,
        ``(k_gTK, v_gTK)``."""
        new = slice(self.length - len(k_SgK), self.length)
        self.k[layer, :, new] = k_SgK.transpose(1, 0, 2)
        self.v[layer, :, new] = v_SgK.transpose(1, 0, 2)
        return self.k[layer, :, : self.length], self.v[layer, :, : self.length]


@dataclass(frozen=True)
class Segment:
    """One sequence's part of a step: its new tokens' place on the packed axis, and its cache,
    whose `length` already counts them."""

    new: slice
    cache: KVCache


@dataclass(frozen=True)
class Step:
    """One pass through the model.

    `ids_N` are the packed new tokens and `positions_N` their positions in their sequences;
    `wanted_M` are the places on the packed axis whose logits are asked for.
    """

    ids_N: np.ndarray
    positions_N: np.ndarray
    segments: list[Segment]
    wanted_M: np.ndarray


def pack(parts: list[tuple[np.ndarray, KVCache]], all_logits: bool = False) -> Step:
    """The step that feeds each sequence's new tokens, ``(ids_S, cache)``, and asks for the logits
    after the last of them, or after every one.

    The caches' lengths are advanced by the new tokens.
    """
    segments, positions, stop = [], [], 0
    for ids_S, cache in parts:
        start, stop = stop, stop + len(ids_S)
        positions.append(np.arange(cache.length, cache.length + len(ids_S)))
        cache.length += len(ids_S)
        segments.append(Segment(slice(start, stop), cache))
    return Step(
        ids_N=np.concatenate([ids_S for ids_S, _ in parts]),
        positions_N=np.concatenate(positions),
        segments=segments,
        wanted_M=np.arange(stop) if all_logits else np.array([s.new.stop - 1 for s in segments]),
    )
