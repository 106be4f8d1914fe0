"""pack-quantized of compressed-tensors: integers of four or eight bits in words.

A word has eight or four consecutive elements of a row, the first in its lowest bits. Elements and
zero points are stored plus 8 or plus 128. The zero points are packed along the rows."""

from __future__ import annotations

import numpy as np

from mpishard.config.quantization.scheme import Scheme
from mpishard.storage.quantized.elements import BYTES, NIBBLES, unpack
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

TABLES = {4: NIBBLES, 8: BYTES}
OFFSETS = {4: 8, 8: 128}


def tensors(scheme: Scheme, shape: Shape) -> list[Tensor]:
    """`weight_packed`, `weight_scale` and `weight_shape`; zero points and groups, if any."""
    rows, columns = shape
    groups = count(columns, scheme.block[1])
    scales, each = (count(rows, scheme.block[0]), groups), 32 // scheme.bits
    stored = [
        Tensor("weight_packed", WORDS, (rows, count(columns, each))),
        Tensor("weight_scale", FLOATS, scales),
        Tensor("weight_shape", INDICES, (2,)),
    ]
    if not scheme.symmetric:
        stored.append(Tensor("weight_zero_point", WORDS, (count(rows, each), groups)))
    if scheme.ordered:
        stored.append(Tensor("weight_g_idx", INDICES, (columns,)))
    return stored


def decode(stored: Stored, scheme: Scheme, rows: slice, columns: slice) -> np.ndarray:
    """``(q - zero point) * scale``; symmetric ones have the zero point 8 or 128."""
    table, scales = TABLES[scheme.bits], stored["weight_scale"]
    zeros: np.ndarray | int = OFFSETS[scheme.bits]
    if not scheme.symmetric:
        zeros = unpack(stored["weight_zero_point"].T, rows, table).T
    return dequantize(
        unpack(stored["weight_packed"][rows], columns, table),
        zeros,
        scales[rows] if scheme.block[0] else scales,
        column_groups(stored, "weight_g_idx", scheme, columns),
    )


def check(stored: Stored, scheme: Scheme, shape: Shape) -> Problem | None:
    """Whether the stored shape is that of the model, and groups are in range."""
    found = tuple(int(length) for length in stored["weight_shape"])
    if found != shape:
        return "weight_shape", f"is {found}, but config.json calls for {shape}"
    return check_groups(stored, "weight_g_idx", scheme, shape)


FORM = Form("packed int", tensors, decode, check)
