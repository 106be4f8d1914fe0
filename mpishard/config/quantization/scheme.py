"""Storage forms of quantized weights, as data.

A `Scheme` names a form of `mpishard.storage.quantized` and gives its parameters. A `Quantization`
says which modules have which scheme.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Scheme:
    """How the weight (O, I) of a module is stored. A form ignores the parameters that it does not
    have."""

    form: str  # a name in `mpishard.storage.quantized.forms.FORMS`
    block: tuple[int | None, int | None] = (None, None)  # rows, columns of one scale; None: all
    scale: str = "weight_scale"  # the last part of the name of the scales
    bits: int = 4  # of an element that is packed into words
    symmetric: bool = True  # no zero points
    ordered: bool = False  # the columns' groups are stored (desc_act)
    zeros_less_one: bool = False  # a zero point z is stored as z - 1


Patterns = tuple[re.Pattern[str], ...]  # which match a name from its first character on


@dataclass(frozen=True)
class Quantization:
    """The schemes of a checkpoint. The first one with a matching pattern holds for a module, unless
    a pattern of `ignored` matches, too."""

    method: str  # as quant_method spells it
    schemes: tuple[tuple[Patterns, Scheme], ...]
    ignored: Patterns = ()
    within: bool = False  # in a multimodal checkpoint, where modules have other names

    def scheme(self, module: str) -> Scheme | None:
        """The scheme of the weight of `module`, None if it is not quantized. Linear modules that no
        pattern leaves out may be stored unquantized nevertheless: routers and heads often are. A
        pattern may also have the name that the module has in a multimodal checkpoint."""
        inner = module.removeprefix("model.")
        names = (module, f"language_model.{module}", f"model.language_model.{inner}")
        if any(matches(self.ignored, name) for name in names):
            return None
        for patterns, scheme in self.schemes:
            if any(matches(patterns, name) for name in names):
                return scheme
        return None


EVERY = (re.compile(""),)  # matches every name


def matches(patterns: Iterable[re.Pattern[str]], module: str) -> bool:
    """Whether one of the `patterns` matches the name of a module."""
    return any(pattern.match(module) for pattern in patterns)
