"""Which stored elements a part of a matrix needs.

A part is a slice of rows and one of columns, which begin and end anywhere: also within a block that
shares a scale, or within a word that packs several elements.
"""

from __future__ import annotations

import numpy as np

# The elements in each of the 256 bytes, the first in its lowest bits.
BYTES = np.arange(256, dtype=np.uint8)[:, None]  # one of eight bits
NIBBLES = np.concatenate([BYTES & 15, BYTES >> 4], axis=1)  # two of four bits

_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # of the lower three bits
_E2M1 = np.concatenate([_MAGNITUDES, -_MAGNITUDES])  # the fourth is the sign
E2M1 = _E2M1[NIBBLES]  # two numbers of four bits


def unpack(
    packed: np.ndarray, part: slice, table: np.ndarray = NIBBLES, order: list[int] | None = None
) -> np.ndarray:
    """The elements `part` of each row, as `table` has them for each byte.

    `packed` is (rows, items) of bytes or of words of 32 bits. An item begins with its lowest bits,
    or has its elements in the `order` given.

    >>> unpack(np.array([[0x76543210, 0xFEDCBA98]], np.uint32), slice(6, 10))
    array([[6, 7, 8, 9]], dtype=uint8)
    """
    each = table.shape[1] * packed.itemsize
    first, last = part.start // each, -(-part.stop // each)
    items = np.ascontiguousarray(packed[:, first:last])
    elements = np.take(table, items.view(np.uint8), axis=0).reshape(*items.shape, each)
    if order is not None:
        elements = elements[..., order]
    flat = elements.reshape(len(items), items.shape[1] * each)
    return flat[:, part.start - first * each : part.stop - first * each : part.step]


def blocks_of(part: slice, length: int | None) -> np.ndarray | slice:
    """The block of each element of `part`, of blocks of this `length`; None: one block has all.

    >>> blocks_of(slice(3, 9), 4)
    array([0, 1, 1, 1, 1, 2])
    """
    if length is None:
        return slice(None)
    if length == 1:
        return part
    return np.arange(part.start, part.stop, part.step or 1) // length


def spread(
    scales: np.ndarray, block: tuple[int | None, int | None], rows: slice, columns: slice
) -> np.ndarray:
    """The scale of each element of a part, in float32, to be broadcast over it. `scales` has one
    for each block of so many rows and columns; `columns` are consecutive."""
    of_rows = scales[blocks_of(rows, block[0])]
    length = block[1]
    if length is None or length == 1:
        return of_rows[:, blocks_of(columns, length)].astype(np.float32)
    first, last = columns.start // length, -(-columns.stop // length)
    wide = np.repeat(of_rows[:, first:last].astype(np.float32), length, axis=1)
    return wide[:, columns.start - first * length : columns.stop - first * length]
