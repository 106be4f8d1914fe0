"""Where checkpoints keep the weights that the partition table names.

Mostly under those names. But the experts of a layer may also lie together in one tensor, in which
gate and up are halves or take turns, and this may be quantized; `Placement` says where in it one
weight lies, so that everything else sees experts one by one.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import TypeAlias

from mpishard.description.config import ModelConfig, Moe
from mpishard.description.partition import Weight, weight_table
from mpishard.storage.mxfp4 import GROUP

Index: TypeAlias = tuple[int | slice, ...]


@dataclass(frozen=True)
class Placement:
    """A weight's place: ``tensor[index]``, or ``tensor.swapaxes(-2, -1)[index]`` if `transposed`.

    A `quantized` tensor is stored as two, of blocks and of their scales: `mpishard.storage.mxfp4`.
    """

    name: str
    shape: tuple[int, ...]  # of the tensor, as it is stored or, if quantized, as it comes out
    index: Index = ()
    transposed: bool = False
    quantized: bool = False

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of what is stored."""
        if not self.quantized:
            return {self.name: self.shape}
        groups = (*self.shape[:-1], self.shape[-1] // GROUP)
        return {f"{self.name}_blocks": (*groups, GROUP // 2), f"{self.name}_scales": groups}


def find_places(config: ModelConfig, stored: Container[str]) -> dict[str, Placement]:
    """Where each weight of a model lies in a checkpoint of the tensors `stored`. A weight that is
    nowhere has the place where its family stores it."""
    places = {}
    for weight in weight_table(config):
        possible = _possible_places(config, weight)
        there = (place for place in possible if any(name in stored for name in place.tensors))
        places[weight.name] = next(there, possible[0])
    return places


def _possible_places(config: ModelConfig, weight: Weight) -> list[Placement]:
    places = [Placement(weight.name, weight.shape)]
    if config.moe is None or weight.layer is None:
        return places
    names, prefix = config.moe.names, f"model.layers.{weight.layer}."
    if weight.field == "router":
        places.append(Placement(prefix + names.stacked.router, weight.shape))
    if weight.expert is not None:
        together = _stacked_places(config.moe, weight, weight.expert, prefix)
        places = places + together if names.separate else together
    return places


def _stacked_places(moe: Moe, weight: Weight, expert: int, prefix: str) -> list[Placement]:
    """Where an expert's weight lies among those of all experts of its layer."""
    stacked, F = moe.names.stacked, moe.ffn
    if stacked.transposed:  # then the outputs of gate and up take turns
        halves = {"gate": slice(0, None, 2), "up": slice(1, None, 2)}
    else:
        halves = {"gate": slice(0, F), "up": slice(F, 2 * F)}
    part, _, bias = weight.field.partition("_")
    if part in halves:
        name = stacked.gate_up_bias if bias else stacked.gate_up
        shape = (moe.experts, 2 * F, *weight.shape[1:])
        index: Index = (expert, halves[part])
    else:
        name = stacked.down_bias if bias else stacked.down
        shape = (moe.experts, *weight.shape)
        index = (expert,)
    name = f"{prefix}{name}"
    if bias or not stacked.transposed:
        return [Placement(name, shape, index)]
    swapped = (shape[0], shape[2], shape[1])
    places = [Placement(name, swapped, index, transposed=True)]
    if shape[-1] % GROUP == 0:
        places.append(Placement(name, shape, index, quantized=True))
    return places
