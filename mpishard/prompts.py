"""What Python hands over as prompts: one or several, as texts or as token ids."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mpishard.errors import brief

Prompt = str | Sequence[int]

RIGHT = "give a text, a sequence of token ids, or several of these in a list or another iterable"


def as_prompts(given: Prompt | Iterable[Prompt], what: str = "prompt") -> list[str | list[int]]:
    """The prompts in `given`: a text is one, and so is a sequence of token ids, of which an empty
    one is none; any other iterable has one in each of its items. TypeError for anything else, which
    calls it `what`.

    >>> as_prompts("text"), as_prompts([1, 2]), as_prompts(["a", [1, 2]])
    (['text'], [[1, 2]], ['a', [1, 2]])
    >>> as_prompts(iter(["a", "b"]))
    ['a', 'b']
    """
    if isinstance(given, str):
        return [given]
    if isinstance(given, bytes | bytearray | Mapping | set | frozenset) or not _iterates(given):
        raise TypeError(f"the {what}s are {_kind(given)}: {RIGHT}")
    items: list[Any] = list(given)
    if items and all(map(_is_id, items)):
        return [[operator.index(one) for one in items]]
    return [_as_prompt(item, f"{what} {place}") for place, item in enumerate(items, 1)]


def _as_prompt(item: Any, what: str) -> str | list[int]:
    if isinstance(item, str):
        return item
    if isinstance(item, bytes | bytearray | Mapping | set | frozenset) or not _iterates(item):
        raise TypeError(f"{what} is {_kind(item)}: {RIGHT}")
    ids = list(item)
    for place, one in enumerate(ids, 1):
        if not _is_id(one):
            raise TypeError(f"token {place} of {what} is {_kind(one)}: token ids are integers")
    return [operator.index(one) for one in ids]


def _is_id(value: Any) -> bool:
    """Whether something is an integer, of Python, NumPy or another library whose tensors of no
    dimension are numbers. No truth value is one."""
    if isinstance(value, bool | np.bool_) or getattr(value, "shape", ()) != ():
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _iterates(value: Any) -> bool:
    is_scalar = isinstance(value, np.ndarray) and value.ndim == 0
    return hasattr(type(value), "__iter__") and not is_scalar


def _kind(value: Any) -> str:
    """A value and its type, for a sentence."""
    return f"{brief(repr(value), 60)}, of type {type(value).__name__}"
