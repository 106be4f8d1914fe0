"""Which ranks have which experts, where these are not simply dealt in blocks: experts that many
tokens choose may have copies on several ranks (redundant experts: DeepSeek-V3, arXiv 2412.19437,
section 3.4).

As a JSON file, for 3 experts in layer 1 on the ranks of ``--ep 2``, expert 0 on both:

    {"format": "mpishard expert placement 1", "experts": 3, "ep": 2,
     "layers": {"1": [[0, 1], [0, 2]]}}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mpishard.description.config import Moe
from mpishard.errors import UserError, brief

FORMAT = "mpishard expert placement 1"


@dataclass(frozen=True)
class ExpertPlacement:
    """The experts of each rank of the ``ep`` group, by layer; on every rank some, all somewhere,
    none twice on a rank."""

    experts: int
    layers: dict[int, list[list[int]]]

    @property
    def ep(self) -> int:
        """The number of ranks that the experts are placed on."""
        return len(next(iter(self.layers.values())))

    def copies(self, layer: int, expert: int) -> int:
        """The number of ranks that have an expert."""
        return sum(expert in held for held in self.layers[layer])

    @property
    def content(self) -> dict[str, Any]:
        """What the file says."""
        layers = {str(layer): held for layer, held in self.layers.items()}
        return {"format": FORMAT, "experts": self.experts, "ep": self.ep, "layers": layers}

    @classmethod
    def of(cls, content: dict[str, Any], moe: Moe, ep: int, where: str) -> ExpertPlacement:
        """What a file says; UserError, that begins with `where`, if it is none, or not one for the
        mixture and `ep` ranks."""
        if content.get("format") != FORMAT:
            raise UserError(
                f'{where} has the "format" {brief(repr(content.get("format")))}, not {FORMAT!r}: '
                "make it with `mpishard place`"
            )
        for field, right, of in (
            ("experts", moe.experts, f"the model has {moe.experts}"),
            ("ep", ep, f"--ep is {ep}"),
        ):
            if content.get(field) != right:
                raise UserError(
                    f'{where} has "{field}" {brief(repr(content.get(field)))}, but {of}: make '
                    "another with `mpishard place`"
                )
        layers = content.get("layers")
        numbers = [str(layer) for layer, is_mixture in enumerate(moe.layers) if is_mixture]
        if not isinstance(layers, dict) or sorted(layers) != sorted(numbers):
            found = brief(", ".join(layers) if isinstance(layers, dict) else str(layers))
            raise UserError(
                f"{where} has the layers {found}, but those with experts are {', '.join(numbers)}"
            )
        for layer in numbers:
            _check_layer(layers[layer], moe.experts, ep, f"{where}, layer {layer}")
        return cls(moe.experts, {int(layer): layers[layer] for layer in numbers})


def _check_layer(held: Any, experts: int, ep: int, where: str) -> None:
    if not _is_list_of(list, held) or len(held) != ep:
        raise UserError(f"{where} must be a list of {ep} lists, of the experts of each rank")
    for rank, numbers in enumerate(held):
        if not _is_list_of(int, numbers) or not numbers:
            found = brief(repr(numbers))
            raise UserError(f"{where}, rank {rank} must be a list of experts, not {found}")
        for number in numbers:
            if not 0 <= number < experts:
                found = brief(str(number))
                raise UserError(
                    f"{where}, rank {rank} has expert {found}, but they are 0 to {experts - 1}"
                )
            if numbers.count(number) > 1:
                raise UserError(f"{where}, rank {rank} has expert {number} twice")
    missing = set(range(experts)).difference(*held)
    if missing:
        raise UserError(f"{where} has expert {min(missing)} on no rank")


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is kind for one in value)


def slots_of_each(experts: int, copies: int, ep: int) -> int:
    """The slots of each of `ep` ranks for so many experts and further `copies`; UserError where
    they cannot be the same on all, or a rank would need an expert twice."""
    if not 1 <= ep <= experts:
        raise UserError(
            f"--ep {ep} must be 1 to the {experts} experts: a rank without an expert would have "
            "nothing to do"
        )
    most = experts * (ep - 1)
    if not 0 <= copies <= most:
        raise UserError(
            f"--copies {copies} must be 0 to {most}: more than one copy of each of {experts} "
            f"experts on each of {ep} ranks is of no use"
        )
    slots, over = divmod(experts + copies, ep)
    if over:
        near: Sequence[int] = [c for c in (copies - over, copies - over + ep) if 0 <= c <= most]
        raise UserError(
            f"--copies {copies} makes {experts + copies} slots, which --ep {ep} ranks cannot have "
            f"equally many of: use --copies {' or '.join(map(str, near))}"
        )
    return slots
