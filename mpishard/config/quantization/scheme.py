"""Storage forms of quantized weights, as data.

A `Scheme` names a form of `mpishard.storage.quantized` and gives its parameters. A `Quantization`
says which modules have which scheme.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpishard.config.quantization.modules import Modules


@dataclass(frozen=True)
class Scheme:
    """How the weight (O, I) of a module is stored. A form ignores the parameters that it does not
    have."""

    form: str  # a name in `mpishard.storage.quantized.forms.FORMS`
    block: tuple[int | None, int | None] = (None, None)  # rows, columns of one scale; None: all
    scale: str = "weight_scale"  # the last part of the name of the scales …
    other_scale: str | None = None  # … or this, whichever a file has
    bits: int = 4  # of an element that is packed into words
    symmetric: bool = True  # no zero points
    ordered: bool = False  # the columns' groups are stored (desc_act)
    zeros_less_one: bool = False  # a zero point z is stored as z - 1


@dataclass(frozen=True)
class Quantization:
    """The schemes of a checkpoint. Of several schemes for a module the first holds, and none if the
    module is one of the `ignored`."""

    method: str  # as quant_method spells it
    schemes: tuple[tuple[Modules, Scheme], ...]
    ignored: Modules = Modules()
    within: bool = False  # in a multimodal checkpoint, whose files may have longer names

    def scheme(self, module: str) -> Scheme | None:
        """The scheme of the weight of `module`, None if it is not quantized. A module that has one
        may be stored unquantized nevertheless: routers and heads often are."""
        names = [module]
        if self.within:
            inner = module.removeprefix("model.")
            names += [f"language_model.{module}", f"model.language_model.{inner}"]
        if any(name in self.ignored for name in names):
            return None
        for modules, scheme in self.schemes:
            if any(name in modules for name in names):
                return scheme
        return None
