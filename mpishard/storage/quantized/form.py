"""What a storage form consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from mpishard.config.quantization.scheme import Scheme
from mpishard.storage.arrays import DTYPES

Dtypes = Mapping[str, np.dtype]  # by their names in safetensors
Stored = Mapping[str, np.ndarray]  # by `Tensor.name`
Shape = tuple[int, int]  # (O, I)

FLOATS: Dtypes = {"F32": DTYPES["float32"], "F16": DTYPES["float16"], "BF16": DTYPES["bfloat16"]}
FP8: Dtypes = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}
POWERS_OF_TWO: Dtypes = {"F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu)}
INT8: Dtypes = {"I8": np.dtype(np.int8)}
WORDS: Dtypes = {"I32": np.dtype(np.uint32), "U32": np.dtype(np.uint32)}
BYTES: Dtypes = {"U8": np.dtype(np.uint8)}
INDICES: Dtypes = {"I64": np.dtype(np.int64), "I32": np.dtype(np.int32)}


@dataclass(frozen=True)
class Tensor:
    """One of the tensors that store a matrix. `name` is the end of its name. A file may leave out
    axes of length 1 of its `shape`."""

    name: str
    dtypes: Dtypes
    shape: tuple[int, ...]
    optional: bool = False


# The end of the name of a tensor, and what is wrong with it.
Problem = tuple[str, str]


def nothing_to_check(stored: Stored, scheme: Scheme, shape: Shape) -> Problem | None:
    """For forms without stored indices or sizes."""
    return None


@dataclass(frozen=True)
class Form:
    """A storage form. `tensors` gives the tensors of a matrix; `decode` a part of it, in float32;
    `check` what is wrong with stored indices or sizes, or None."""

    title: str
    tensors: Callable[[Scheme, Shape], list[Tensor]]
    decode: Callable[[Stored, Scheme, slice, slice], np.ndarray]
    check: Callable[[Stored, Scheme, Shape], Problem | None] = nothing_to_check
    joint: str = "."  # between the name of the module and that of the tensor


def count(length: int, block: int | None) -> int:
    """The number of blocks in a length; the last one may be shorter."""
    return 1 if block is None else -(-length // block)
