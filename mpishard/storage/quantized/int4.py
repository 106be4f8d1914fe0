"""pack-quantized of compressed-tensors: int4 by groups of a row, eight elements in a word.

An element e of a word has the bits 4e to 4e + 3. Elements and zero points are stored plus 8. The
zero points are packed along the rows."""

from __future__ import annotations

import numpy as np

from mpishard.config.quantization.scheme import Scheme
from mpishard.storage.quantized.elements import unpack
from mpishard.storage.quantized.form import (
    FLOATS,
    INDICES,
    WORDS,
    Form,
    Problem,
    Shape,
    Stored,
    Tensor,
    count,
)
from mpishard.storage.quantized.groups import check_groups, column_groups, dequantize

OFFSET = 8


def tensors(scheme: Scheme, shape: Shape) -> list[Tensor]:
    """`weight_packed`, `weight_scale` and `weight_shape`; zero points and groups, if any."""
    rows, columns = shape
    groups = count(columns, scheme.block[1])
    scales = (count(rows, scheme.block[0]), groups)
    stored = [
        Tensor("weight_packed", WORDS, (rows, count(columns, 8))),
        Tensor("weight_scale", FLOATS, scales),
        Tensor("weight_shape", INDICES, (2,)),
    ]
    if not scheme.symmetric:
        stored.append(Tensor("weight_zero_point", WORDS, (count(rows, 8), groups)))
    if scheme.ordered:
        stored.append(Tensor("weight_g_idx", INDICES, (columns,)))
    return stored


def decode(stored: Stored, scheme: Scheme, rows: slice, columns: slice) -> np.ndarray:
    """``(q - zero point) * scale``; symmetric ones have the zero point 8."""
    scales = stored["weight_scale"]
    return dequantize(
        unpack(stored["weight_packed"][rows], columns),
        OFFSET if scheme.symmetric else unpack(stored["weight_zero_point"].T, rows).T,
        scales[rows] if scheme.block[0] else scales,
        column_groups(stored, "weight_g_idx", scheme, columns),
    )


def check(stored: Stored, scheme: Scheme, shape: Shape) -> Problem | None:
    """Whether the stored shape is that of the model, and groups are in range."""
    found = tuple(int(length) for length in stored["weight_shape"])
    if found != shape:
        return "weight_shape", f"is {found}, but config.json calls for {shape}"
    return check_groups(stored, "weight_g_idx", scheme, shape)


FORM = Form("int4", tensors, decode, check)
