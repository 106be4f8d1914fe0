"""What linear-attention layers remember of one sequence, on one rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class StateShape:
    """The sizes of a recurrent state on one rank: of its value heads h, each K x Y, and of the rows
    of X channels that a convolution of so many taps looks back at."""

    layers: int  # that have such a state
    heads: int  # h
    key_width: int  # K
    value_width: int  # Y
    channels: int  # X
    taps: int

    @property
    def numbers(self) -> int:
        """How many numbers a sequence's state has, whatever its length."""
        state = self.heads * self.key_width * self.value_width
        return self.layers * (state + (self.taps - 1) * self.channels)


NO_STATES = StateShape(0, 0, 0, 0, 0, 1)


class RecurrentState:
    """The states of a sequence's linear-attention layers after its last token: of each layer the
    matrix of each head, ``heads_LhKY``, and the last rows before its convolution, ``rows_LTX``."""

    def __init__(self, shape: StateShape, dtype: np.dtype) -> None:
        self.heads_LhKY = np.zeros(
            (shape.layers, shape.heads, shape.key_width, shape.value_width), dtype
        )
        self.rows_LTX = np.zeros((shape.layers, shape.taps - 1, shape.channels), dtype)

    def clear(self) -> None:
        """Forget everything: the next step starts the sequence from its beginning."""
        self.heads_LhKY[:] = 0
        self.rows_LTX[:] = 0
