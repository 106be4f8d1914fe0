"""Arrays that lie in files and are read by slices.

Everything that is read here is memory-mapped, so that a slice of columns costs what it weighs and
the processes of a machine share one copy of what they read. A map lives as long as the array that
looks through it; its pages are the system's to drop.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

BLOCK_BYTES = 32 << 20

Progress = Callable[[int], object]  # told the bytes done since it was last called


@dataclass(frozen=True)
class StoredArray:
    """Where an array lies in a file, contiguous and in C order."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes it takes in the file."""
        return prod(self.shape) * self.dtype.itemsize

    def map(self) -> np.ndarray:
        """The array, read-only; nothing is read until it is touched."""
        return self.view(map_file(self.path))

    def view(self, file: np.ndarray) -> np.ndarray:
        """The array as it lies in the bytes of its file."""
        data = file[self.offset : self.offset + self.nbytes]
        return data.view(self.dtype).reshape(self.shape)

    def blocks(self) -> Iterator[np.ndarray]:
        """The array in blocks of rows, each mapped afresh, so that memory holds one at a time."""
        for rows in row_blocks(self.shape, self.dtype.itemsize):
            yield self.map()[rows]


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file, read-only. A map keeps the file open: take one for many arrays."""
    # A plain array in front of the map: numpy.memmap would pass its type on to every result.
    return np.asarray(np.memmap(path, np.uint8, "r"))


def row_blocks(shape: tuple[int, ...], itemsize: int) -> Iterator[slice]:
    """Consecutive slices of the first axis, none of more than `BLOCK_BYTES` unless one row is."""
    row_bytes = prod(shape[1:]) * itemsize
    rows = max(1, BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def as_bytes(block: np.ndarray) -> memoryview:
    """The bytes of a contiguous block, without a copy, whatever its dtype."""
    return block.reshape(-1).view(np.uint8).data


def checksum(block: np.ndarray, before: int = 0) -> int:
    """The CRC-32 of a contiguous block's bytes, continuing that of the blocks `before` it."""
    return zlib.crc32(as_bytes(block), before)
