"""A weight and its bias: one object that is called with activations.

How BLAS is fed stands in `mpishard.arithmetic.gemm`. Where its fastest path wants activations
standing in columns, a chain of products may keep them so: see `Packed`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpishard.arithmetic.gemm import (
    linear,
    linear_packed,
    pack_columns,
    unpack_columns,
    use_small_gemm,
)


@dataclass(frozen=True)
class Packed:
    """Activations of `rows` tokens as `gemm.pack_columns` lays them out for the next product."""

    columns: list[np.ndarray]
    rows: int


@dataclass(frozen=True)
class Linear:
    """``y = x @ weight.T + bias``, for this rank's shard of both.

    Column-parallel weights (Megatron-LM's word: the output is sharded) are called. Row-parallel
    ones (the input is sharded) give a `partial` sum, to which `add_bias` adds the bias once a
    collective has completed it. With `keep_packed` the output goes into another `Linear`, and may
    come as `Packed`.
    """

    weight: np.ndarray  # (O, I)
    bias: np.ndarray | None = None  # (O,)
    keep_packed: bool = False

    def __call__(self, x_NI: Any) -> Any:
        return self._multiply(x_NI, self.bias)

    def partial(self, x_NI: Any) -> np.ndarray:
        """``x @ weight.T``: (N, O), a partial sum where the rows of `x` are sharded."""
        return self._multiply(x_NI, None)

    def add_bias(self, y_NO: np.ndarray) -> np.ndarray:
        """``y + bias``: (N, O)."""
        return y_NO if self.bias is None else y_NO + self.bias

    def _multiply(self, x: Any, bias_O: np.ndarray | None) -> Any:
        if not isinstance(x, Packed):
            if not (self.keep_packed and use_small_gemm(len(x))):
                return linear(x, self.weight, bias_O)
            x = Packed(pack_columns(x), len(x))
        y = Packed(linear_packed(x.columns, self.weight, bias_O), x.rows)
        return y if self.keep_packed else unpack_columns(y.columns, y.rows)


def elementwise(function: Callable[..., np.ndarray]) -> Callable[..., Any]:
    """`function` of arrays element by element, applied to activations in either form."""

    def either(*operands: Any) -> Any:
        if not isinstance(operands[0], Packed):
            return function(*operands)
        columns = zip(*(operand.columns for operand in operands), strict=True)
        return Packed([function(*parts) for parts in columns], operands[0].rows)

    return either
