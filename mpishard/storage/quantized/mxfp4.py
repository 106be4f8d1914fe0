"""MXFP4, the four-bit format of the Open Compute Project's Microscaling Formats specification 1.0.

32 consecutive elements of a row form a block, which has one scale, a power of two. A byte holds two
elements, the first in its lower half. bfloat16 and wider types represent the values exactly.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from mpishard.config.quantization.scheme import Scheme
from mpishard.storage.quantized.elements import E2M1, spread, unpack
from mpishard.storage.quantized.form import BYTES, Dtypes, Form, Shape, Stored, Tensor, count

BLOCK_SIZE = 32  # elements that share a scale

_SCALE = np.dtype(ml_dtypes.float8_e8m0fnu)  # 2 ** (byte - 127), and 255 is not a number
SCALES: Dtypes = {"U8": _SCALE, "F8_E8M0": _SCALE}


def block_tensors(scheme: Scheme, shape: Shape) -> list[Tensor]:
    """As gpt-oss has them: `blocks`, of 16 bytes each, and `scales`."""
    rows, columns = shape
    blocks = count(columns, BLOCK_SIZE)
    return [
        Tensor("blocks", BYTES, (rows, blocks, BLOCK_SIZE // 2)),
        Tensor("scales", SCALES, (rows, blocks)),
    ]


def decode_blocks(stored: Stored, scheme: Scheme, rows: slice, columns: slice) -> np.ndarray:
    """``element * scale``."""
    blocks = stored["blocks"]
    packed = blocks.reshape(len(blocks), blocks.shape[1] * blocks.shape[2])
    return _decode(packed, stored["scales"], rows, columns)


def packed_tensors(scheme: Scheme, shape: Shape) -> list[Tensor]:
    """As compressed-tensors has them."""
    rows, columns = shape
    return [
        Tensor("weight_packed", BYTES, (rows, count(columns, 2))),
        Tensor("weight_scale", SCALES, (rows, count(columns, BLOCK_SIZE))),
    ]


def decode_packed(stored: Stored, scheme: Scheme, rows: slice, columns: slice) -> np.ndarray:
    """``element * scale``."""
    return _decode(stored["weight_packed"], stored["weight_scale"], rows, columns)


def _decode(packed: np.ndarray, scales: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
    values = unpack(packed[rows], columns, E2M1)
    values *= spread(scales, (1, BLOCK_SIZE), rows, columns)
    return values


BLOCKS_FORM = Form("MXFP4", block_tensors, decode_blocks, joint="_")
PACKED_FORM = Form("MXFP4", packed_tensors, decode_packed)
