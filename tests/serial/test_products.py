"""Matrix products of any number of rows and awkward shapes, against einsum in double precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpishard.arithmetic import gemm
from mpishard.arithmetic.gemm import (
    linear,
    linear_packed,
    pack_columns,
    unpack_columns,
    use_small_gemm,
)

ROWS = (1, 2, 3, 4, 5, 8, 16, 31, 33, 41, 64, 65, 81, 97, 128, 129, 256, 257, 384, 385)
SHAPES = ((1, 1), (5, 3), (64, 7), (129, 33), (200, 1024), (33, 2816), (50, 9000), (0, 8), (8, 0))


@pytest.fixture(params=[True, False], ids=["unpacked", "packed"])
def unpacked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether BLAS is taken to have a path that does not pack."""
    monkeypatch.setattr(gemm, "UNPACKED", request.param)
    return request.param


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("outputs, inputs", SHAPES)
def test_linear(dtype: Any, outputs: int, inputs: int):
    random = np.random.RandomState(outputs + inputs)
    w_OI = random.standard_normal((outputs, inputs)).astype(dtype)
    bias_O = random.standard_normal(outputs).astype(dtype)
    for rows in ROWS:
        x_NI = random.standard_normal((rows, inputs)).astype(dtype)
        exact = np.einsum("ni,oi->no", x_NI.astype(np.float64), w_OI.astype(np.float64))
        largest = max(1, np.abs(exact).max(initial=0))
        bound = 4 * np.finfo(dtype).eps * max(1, inputs) ** 0.5 * largest
        for bias, expected in ((None, exact), (bias_O, exact + bias_O)):
            y_NO = linear(x_NI, w_OI, bias)
            assert y_NO.shape == (rows, outputs) and y_NO.dtype == dtype
            assert y_NO.flags.c_contiguous
            np.testing.assert_allclose(y_NO, expected, rtol=0, atol=bound)


def test_no_rows():
    assert linear(np.empty((0, 3)), np.ones((5, 3))).shape == (0, 5)


@pytest.mark.usefixtures("unpacked")
def test_a_read_only_weight_and_a_strided_input():
    """As memory-mapped shards and packed rows are."""
    random = np.random.RandomState(0)
    w_OI = random.standard_normal((70, 24))
    w_OI.flags.writeable = False
    x_NI = random.standard_normal((40, 48))[::2, ::2]
    for rows in (1, 3, 9, 20):
        np.testing.assert_allclose(linear(x_NI[:rows], w_OI), x_NI[:rows] @ w_OI.T, atol=1e-12)


@pytest.mark.parametrize("rows", [4, 17, 40, 41, 64, 65, 80, 81, 96, 97, 104, 105, 128, 129, 200])
def test_products_that_stay_in_columns(rows: int):
    """Two of them, one after the other, with what is filled up in between."""
    random = np.random.RandomState(rows)
    x_NI, w_OI = random.standard_normal((rows, 30)), random.standard_normal((270, 30))
    w_PO, bias_O = random.standard_normal((11, 270)), random.standard_normal(270)
    y_XON = linear_packed(pack_columns(x_NI), w_OI, bias_O)
    z_NP = unpack_columns(linear_packed([*map(np.tanh, y_XON)], w_PO), rows)
    assert z_NP.shape == (rows, 11) and z_NP.flags.c_contiguous
    np.testing.assert_allclose(z_NP, np.tanh(x_NI @ w_OI.T + bias_O) @ w_PO.T, atol=1e-12)


def test_few_columns_are_filled_up():
    """At most the 23 that make a full stack of 41: no stack consists of zeros alone."""
    for rows in range(1, 400):
        columns = sum(stack.shape[0] * stack.shape[2] for stack in pack_columns(np.ones((rows, 1))))
        assert rows <= columns <= rows + 23


def test_what_goes_by_columns(unpacked: bool):
    assert all(use_small_gemm(rows) is unpacked for rows in (4, 33, 128, 384))
    assert not any(use_small_gemm(rows) for rows in (0, 1, 3, 385, 512))
