"""The tensors of the language model in a multimodal checkpoint, under the names of its family.

The same language model is stored as ``language_model.model.layers.0…`` with
``language_model.lm_head``, as ``model.language_model.layers.0…`` with ``lm_head``, or, in older
files, as ``model.layers.0…`` beside ``visual.…``. Whatever else there is belongs to towers and
projectors, and is not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from mpishard.errors import UserError, brief

T = TypeVar("T")

_PREFIX = re.compile(r"(?:model\.)?language_model\.")
_WITHOUT_PREFIX = ("lm_head.", "model.embed_tokens.", "model.layers.", "model.norm.")


def text_half(tensors: Mapping[str, T]) -> tuple[dict[str, T], list[str]]:
    """The tensors of the language model by the names that they have without a wrapper, and the
    stored names of the others. Raises UserError if two tensors have the same name then.

    >>> text_half({"model.language_model.norm.weight": 1, "vision_tower.norm.weight": 2})
    ({'model.norm.weight': 1}, ['vision_tower.norm.weight'])
    """
    names = {stored: _name(stored) for stored in tensors}
    text: dict[str, T] = {}
    for stored, name in names.items():
        if name in text:
            raise UserError(f"the checkpoint has {brief(stored)} and another {brief(name)}")
        if name is not None:
            text[name] = tensors[stored]
    return text, [stored for stored, name in names.items() if name is None]


def _name(stored: str) -> str | None:
    prefix = _PREFIX.match(stored)
    if prefix is None:
        return stored if stored.startswith(_WITHOUT_PREFIX) else None
    name = stored[prefix.end() :]
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def modules_of(names: Iterable[str]) -> str:
    """The modules that tensors belong to, by the first parts of their names.

    >>> modules_of(["model.visual.a.weight", "vision_tower.b", "vision_tower.c"])
    'model.visual, vision_tower'
    """
    parts = (name.removeprefix("model.").partition(".")[0] for name in names)
    prefixes = ("model." if name.startswith("model.") else "" for name in names)
    return ", ".join(sorted({prefix + part for prefix, part in zip(prefixes, parts, strict=True)}))
