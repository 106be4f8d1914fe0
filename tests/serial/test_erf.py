"""The error function against the one of Python's standard library."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mpishard.arithmetic.erf import erf


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 4e-7), (np.float64, 3e-15)])
def test_it_is_that_of_the_standard_library(dtype, tolerance):
    x = np.concatenate([np.linspace(-8, 8, 4001), [0.0, 40.0, -40.0]]).astype(dtype)
    found = erf(x)
    assert found.dtype == dtype
    expected = [math.erf(one) for one in x.tolist()]
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    np.testing.assert_array_equal(erf(np.array([np.inf, -np.inf], dtype)), [1, -1])
    assert np.isnan(erf(np.array([np.nan], dtype))).all()
