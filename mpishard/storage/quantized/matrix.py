"""A quantized matrix in a checkpoint: which tensors store it, and any part of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from mpishard.config.quantization.scheme import Quantization, Scheme
from mpishard.errors import UserError, brief
from mpishard.storage.quantized.form import Form, Shape, Stored, Tensor
from mpishard.storage.quantized.forms import FORMS

# Tensors of a quantized module that are not read: scales of its inputs and outputs, which stay in
# float32 here, and the zero points that symmetric weights have in some files.
UNREAD = (
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "activation_scale",
    "output_scale",
    "output_zero_point",
    "weight_zero_point",
    "k_scale",
    "v_scale",
)

# A module with one of these is quantized, whatever the configuration says.
_MARKS = ("weight_packed", "qweight", "weight_scale_inv", "weight_scale")
_NARROW = ("F8_E4M3", "F8_E5M2", "I8", "U8")


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix (O, I) that is stored quantized, or one for each of several experts.

    `module` is what the names of its tensors begin with, and `present` are the ends of the names of
    the optional ones that are there."""

    module: str
    shape: Shape
    scheme: Scheme
    experts: tuple[int, ...] = ()  # the axis before the matrix, if there is one
    present: frozenset[str] = frozenset()

    @property
    def form(self) -> Form:
        """How it is stored."""
        return FORMS[self.scheme.form]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors, by their names in the checkpoint."""
        return {
            self.name_of(tensor): tensor
            for tensor in self.form.tensors(self.scheme, self.shape)
            if not tensor.optional or tensor.name in self.present
        }

    def name_of(self, tensor: Tensor) -> str:
        """The name of a tensor in the checkpoint."""
        return f"{self.module}{self.form.joint}{tensor.name}"

    def part(self, stored: Stored, rows: slice, columns: slice) -> np.ndarray:
        """``matrix[rows, columns]`` in float32. `stored` are the whole tensors of one matrix.

        Raises ValueError, with the name of a tensor, if a number is not finite, or a stored index
        or size is wrong."""
        problem = self.form.check(stored, self.scheme, self.shape)
        if problem:
            raise ValueError(problem)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            numbers = self.form.decode(stored, self.scheme, rows, columns)
        if not np.isfinite(numbers).all():
            raise ValueError(f"{self._infinite(stored)} has values that are infinite or not numbers")
        return numbers

    def _infinite(self, stored: Stored) -> str:
        for name, array in stored.items():
            if not np.isfinite(array.astype(np.float32)).all():
                return name
        return "its product with its scales"


def canonical(tensor: Tensor, shape: tuple[int, ...], experts: tuple[int, ...]) -> bool:
    """Whether a tensor of this `shape` is the one called for: axes of length 1 may be missing or
    added behind those of the experts."""
    own = shape[len(experts) :]
    return shape[: len(experts)] == experts and _long(own) == _long(tensor.shape)


def _long(shape: tuple[int, ...]) -> list[int]:
    return [length for length in shape if length != 1]
