"""The one place of matrix products: every weight meets its activations in `linear`.

BLAS was tuned for large square matrices and for vectors. Between the two, for the rows of a decode
step that serves several sequences, of a short prompt or of one expert, a plain ``x @ w.T`` is up to
several times slower than the memory that it reads: it copies the weight into its own packed order
first. Where OpenBLAS has a path that does not pack, which its AVX-512 kernels have for products of
few enough numbers, the weight is therefore walked in blocks of rows that stay in cache:

- 2 and 3 rows: a matrix-vector product per row for each block; the block comes from memory once.
- 4 to 384 rows, standing in columns: products so small that they take the unpacked path; of wide
  weights they take some inputs at a time.

``numpy.matmul`` over a stack of blocks runs the loop over blocks in C. Other kernels and other BLAS
have only the 2 and 3 rows of these, and ``x @ w.T``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain

import numpy as np
from threadpoolctl import threadpool_info

# OpenBLAS takes its unpacked path up to M*N*K of 10**6.
SMALL_GEMM_SIZE = 10**6
# Such a product has at least so many rows of the weight, if need be of fewer columns.
SMALL_HEIGHT = 24
# As many columns as fit the vectors of such a product best.
FULL_COLUMNS = 64
# Rows up to which columns are as fast as ``x @ w.T`` even where only one product follows.
MOST_ROWS = 384
# Rows that are transposed at a time: of more, those a power of two bytes long would not find room
# beside each other in the first-level cache.
TILE = 16
# Bytes of weight that stay in the second-level cache while several vectors use them.
CACHED_BLOCK = 256 * 1024


def _kernels() -> str:
    """The processor for which NumPy's OpenBLAS has chosen its kernels; of another BLAS nothing."""
    names = [one["architecture"] for one in threadpool_info() if one["internal_api"] == "openblas"]
    return (names[0] or "") if names else ""


KERNELS = _kernels()
# Whether small matrices are multiplied without being packed first.
UNPACKED = KERNELS in ("SkylakeX", "Cooperlake", "SapphireRapids")


def linear(x_NI: np.ndarray, w_OI: np.ndarray, bias_O: np.ndarray | None = None) -> np.ndarray:
    """``x @ w.T + bias``: (N, I) activations and an (O, I) weight give (N, O) in C order."""
    rows = len(x_NI)
    if use_small_gemm(rows):
        return unpack_columns(linear_packed(pack_columns(x_NI), w_OI, bias_O), rows)
    if rows == 1:
        y_NO = (w_OI @ x_NI[0])[np.newaxis]
    elif 2 <= rows <= 3:
        y_NO = _by_vectors(x_NI, w_OI)
    else:
        y_NO = x_NI @ w_OI.T
    if bias_O is not None:
        y_NO += bias_O
    return y_NO


def use_small_gemm(rows: int) -> bool:
    """Whether so many rows are best multiplied standing in columns. Where several products follow
    each other on them, they had better stay so in between."""
    return UNPACKED and 4 <= rows <= MOST_ROWS


def pack_columns(x_NI: np.ndarray) -> list[np.ndarray]:
    """Rows as columns: those that make full stacks, (X, I, N), and one stack of those that are
    left, (1, I, N), if there are any; filled up with zeros where that makes products faster."""
    rows, inputs = x_NI.shape
    full, columns = _stacks(rows)
    shapes = [(full, inputs, FULL_COLUMNS), (1, inputs, columns)]
    x_XIN = [np.zeros(shape, x_NI.dtype) for shape in shapes if shape[0] * shape[2]]
    for x_IN, part_NI in _beside(x_XIN, x_NI):
        for tile in range(0, len(part_NI), TILE):
            x_IN[:, tile : min(tile + TILE, len(part_NI))] = part_NI[tile : tile + TILE].T
    return x_XIN


