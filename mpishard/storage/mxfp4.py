"""MXFP4, the four-bit format of the Open Compute Project's Microscaling Formats specification 1.0.

32 consecutive elements of a row form a block, which has one scale, a power of two. A byte holds two
elements, the first in its lower half. bfloat16 and wider types represent the values exactly.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

BLOCK_SIZE = 32  # elements that share a scale

SCALE = np.dtype(ml_dtypes.float8_e8m0fnu)  # 2 ** (byte - 127), and 255 is not a number

_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # of the lower three bits
_NUMBERS = np.concatenate([_MAGNITUDES, -_MAGNITUDES])  # the fourth is the sign
_PAIRS = np.stack([np.tile(_NUMBERS, 16), np.repeat(_NUMBERS, 16)], axis=1)  # of each byte


def dequantize(blocks: np.ndarray, scales: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
    """``matrix[rows, columns]`` in float32. `blocks` are the bytes of the matrix, (rows, blocks,
    16), and `scales` the scales of its blocks, (rows, blocks), of dtype `SCALE`. Only the blocks of
    this part are read."""
    first, last = columns.start // BLOCK_SIZE, -(-columns.stop // BLOCK_SIZE)
    pairs = _PAIRS[blocks[rows, first:last]]  # (rows, blocks, 16, 2)
    groups = pairs.reshape(*pairs.shape[:2], BLOCK_SIZE)
    groups *= scales[rows, first:last, np.newaxis].astype(np.float32)
    wide = groups.reshape(len(groups), BLOCK_SIZE * (last - first))
    return wide[:, columns.start - first * BLOCK_SIZE : columns.stop - first * BLOCK_SIZE]
