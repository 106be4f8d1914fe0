"""A quantized matrix in a checkpoint: which tensors store it, and any part of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from mpishard.config.quantization.scheme import Quantization, Scheme
from mpishard.errors import brief
from mpishard.storage.quantized.form import Form, Shape, Stored, Tensor
from mpishard.storage.quantized.forms import FORMS

# Tensors of a quantized module that are not read: scales of its inputs and outputs, which stay in
# float32 here, and the zero points that symmetric weights have in some files.
UNREAD = (
    "input_scale",
    "input_scale_ub",
    "input_zero_point",
    "input_global_scale",
    "activation_scale",
    "output_scale",
    "output_zero_point",
    "weight_zero_point",
)
CACHE_SCALES = ("q_scale", "k_scale", "v_scale", "prob_scale", "kv_scale")

# A module with one of these is quantized, whatever the configuration says.
_MARKS = ("weight_packed", "qweight", "weight_scale_inv", "weight_scale")
_NARROW = ("F8_E4M3", "F8_E5M2", "I8", "U8")


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix (O, I) that is stored quantized, or one of several experts.

    `module` is what the names of its tensors begin with, and `present` are the ends of the names of
    the optional ones that are there."""

    module: str
    shape: Shape
    scheme: Scheme
    present: frozenset[str] = frozenset()

    @property
    def form(self) -> Form:
        """How it is stored."""
        return FORMS[self.scheme.form]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors, by their names in the checkpoint."""
        return {
            self._name(tensor.name): tensor
            for tensor in self.form.tensors(self.scheme, self.shape)
            if not tensor.optional or tensor.name in self.present
        }

    def part(self, stored: Stored, rows: slice, columns: slice) -> np.ndarray:
        """``matrix[rows, columns]`` in float32. `stored` are the whole tensors of one matrix, by
        the ends of their names.

        Raises DamagedTensor if a number is not finite, or a stored index or size is wrong."""
        self.check(stored)
        with np.errstate(all="ignore"):
            numbers = self.form.decode(stored, self.scheme, rows, columns)
        if not np.isfinite(numbers).all():
            infinite = [name for name in stored if not _is_finite(stored[name])]
            end = infinite[0] if infinite else next(iter(stored))
            raise DamagedTensor(self._name(end), "has values that are infinite or not numbers")
        return numbers

    def check(self, stored: Stored) -> None:
        """Raises DamagedTensor if a stored index or size is wrong."""
        problem = self.form.check(stored, self.scheme, self.shape)
        if problem:
            raise DamagedTensor(self._name(problem[0]), problem[1])

    def _name(self, end: str) -> str:
        return f"{self.module}{self.form.joint}{end}"


class DamagedTensor(Exception):
    """A stored tensor that cannot be what it is, or cannot have its values."""

    def __init__(self, tensor: str, problem: str) -> None:
        super().__init__(f"{brief(tensor)} {problem}")
        self.tensor = tensor


def _is_finite(array: np.ndarray) -> bool:
    return bool(np.isfinite(array.astype(np.float32)).all())


def canonical(shape: tuple[int, ...], right: tuple[int, ...]) -> bool:
    """Whether a tensor of this `shape` holds the elements of one of the `right` shape in the same
    order: axes of length 1 may be missing or more."""
    return [n for n in shape if n != 1] == [n for n in right if n != 1]


def find_matrix(
    quantization: Quantization | None,
    name: str,
    shape: Shape,
    stored: Mapping[str, str],
) -> QuantizedMatrix | None:
    """The matrix (O, I), or that of each expert, that is stored quantized in place of the tensor
    `name`; None if it is not. `stored` has the dtypes of the tensors of the checkpoint.

    Raises DamagedTensor for a quantized matrix that the configuration says is not."""
    module = name.removesuffix(".weight")
    scheme = quantization.scheme(module) if quantization else None
    if scheme is None:
        _refuse_marked(quantization, module, stored)
        return None
    if (FORMS[scheme.form].joint == ".") != name.endswith(".weight"):
        return None
    if scheme.other_scale and f"{module}.{scheme.scale}" not in stored:
        if f"{module}.{scheme.other_scale}" in stored:
            scheme = replace(scheme, scale=scheme.other_scale)
    present = {tensor.name for tensor in FORMS[scheme.form].tensors(scheme, shape)}
    matrix = QuantizedMatrix(module, shape, scheme, frozenset(present))
    there = {
        tensor.name
        for own, tensor in matrix.tensors.items()
        if own in stored and (own != name or stored[own] in tensor.dtypes)
    }
    return replace(matrix, present=frozenset(there)) if there else None


def _refuse_marked(
    quantization: Quantization | None, module: str, stored: Mapping[str, str]
) -> None:
    marks = (f"{module}.{mark}" for mark in _MARKS)
    found = next((mark for mark in marks if mark in stored), None)
    if found is None and stored.get(f"{module}.weight") in _NARROW:
        found = f"{module}.weight"
    if found and quantization:
        raise DamagedTensor(
            found,
            "is stored quantized, but quantization_config leaves its module as it is: the list of "
            "modules that are not quantized must not match it",
        )
    if found:
        raise DamagedTensor(
            found,
            "is stored quantized, but config.json has no quantization_config: copy it from the "
            "quantization's own file, such as quantize_config.json",
        )
