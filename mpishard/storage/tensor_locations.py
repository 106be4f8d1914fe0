"""The locations of weights in a checkpoint.

Most weights are tensors of the names that `mpishard.config.weight_specs` has. But one tensor may
also hold all experts of a layer. In it gate and up are halves or alternate, and it may be
quantized. A `TensorLocation` says where in it a weight is, so that all other code sees one weight
for each expert."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import TypeAlias

from mpishard.config.model_config import ModelConfig, MoEConfig
from mpishard.config.weight_specs import WeightSpec, weight_specs
from mpishard.storage.mxfp4 import BLOCK_SIZE

Index: TypeAlias = tuple[int | slice, ...]


@dataclass(frozen=True)
class TensorLocation:
    """The location of a weight in the tensor `name`: ``tensor[index]``, or
    ``tensor.swapaxes(-2, -1)[index]`` if `transposed`.

    A `quantized` tensor is stored as two tensors, blocks and their scales: see
    `mpishard.storage.mxfp4`.
    """

    name: str
    shape: tuple[int, ...]  # of the tensor as stored or, if quantized, as dequantized
    index: Index = ()
    transposed: bool = False
    quantized: bool = False

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of the stored tensors."""
        if not self.quantized:
            return {self.name: self.shape}
        groups = (*self.shape[:-1], self.shape[-1] // BLOCK_SIZE)
        return {f"{self.name}_blocks": (*groups, BLOCK_SIZE // 2), f"{self.name}_scales": groups}


def locate_weights(config: ModelConfig, stored: Container[str]) -> dict[str, TensorLocation]:
    """The location of each weight of a model, by its name, in a checkpoint with the tensors
    `stored`. A missing weight has the location at which its family stores it."""
    locations = {}
    for weight in weight_specs(config):
        possible = _possible_locations(config, weight)
        there = (one for one in possible if any(name in stored for name in one.tensors))
        locations[weight.name] = next(there, possible[0])
    return locations


def _possible_locations(config: ModelConfig, weight: WeightSpec) -> list[TensorLocation]:
    locations = [TensorLocation(weight.name, weight.shape)]
    if config.moe is None or weight.layer is None:
        return locations
    names, prefix = config.moe.names, f"model.layers.{weight.layer}."
    if weight.field == "router":
        locations.append(TensorLocation(prefix + names.stacked.router, weight.shape))
    if weight.field == "e_score_correction_bias" and names.stacked.e_score_correction_bias:
        name = prefix + names.stacked.e_score_correction_bias
        locations.append(TensorLocation(name, weight.shape))
    if weight.expert is not None:
        together = _stacked_locations(config.moe, weight, weight.expert, prefix)
        locations = locations + together if names.separate else together
    return locations


def _stacked_locations(
    moe: MoEConfig, weight: WeightSpec, expert: int, prefix: str
) -> list[TensorLocation]:
    """The possible locations of a weight of an expert in tensors of all experts of its layer."""
    stacked, F = moe.names.stacked, moe.moe_intermediate_size
    if stacked.transposed:  # then the outputs of gate and up alternate
        halves = {"gate": slice(0, None, 2), "up": slice(1, None, 2)}
    else:
        halves = {"gate": slice(0, F), "up": slice(F, 2 * F)}
    part, _, bias = weight.field.partition("_")
    if part in halves:
        name = stacked.gate_up_bias if bias else stacked.gate_up
        shape = (moe.num_experts, 2 * F, *weight.shape[1:])
        index: Index = (expert, halves[part])
    else:
        name = stacked.down_bias if bias else stacked.down
        shape = (moe.num_experts, *weight.shape)
        index = (expert,)
    name = f"{prefix}{name}"
    if bias or not stacked.transposed:
        return [TensorLocation(name, shape, index)]
    swapped = (shape[0], shape[2], shape[1])
    locations = [TensorLocation(name, swapped, index, transposed=True)]
    if shape[-1] % BLOCK_SIZE == 0:
        locations.append(TensorLocation(name, shape, index, quantized=True))
    return locations
