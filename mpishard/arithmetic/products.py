"""The one place of matrix products: every weight meets its activations in `linear`.

BLAS was tuned for large square matrices and for vectors. Between the two, for the 2 to 32 rows of
a decode step that serves several sequences, a plain ``x @ w.T`` is several times slower than the
memory that it reads (it copies the weight into its own packed order first). The weight is therefore
walked in blocks of rows that stay in cache:

- 2 and 3 rows: a matrix-vector product per row for each block; the block comes from memory once.
- 4 to 32 rows: products so small that OpenBLAS (on AVX-512 machines) does not pack at all; of wide
  weights they take some columns at a time. So do 52 to 64 rows, filled up to 64, which fit its
  vectors so well that nothing else reaches the rate of large products as nearly.
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
# Bytes of weight that stay in the second-level cache while several vectors use them.
CACHED_BLOCK = 256 * 1024


def linear(x_NI: np.ndarray, w_OI: np.ndarray, bias_O: np.ndarray | None = None) -> np.ndarray:
    """``x @ w.T + bias``: (N, I) activations and an (O, I) weight give (N, O) in C order."""
    rows = len(x_NI)
    if rows == 1:
        y_NO = (w_OI @ x_NI[0])[np.newaxis]
    elif 2 <= rows <= 3:
        y_NO = _by_vectors(x_NI, w_OI)
    elif 4 <= rows <= 32:
        y_NO = _by_small_products(x_NI, w_OI)
    elif 52 <= rows <= 64:
        x_64I = np.zeros((64, x_NI.shape[1]), x_NI.dtype)
        x_64I[:rows] = x_NI
        y_NO = _by_small_products(x_64I, w_OI)[:rows]
    elif 33 <= rows <= 256:
        y_NO = np.ascontiguousarray((w_OI @ x_NI.T).T)
    else:
        y_NO = x_NI @ w_OI.T
    if bias_O is not None:
        y_NO += bias_O
    return y_NO


def _by_vectors(x_NI: np.ndarray, w_OI: np.ndarray) -> np.ndarray:
    height = max(1, CACHED_BLOCK // max(1, w_OI.itemsize * w_OI.shape[1]))
    blocks = [
        (w_bhI[:, np.newaxis] @ x_NI[:, :, np.newaxis])[..., 0].transpose(1, 0, 2)
        for w_bhI in _blocks(w_OI, height)
    ]
    return np.concatenate([y_Nbh.reshape(len(x_NI), -1) for y_Nbh in blocks], axis=1)


def _by_small_products(x_NI: np.ndarray, w_OI: np.ndarray) -> np.ndarray:
    x_IN, (rows, inputs) = np.ascontiguousarray(x_NI.T), x_NI.shape
    pieces = max(1, math.ceil(SMALL_HEIGHT * x_NI.size / SMALL_PRODUCT))
    width = max(1, math.ceil(inputs / pieces))  # columns that are summed at a time
    height = max(8, min(96, SMALL_PRODUCT // max(1, rows * width) // 8 * 8))
    y_ON = np.zeros((len(w_OI), rows), x_NI.dtype)
    for start in range(0, inputs, width):
        x_iN = x_IN[start : start + width]
        for w_bhI, y_bhN in zip(_blocks(w_OI, height), _blocks(y_ON, height), strict=True):
            y_bhN += w_bhI[:, :, start : start + width] @ x_iN
    return np.ascontiguousarray(y_ON.T)


def _blocks(w_OI: np.ndarray, height: int) -> list[np.ndarray]:
    """The rows of `w_OI` as a stack of blocks of `height` rows and one block of what remains."""
    inputs = w_OI.shape[1]
    even = len(w_OI) // height * height
    parts = [w_OI[:even].reshape(even // height, height, inputs), w_OI[np.newaxis, even:]]
    return [part for part in parts if part.size] or [w_OI[np.newaxis]]
