"""Arrays in files, read by slices.

All reads go through memory maps. A slice of columns then reads little more than its own bytes, and
the processes of a machine share one copy. A map lives as long as an array that views it; the system
may drop its pages at any time.
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

Progress = Callable[[int], object]  # called with the bytes done since the last call


@dataclass(frozen=True)
class StoredArray:
    """The place of an array in a file, contiguous and in C order."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size of the array in the file."""
        return prod(self.shape) * self.dtype.itemsize

    def map(self) -> np.ndarray:
        """The array, memory-mapped and read-only."""
        return self.view(map_file(self.path))

    def view(self, file: np.ndarray) -> np.ndarray:
        """The array as a view of `file`, the bytes of its file."""
        data = file[self.offset : self.offset + self.nbytes]
        return data.view(self.dtype).reshape(self.shape)

    def blocks(self) -> Iterator[np.ndarray]:
        """The array in blocks of rows. Each block is mapped anew, so memory holds one at a time."""
        for rows in row_blocks(self.shape, self.dtype.itemsize):
            yield self.map()[rows]


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file, memory-mapped and read-only. A map keeps the file open, so map the file
    once for many arrays."""
    # A plain array, because every result of a numpy.memmap would be one, too.
    return np.asarray(np.memmap(path, np.uint8, "r"))


def row_blocks(shape: tuple[int, ...], itemsize: int) -> Iterator[slice]:
    """Consecutive slices of the first axis, of at most `BLOCK_BYTES` each, but at least one row."""
    row_bytes = prod(shape[1:]) * itemsize
    rows = max(1, BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def as_bytes(block: np.ndarray) -> memoryview:
    """The bytes of a contiguous block of any dtype, without a copy."""
    return block.reshape(-1).view(np.uint8).data


def checksum(block: np.ndarray, before: int = 0) -> int:
    """The CRC-32 of a contiguous block; `before` is the CRC-32 of the blocks before it."""
    return zlib.crc32(as_bytes(block), before)
