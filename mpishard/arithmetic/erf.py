"""The error function of arrays, which NumPy does not have.

``erf(x) = 1 - exp(-x**2) * erfcx(x)`` for positive x, where erfcx is smooth: a Chebyshev series in
``(x - c) / (x + c)`` reaches a float's precision with few terms (Shepherd and Laframboise 1981,
Mathematics of Computation 36). The series is interpolated from `math.erfc` on import.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.polynomial import chebyshev

_CENTRE = 3.0
_END = 6.0  # where the error function is 1 in float64
_REACH = (_END - _CENTRE) / (_END + _CENTRE)  # (x - c) / (x + c) there; it is -1 at 0


def _series(degree: int) -> list[float]:
    """The coefficients of erfcx on 0 to 6, over the variable of `_argument`."""

    def erfcx(u: float) -> float:
        t = (u + 1) / 2 * (_REACH + 1) - 1
        x = _CENTRE * (1 + t) / (1 - t)
        return math.erfc(x) * math.exp(x * x)

    values = chebyshev.chebinterpolate(np.vectorize(erfcx), degree)
    return [float(value) for value in values]


_SERIES = {np.dtype(np.float32): _series(9), np.dtype(np.float64): _series(18)}


def erf(x: np.ndarray) -> np.ndarray:
    """The error function of each element, to the precision of float32 or float64."""
    coefficients = _SERIES[x.dtype]
    size = np.minimum(np.abs(x), x.dtype.type(_END))
    u = _argument(size)
    u2 = 2 * u
    # Clenshaw's recurrence.
    later, last = np.zeros_like(u), np.full_like(u, coefficients[-1])
    for coefficient in coefficients[-2:0:-1]:
        later, last = last, u2 * last - later + coefficient
    erfcx = u * last - later + coefficients[0]
    return np.copysign(1 - np.exp(-size * size) * erfcx, x)


def _argument(x: np.ndarray) -> np.ndarray:
    """From -1 at 0 to 1 at 6, and fast where erfcx is steep."""
    return ((x - _CENTRE) / (x + _CENTRE) + 1) * (2 / (_REACH + 1)) - 1
