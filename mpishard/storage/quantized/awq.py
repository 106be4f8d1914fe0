"""AWQ (Lin et al. 2023, arXiv 2306.00978) in the layout of its gemm kernel: four bits, transposed,
eight outputs in a word in an order of their own."""

from __future__ import annotations

import numpy as np

from mpishard.config.quantization.scheme import Scheme
from mpishard.storage.quantized.elements import unpack
from mpishard.storage.quantized.form import FLOATS, WORDS, Form, Shape, Stored, Tensor, count
from mpishard.storage.quantized.groups import column_groups, dequantize

ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # the place of output 0, 1, … among the eight of a word


def tensors(scheme: Scheme, shape: Shape) -> list[Tensor]:
    """`qweight` (I, O / 8), `qzeros` (groups, O / 8) and `scales` (groups, O)."""
    outputs, inputs = shape
    groups, words = count(inputs, scheme.block[1]), count(outputs, 8)
    return [
        Tensor("qweight", WORDS, (inputs, words)),
        Tensor("qzeros", WORDS, (groups, words)),
        Tensor("scales", FLOATS, (groups, outputs)),
    ]


def decode(stored: Stored, scheme: Scheme, rows: slice, columns: slice) -> np.ndarray:
    """``(q - zero point) * scale``; rows are outputs, columns inputs."""
    return dequantize(
        unpack(stored["qweight"][columns], rows, order=ORDER).T,
        unpack(stored["qzeros"], rows, order=ORDER).T,
        stored["scales"][:, rows].T,
        column_groups(stored, "", scheme, columns),
    )


FORM = Form("AWQ", tensors, decode)
