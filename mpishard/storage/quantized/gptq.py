"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): four bits, transposed, eight inputs in a word.

With desc_act the inputs were quantized in the order of their activations, and `g_idx` says to which
group each belongs. The first version of the files has zero points less one. Readers add 1 to each
by one addition to the whole word, and so does this one."""

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

ONES = np.uint32(0x11111111)  # 1 in each of the eight elements


def tensors(scheme: Scheme, shape: Shape) -> list[Tensor]:
    """`qweight` (I / 8, O), `qzeros` (groups, O / 8), `scales` (groups, O) and `g_idx` (I,)."""
    outputs, inputs = shape
    groups = count(inputs, scheme.block[1])
    return [
        Tensor("qweight", WORDS, (count(inputs, 8), outputs)),
        Tensor("qzeros", WORDS, (groups, count(outputs, 8))),
        Tensor("scales", FLOATS, (groups, outputs)),
        Tensor("g_idx", INDICES, (inputs,), optional=not scheme.ordered),
    ]


def decode(stored: Stored, scheme: Scheme, rows: slice, columns: slice) -> np.ndarray:
    """``(q - zero point) * scale``; rows are outputs, columns inputs."""
    zeros = stored["qzeros"]
    if scheme.zeros_less_one:
        zeros = zeros + ONES
    return dequantize(
        unpack(stored["qweight"][:, rows].T, columns),
        unpack(zeros, rows).T,
        stored["scales"][:, rows].T,
        column_groups(stored, "g_idx", scheme, columns),
    )


def check(stored: Stored, scheme: Scheme, shape: Shape) -> Problem | None:
    """Whether the stored groups are in range."""
    return check_groups(stored, "g_idx", scheme, shape)


FORM = Form("GPTQ", tensors, decode, check)
