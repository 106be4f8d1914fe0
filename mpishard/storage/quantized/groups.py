"""Four-bit integers: ``(q - zero point) * scale``, with a zero point and a scale for each row and
each group of columns."""

from __future__ import annotations

import numpy as np

from mpishard.config.quantization.scheme import Scheme
from mpishard.storage.quantized.form import Problem, Shape, Stored, count


def dequantize(
    quanta: np.ndarray, zeros: np.ndarray | int, scales: np.ndarray, groups: np.ndarray
) -> np.ndarray:
    """A part of a matrix: `quanta` (rows, columns), `zeros` and `scales` (rows, groups), and the
    group of each of the columns."""
    values = quanta.astype(np.float32, order="C")
    values -= zeros if isinstance(zeros, int) else _spread(zeros, groups)
    values *= _spread(scales, groups)
    return values


def _spread(of_groups: np.ndarray, groups: np.ndarray) -> np.ndarray:
    return np.take(of_groups.astype(np.float32), groups, axis=1)


def column_groups(stored: Stored, name: str, scheme: Scheme, columns: slice) -> np.ndarray:
    """The group of each of the `columns`: the stored one if there is the tensor `name`, otherwise
    consecutive columns form a group."""
    if name in stored:
        return stored[name][columns]
    return np.arange(columns.start, columns.stop) // (scheme.block[1] or columns.stop)


def check_groups(stored: Stored, name: str, scheme: Scheme, shape: Shape) -> Problem | None:
    """What is wrong with the stored groups in the tensor `name`, if it is there."""
    if name not in stored:
        return None
    most = count(shape[1], scheme.block[1])
    low, high = int(stored[name].min()), int(stored[name].max())
    return None if 0 <= low and high < most else (name, f"has groups {low} to {high} of {most}")