def _stacks(rows: int) -> tuple[int, int]:
    """The number of full stacks for so many rows, and the columns that are left, as measured: a few
    beyond full vectors cost less than filling them up, many cost more."""
    full, left = divmod(rows, FULL_COLUMNS)
    if left > 40:
        return full + 1, 0
    if full and 0 < left <= 32:
        left += FULL_COLUMNS
        return full - 1, left if left <= 80 else 96
    return full, left


def unpack_columns(y_XON: list[np.ndarray], rows: int) -> np.ndarray:
    """The first `rows` of all columns as rows, (N, O)."""
    outputs = y_XON[0].shape[1]
    y_NO = np.empty((rows, outputs), y_XON[0].dtype)
    for y_ON, part_NO in _beside(y_XON, y_NO):
        for tile in range(0, outputs, 8 * TILE):
            part_NO[:, tile : tile + 8 * TILE] = y_ON[tile : tile + 8 * TILE, : len(part_NO)].T
    return y_NO


def _beside(x_XIN: list[np.ndarray], x_NI: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each stack, (I, N), with those of the rows, (N, I), that stand in its columns."""
    first = 0
    for x_IN in chain.from_iterable(x_XIN):
        part_NI = x_NI[first : first + x_IN.shape[1]]
        yield x_IN, part_NI
        first += len(part_NI)


def linear_packed(
    x_XIN: list[np.ndarray], w_OI: np.ndarray, bias_O: np.ndarray | None = None
) -> list[np.ndarray]:
    """``w @ x + bias`` of activations that stand in columns: (X, O, N) of each (X, I, N)."""
    return [_multiply(stack_XIN, w_OI, bias_O) for stack_XIN in x_XIN]


def _multiply(x_XIN: np.ndarray, w_OI: np.ndarray, bias_O: np.ndarray | None) -> np.ndarray:
    stacks, inputs, columns = x_XIN.shape
    pieces = max(1, math.ceil(SMALL_HEIGHT * inputs * columns / SMALL_GEMM_SIZE))
    width = max(1, math.ceil(inputs / pieces))  # inputs that are summed at a time
    height = max(8, min(96, SMALL_GEMM_SIZE // (columns * width) // 8 * 8))
    y_XON = np.empty((stacks, len(w_OI), columns), x_XIN.dtype)
    blocks, rest = divmod(len(w_OI), height)
    even = blocks * height
    for count, size, rows in ((blocks, height, slice(even)), (1, rest, slice(even, None))):
        # A block of the weight meets one stack after the other.
        w_blocks = w_OI[rows].reshape(count, 1, size, inputs)
        y_blocks = y_XON[:, rows].reshape(stacks, count, size, columns).swapaxes(0, 1)
        np.matmul(w_blocks[..., :width], x_XIN[:, :width], out=y_blocks)
        for first in range(width, inputs, width):
            y_blocks += w_blocks[..., first : first + width] @ x_XIN[:, first : first + width]
    if bias_O is not None:
        y_XON += bias_O[:, np.newaxis]
    return y_XON


def _by_vectors(x_NI: np.ndarray, w_OI: np.ndarray) -> np.ndarray:
    height = max(1, CACHED_BLOCK // max(1, w_OI.itemsize * w_OI.shape[1]))
    blocks = [
        (w_XOI[:, np.newaxis] @ x_NI[:, :, np.newaxis])[..., 0].transpose(1, 0, 2)
        for w_XOI in _blocks(w_OI, height)
    ]
    return np.concatenate([y_NXO.reshape(len(x_NI), -1) for y_NXO in blocks], axis=1)


def _blocks(w_OI: np.ndarray, height: int) -> list[np.ndarray]:
    """The rows of `w_OI` as a stack of blocks of `height` rows and one block of what remains."""
    inputs = w_OI.shape[1]
    even = len(w_OI) // height * height
    parts = [w_OI[:even].reshape(even // height, height, inputs), w_OI[np.newaxis, even:]]
    return [part for part in parts if part.size] or [w_OI[np.newaxis]]
