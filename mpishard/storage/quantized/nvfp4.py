"""NVFP4: numbers of four bits (E2M1), two in a byte, the first in its lower half.

16 consecutive elements of a row share a scale in FP8, and all of the matrix one in float32.
compressed-tensors stores its inverse."""

from __future__ import annotations

from functools import partial

import numpy as np

from mpishard.config.quantization.scheme import Scheme
from mpishard.storage.quantized.elements import E2M1, spread, unpack
from mpishard.storage.quantized.form import (
    BYTES,
    FLOATS,
    FP8,
    Form,
    Problem,
    Shape,
    Stored,
    Tensor,
    count,
)


def tensors(packed: str, whole: str, scheme: Scheme, shape: Shape) -> list[Tensor]:
    """`packed` and `whole` are the names of the elements and of the scale of the matrix."""
    rows, columns = shape
    return [
        Tensor(packed, BYTES, (rows, count(columns, 2))),
        Tensor("weight_scale", FP8, (rows, count(columns, 16))),
        Tensor(whole, FLOATS, (1,)),
    ]


def decode_packed(stored: Stored, scheme: Scheme, rows: slice, columns: slice) -> np.ndarray:
    """``element * (scale of the block / scale of the matrix)``."""
    values = unpack(stored["weight_packed"][rows], columns, E2M1)
    scales = spread(stored["weight_scale"], scheme.block, rows, columns)
    return values * (scales / stored["weight_global_scale"].astype(np.float32))


def decode_modelopt(stored: Stored, scheme: Scheme, rows: slice, columns: slice) -> np.ndarray:
    """``element * (scale of the block * scale of the matrix)``."""
    values = unpack(stored["weight"][rows], columns, E2M1)
    scales = spread(stored["weight_scale"], scheme.block, rows, columns)
    return values * (scales * stored["weight_scale_2"].astype(np.float32))


def check_packed(stored: Stored, scheme: Scheme, shape: Shape) -> Problem | None:
    """Whether the scale that divides is not 0."""
    return None if stored["weight_global_scale"].all() else ("weight_global_scale", "is 0")


PACKED_FORM = Form(
    "NVFP4", partial(tensors, "weight_packed", "weight_global_scale"), decode_packed, check_packed
)
MODELOPT_FORM = Form("NVFP4", partial(tensors, "weight", "weight_scale_2"), decode_modelopt)
