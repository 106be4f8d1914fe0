"""What the layers remember of one sequence on one rank: its keys and values."""

from __future__ import annotations

import numpy as np

from mpishard.sequences.recurrent_state import NO_STATES, RecurrentState, StateShape


class KVCache:
    """The keys and values of one sequence on this rank, allocated once for all its positions.

    Values are (layers, g, num_slots, K), keys (layers, g, K, num_slots): each as the product with
    one query reads them fastest (keys 1.5 times as fast as by position, after 4,096). With MLA
    values are the first `latent` numbers of the keys, and are not stored beside them. Pages that no
    position has reached take no memory. Of the sequence's `capacity` positions this rank keeps at
    most `num_slots`; which, `positions` says. The layers are those that have keys and values; what
    layers of linear attention keep instead are the `states`.

    The `memory` of a decoder's sequence are the keys and values of its encoder's input, which do
    not change once they are there. `expert_counts_LE` says how many of the tokens chose each expert
    of each layer with limited ones.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        capacity: int,
        width: int,
        dtype: np.dtype,
        num_slots: int | None = None,
        latent: int = 0,
        states: StateShape = NO_STATES,
        memory: KVCache | None = None,
        limited_experts: tuple[int, int] = (0, 0),
    ):
        self.capacity, self.latent, self.memory = capacity, latent, memory
        self.expert_counts_LE = np.empty(limited_experts, np.int64)
        num_slots = capacity if num_slots is None else num_slots
        self.k = np.empty((layers, kv_heads, width, num_slots), dtype)
        if latent:
            self.v = self.k[:, :, :latent].transpose(0, 1, 3, 2)
        else:
            self.v = np.empty((layers, kv_heads, num_slots, width), dtype)
        self.positions = np.empty(num_slots, np.int64)
        self.states = RecurrentState(states, dtype)
        self.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, those of the memory included."""
        own = self.k.nbytes + (0 if self.latent else self.v.nbytes)
        return own + (self.memory.nbytes if self.memory else 0)

    def clear(self) -> None:
        """Forget everything: the next step starts the sequence from its beginning."""
        self.length = 0  # positions of the sequence up to and including the present step
        self.num_local = 0  # how many of them are kept here
        self.write_offset = 0  # how many of those came before the present step
        self.states.clear()
        self.expert_counts_LE[:] = 0
        if self.memory is not None:
            self.memory.clear()

    def extend(self, positions: np.ndarray, length: int) -> None:
        """Reserve slots for the `positions` that the present step adds here; the sequence now has
        `length` positions."""
        self.length = length
        self.write_offset, self.num_local = self.num_local, self.num_local + len(positions)
        self.positions[self.write_offset : self.num_local] = positions

    def copy_prefix(self, other: KVCache, length: int) -> None:
        """Start with what `other` holds here of the first `length` positions of its sequence, which
        are this one's as well. Only for sequences of the same rotary frequencies."""
        self.length = length
        self.write_offset = self.num_local = int(
            np.searchsorted(other.positions[: other.num_local], length)
        )
        kept = slice(self.num_local)
        self.positions[kept] = other.positions[kept]
        self.k[..., kept] = other.k[..., kept]
        if not self.latent:
            self.v[:, :, kept] = other.v[:, :, kept]

    def write(self, layer: int, k_SgK: np.ndarray, v_SgY: np.ndarray) -> None:
        """Store the keys and values of the positions that `extend` reserved last."""
        self.k[layer, :, :, self.write_offset : self.num_local] = k_SgK.transpose(1, 2, 0)
        if not self.latent:
            self.v[layer, :, self.write_offset : self.num_local] = v_SgY.transpose(1, 0, 2)

    def read(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All keys and values kept here and their positions, ascending: ``(k_gTK, v_gTY,
        k_pos_T)``."""
        kept = slice(self.num_local)
        k_gTK = self.k[layer, :, :, kept].transpose(0, 2, 1)
        return k_gTK, self.v[layer, :, kept], self.positions[kept]
