"""The one place of matrix products: every weight meets its activations in `linear`.

BLAS was tuned for large square matrices and for vectors. Between the two, for the 2 to 32 rows of
a decode step that serves several sequences, a plain ``x @ w.T`` is several times slower than the
memory that it reads (it copies the weight into its own packed order first). The weight is therefore
walked in blocks of rows that stay in cache:

- 2 and 3 rows: a matrix-vector product per row for each block; the block comes from memory once.
- 4 to 32 rows, standing in columns: products so small that OpenBLAS (on AVX-512 machines) does not
  pack at all; of wide weights they take some inputs at a time. So do 52 to 64 rows, filled up to
  64, which fit its vectors so well that nothing else comes as near the rate of large products.
- others up to 256 rows: ``w @ x.T``, whose long axis is the weight's, is faster than ``x @ w.T``.

``numpy.matmul`` over a stack of blocks runs the loop over blocks in C.
"""

from __future__ import annotations

import math

import numpy as np

# OpenBLAS takes its unpacked path up to M*N*K of 10**6.
SMALL_PRODUCT = 10**6
# Such a product has at least so many rows of the weight, if need be of fewer columns.
SMALL_HEIGHT = 24
# As many columns as fit the vectors of such a product without a rest.
FULL_COLUMNS = 64
# Bytes of weight that stay in the second-level cache while several vectors use them.
CACHED_BLOCK = 256 * 1024


def linear(x_NI: np.ndarray, w_OI: np.ndarray, bias_O: np.ndarray | None = None) -> np.ndarray:
    """``x @ w.T + bias``: (N, I) activations and an (O, I) weight give (N, O) in C order."""
    rows = len(x_NI)
    if goes_by_columns(rows):
        return as_rows(linear_columns(as_columns(x_NI), w_OI, bias_O), rows)
    if rows == 1:
        y_NO = (w_OI @ x_NI[0])[np.newaxis]
    elif 2 <= rows <= 3:
        y_NO = _by_vectors(x_NI, w_OI)
    elif 33 <= rows <= 256:
        y_NO = np.ascontiguousarray((w_OI @ x_NI.T).T)
    else:
        y_NO = x_NI @ w_OI.T
    if bias_O is not None:
        y_NO += bias_O
    return y_NO


def goes_by_columns(rows: int) -> bool:
    """Whether so many rows are best multiplied standing in columns. Where several products follow
    each other on them, they had better stay so in between."""
    return 4 <= rows <= 32 or 52 <= rows <= FULL_COLUMNS


def as_columns(x_NI: np.ndarray) -> np.ndarray:
    """Rows as columns, (I, C), filled up with zeros where that makes products faster."""
    rows, inputs = x_NI.shape
    x_IC = np.zeros((inputs, FULL_COLUMNS if rows > 32 else rows), x_NI.dtype)
    x_IC[:, :rows] = x_NI.T
    return x_IC


def as_rows(y_OC: np.ndarray, rows: int) -> np.ndarray:
    """The first `rows` columns as rows, (N, O)."""
    return np.ascontiguousarray(y_OC[:, :rows].T)


def linear_columns(
    x_IC: np.ndarray, w_OI: np.ndarray, bias_O: np.ndarray | None = None
) -> np.ndarray:
    """``w @ x + bias`` of activations that stand in columns: (O, C)."""
    inputs, columns = x_IC.shape
    pieces = max(1, math.ceil(SMALL_HEIGHT * x_IC.size / SMALL_PRODUCT))
    width = max(1, math.ceil(inputs / pieces))  # inputs that are summed at a time
    height = max(8, min(96, SMALL_PRODUCT // max(1, columns * width) // 8 * 8))
    y_OC = np.zeros((len(w_OI), columns), x_IC.dtype)
    for start in range(0, inputs, width):
        x_iC = x_IC[start : start + width]
        for w_bhI, y_bhC in zip(_blocks(w_OI, height), _blocks(y_OC, height), strict=True):
            y_bhC += w_bhI[:, :, start : start + width] @ x_iC
    if bias_O is not None:
        y_OC += bias_O[:, np.newaxis]
    return y_OC


def _by_vectors(x_NI: np.ndarray, w_OI: np.ndarray) -> np.ndarray:
    height = max(1, CACHED_BLOCK // max(1, w_OI.itemsize * w_OI.shape[1]))
    blocks = [
        (w_bhI[:, np.newaxis] @ x_NI[:, :, np.newaxis])[..., 0].transpose(1, 0, 2)
        for w_bhI in _blocks(w_OI, height)
    ]
    return np.concatenate([y_Nbh.reshape(len(x_NI), -1) for y_Nbh in blocks], axis=1)


def _blocks(w_OI: np.ndarray, height: int) -> list[np.ndarray]:
    """The rows of `w_OI` as a stack of blocks of `height` rows and one block of what remains."""
    inputs = w_OI.shape[1]
    even = len(w_OI) // height * height
    parts = [w_OI[:even].reshape(even // height, height, inputs), w_OI[np.newaxis, even:]]
    return [part for part in parts if part.size] or [w_OI[np.newaxis]]
