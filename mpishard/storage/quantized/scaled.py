"""FP8 and int8: one byte for each element, times the scale of its block.

A block is 128 x 128 elements (DeepSeek-V3, arXiv 2412.19437, section 3.3), a row, or the whole
matrix. The last block of an axis is shorter where its length does not divide: of the 576 rows of
``kv_a_proj_with_mqa``, 64 have the fifth scale.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from mpishard.config.quantization.scheme import Scheme
from mpishard.storage.quantized.elements import spread
from mpishard.storage.quantized.form import (
    FLOATS,
    FP8,
    INT8,
    POWERS_OF_TWO,
    Dtypes,
    Form,
    Shape,
    Stored,
    Tensor,
    count,
)


def tensors(dtypes: Dtypes, scheme: Scheme, shape: Shape) -> list[Tensor]:
    """`dtypes` are those of the elements."""
    scales = tuple(count(length, block) for length, block in zip(shape, scheme.block, strict=True))
    stored = [
        Tensor("weight", dtypes, shape),
        Tensor(scheme.scale, {**FLOATS, **POWERS_OF_TWO}, scales),
    ]
    if not scheme.symmetric:
        stored.append(Tensor("weight_zero_point", dtypes, scales))
    return stored


def decode(stored: Stored, scheme: Scheme, rows: slice, columns: slice) -> np.ndarray:
    """``(weight - zero point) * scale``."""
    values = _widened(stored["weight"][rows, columns])
    if not scheme.symmetric:
        values -= spread(stored["weight_zero_point"], scheme.block, rows, columns)
    values *= spread(stored[scheme.scale], scheme.block, rows, columns)
    return values


def _widened(codes: np.ndarray) -> np.ndarray:
    """The codes in float32, looked up: several times as fast as a conversion from FP8."""
    of_each_byte = np.arange(256, dtype=np.uint8).view(codes.dtype).astype(np.float32)
    return np.take(of_each_byte, codes.view(np.uint8))


FP8_FORM = Form("FP8", partial(tensors, FP8), decode)
INT8_FORM = Form("int8", partial(tensors, INT8), decode)
