"""MXFP4, the four-bit format of the Open Compute Project's Microscaling Formats specification 1.0.

Thirty-two neighbours of a row share a scale, a power of two. Two of their four-bit numbers lie in
a byte, the first of them in its lower half. What comes out is exact in bfloat16 and wider types.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

BLOCK_SIZE = 32  # numbers that share a scale

SCALE = np.dtype(ml_dtypes.float8_e8m0fnu)  # 2 ** (byte - 127), and 255 is not a number

_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # of the lower three bits
_NUMBERS = np.concatenate([_MAGNITUDES, -_MAGNITUDES])  # the fourth is the sign
_PAIRS = np.stack([np.tile(_NUMBERS, 16), np.repeat(_NUMBERS, 16)], axis=1)  # of each byte


def dequantize(blocks: np.ndarray, scales: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
    """A part of a matrix in float32, from its bytes, (rows, groups, 16), and the scales of its
    groups, (rows, groups), as `SCALE`. Nothing beyond the groups of the part is read."""
    first, last = columns.start // BLOCK_SIZE, -(-columns.stop // BLOCK_SIZE)
    pairs = _PAIRS[blocks[rows, first:last]]  # (rows, groups, 16, 2)
    groups = pairs.reshape(*pairs.shape[:2], BLOCK_SIZE)
    groups *= scales[rows, first:last, np.newaxis].astype(np.float32)
    wide = groups.reshape(len(groups), BLOCK_SIZE * (last - first))
    return wide[:, columns.start - first * BLOCK_SIZE : columns.stop - first * BLOCK_SIZE]
