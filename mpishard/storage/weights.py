"""Loads the shard of the weights that a rank needs, from shards or from a checkpoint."""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import DTypeLike

from mpishard.config.weight_sharding import WeightSharding
from mpishard.config.weight_specs import WeightSpec, check_weight_sharding, specs_of_shard
from mpishard.errors import UserError
from mpishard.storage.arrays import map_file
from mpishard.storage.shards import ShardDirectory
from mpishard.storage.source import Source

# Weights begin at multiples of this number of bytes, a line of the processor's cache.
ALIGNMENT = 64


def check_fits(source: Source, sharding: WeightSharding) -> None:
    """Refuse a sharding in which a source cannot be loaded (UserError). Shards have one sharding; a
    checkpoint can be sharded in every way that passes `check_weight_sharding`."""
    check_weight_sharding(source.config, sharding)
    if isinstance(source, ShardDirectory) and source.sharding != sharding:
        raise UserError(
            f"{source.path} holds shards for {source.sharding}, not for {sharding}: "
            f"start {source.sharding.ranks} ranks with {source.sharding}, "
            f"or make others with `mpishard shard {source.path} OUT {sharding}`"
        )


def load_weights(
    source: Source, sharding: WeightSharding, index: int, dtype: DTypeLike = np.float32
) -> dict[str, np.ndarray]:
    """Shard `index` of the weights under `sharding`, by Hugging Face names, in `dtype`; weights
    that are kept in float32 are never narrower.

    Shards stored in `dtype` are memory-mapped and read-only: nothing is copied, and the processes
    of a machine share the pages. Shards in another dtype are checked and converted, and so are
    experts that a placement takes from the files of other ranks. From a checkpoint, the slices of
    the shard are read and converted. Raises UserError as `check_fits` does, and for damaged shards
    that are converted.
    """
    check_fits(source, sharding)
    held = specs_of_shard(source.config, sharding, index)
    if isinstance(source, ShardDirectory):
        return _load_shards(source, sharding, index, held, dtype)
    weights = _allocate(source, sharding, index, held, dtype)
    for weight in held:
        slices = weight.slices(source.config, sharding, index)
        source.copy_to(weights[weight.name], weight.name, slices)
    return weights


def _load_shards(
    source: ShardDirectory,
    sharding: WeightSharding,
    index: int,
    held: list[WeightSpec],
    dtype: DTypeLike,
) -> dict[str, np.ndarray]:
    file, parts = map_file(source.file(index)), source.parts(index)
    mapped = {
        weight.name: parts[weight.name].array.view(file)
        for weight in held
        if weight.name in parts and source.dtype(weight.name) == _dtype_of(weight, dtype)
    }
    others = [weight for weight in held if weight.name not in mapped]
    converted = _allocate(source, sharding, index, others, dtype)
    for weight in others:
        if weight.name in parts:
            parts[weight.name].check()
            converted[weight.name][...] = parts[weight.name].array.view(file)
        else:
            slices = weight.slices(source.config, sharding, index)
            converted[weight.name][...] = source.read(weight.name, slices)
    weights = mapped | converted
    return {weight.name: weights[weight.name] for weight in held}


def _dtype_of(weight: WeightSpec, dtype: DTypeLike) -> np.dtype:
    return np.promote_types(dtype, np.float32) if weight.keep_fp32 else np.dtype(dtype)


def _allocate(
    source: Source, sharding: WeightSharding, index: int, held: list[WeightSpec], dtype: DTypeLike
) -> dict[str, np.ndarray]:
    """Arrays for these weights, one after the other in a single allocation. NumPy asks the system
    to back a large allocation with huge pages; matrix products read these some 4 % faster than
    pages of 4 KiB."""
    shapes = {weight.name: weight.shard_shape(source.config, sharding, index) for weight in held}
    dtypes = {weight.name: _dtype_of(weight, dtype) for weight in held}
    places, stop = {}, 0
    for name, shape in shapes.items():
        size = prod(shape) * dtypes[name].itemsize
        places[name] = slice(stop, stop + size)
        stop += -(-size // ALIGNMENT) * ALIGNMENT
    room = np.empty(stop + ALIGNMENT, np.uint8)
    room = room[-room.ctypes.data % ALIGNMENT :]
    return {name: room[places[name]].view(dtypes[name]).reshape(shapes[name]) for name in shapes}
