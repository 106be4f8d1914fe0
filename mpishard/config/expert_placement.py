"""The experts of each rank, if these are not simply blocks. An expert that many tokens choose may
have copies on several ranks (redundant experts: DeepSeek-V3, arXiv 2412.19437, section 3.4).

An example of the JSON file, for 3 experts in layer 1 under ``--ep 2``, with expert 0 on both ranks:

    {"format": "mpishard expert placement 1", "experts": 3, "ep": 2,
     "layers": {"1": [[0, 1], [0, 2]]}}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mpishard.config.model_config import MoEConfig
from mpishard.errors import UserError, brief

FORMAT = "mpishard expert placement 1"


@dataclass(frozen=True)
class ExpertPlacement:
    """The experts of each expert-parallel rank, by layer. Every rank has some, every expert is on
    some rank, and no rank has one twice."""

    experts: int
    layers: dict[int, list[list[int]]]

    @property
    def ep(self) -> int:
        """The number of ranks that the experts are placed on."""
        return len(next(iter(self.layers.values())))

    def replicas(self, layer: int, expert: int) -> int:
        """The number of ranks that hold an expert of a layer."""
        return sum(expert in experts_by_rank for experts_by_rank in self.layers[layer])

    @property
    def content(self) -> dict[str, Any]:
        """The content of the file."""
        layers = {str(layer): experts_by_rank for layer, experts_by_rank in self.layers.items()}
        return {"format": FORMAT, "experts": self.experts, "ep": self.ep, "layers": layers}

    @classmethod
    def of(cls, content: dict[str, Any], moe: MoEConfig, ep: int, where: str) -> ExpertPlacement:
        """The placement in the `content` of a file. Raises a UserError that begins with `where` if
        it is not a placement of the experts of `moe` on `ep` ranks."""
        if content.get("format") != FORMAT:
            raise UserError(
                f'{where} has the "format" {brief(repr(content.get("format")))}, not {FORMAT!r}: '
                "make it with `mpishard eplb`"
            )
        for field, right, of in (
            ("experts", moe.num_experts, f"the model has {moe.num_experts}"),
            ("ep", ep, f"--ep is {ep}"),
        ):
            if content.get(field) != right:
                raise UserError(
                    f'{where} has "{field}" {brief(repr(content.get(field)))}, but {of}: make '
                    "another with `mpishard eplb`"
                )
        layers = content.get("layers")
        numbers = [str(layer) for layer, is_moe_layer in enumerate(moe.layers) if is_moe_layer]
        if not isinstance(layers, dict) or sorted(layers) != sorted(numbers):
            found = brief(", ".join(layers) if isinstance(layers, dict) else str(layers))
            raise UserError(
                f"{where} has the layers {found}, but those with experts are {', '.join(numbers)}"
            )
        for layer in numbers:
            _check_layer(layers[layer], moe.num_experts, ep, f"{where}, layer {layer}")
        return cls(moe.num_experts, {int(layer): layers[layer] for layer in numbers})


def _check_layer(experts_by_rank: Any, experts: int, ep: int, where: str) -> None:
    if not _is_list_of(list, experts_by_rank) or len(experts_by_rank) != ep:
        raise UserError(f"{where} must be a list of {ep} lists, of the experts of each rank")
    for rank, numbers in enumerate(experts_by_rank):
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
    missing = set(range(experts)).difference(*experts_by_rank)
    if missing:
        raise UserError(f"{where} has expert {min(missing)} on no rank")


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is kind for one in value)


def num_physical_per_rank(experts: int, replicas: int, ep: int) -> int:
    """The number of physical experts of each of `ep` ranks, for `experts` and as many redundant
    `replicas`. Raises UserError if it cannot be the same on all ranks, or if a rank would need two
    copies of an expert."""
    if not 1 <= ep <= experts:
        raise UserError(
            f"--ep {ep} must be 1 to the {experts} experts: a rank without an expert would have "
            "nothing to do"
        )
    most = experts * (ep - 1)
    if not 0 <= replicas <= most:
        raise UserError(
            f"--redundant-experts {replicas} must be 0 to {most}: more than one copy of each of "
            f"{experts} experts on each of {ep} ranks is of no use"
        )
    slots, over = divmod(experts + replicas, ep)
    if over:
        near: Sequence[int] = [c for c in (replicas - over, replicas - over + ep) if 0 <= c <= most]
        raise UserError(
            f"--redundant-experts {replicas} makes {experts + replicas} slots, which --ep {ep} "
            f"ranks cannot have equally many of: use --redundant-experts "
            f"{' or '.join(map(str, near))}"
        )
    return slots
