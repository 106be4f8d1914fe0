"""The weights of one rank, already cut, from shards or straight from a checkpoint."""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import DTypeLike

from mpishard.description.layout import check_tensor_parallel
from mpishard.description.partition import weight_table
from mpishard.errors import UserError
from mpishard.storage.arrays import map_file
from mpishard.storage.shards import ShardDirectory
from mpishard.storage.source import Source

# Bytes to multiples of which the weights of an allocation are placed: a line of the cache.
ALIGNMENT = 64


def check_fits(source: Source, tp: int) -> None:
    """Refuse a layout that a source cannot be loaded in (UserError): shards are for one `tp`, a
    checkpoint can be cut for any up to the number of query heads."""
    check_tensor_parallel(source.config, tp)
    if isinstance(source, ShardDirectory) and source.tp != tp:
        raise UserError(
            f"{source.path} holds shards for --tp {source.tp}, not for --tp {tp}: "
            f"run `mpirun -n {source.tp} mpishard …` with --tp {source.tp}, "
            f"or `mpishard shard {source.path} OUT --tp {tp}`"
        )


def load_weights(
    source: Source, tp: int, rank: int, dtype: DTypeLike = np.float32
) -> dict[str, np.ndarray]:
    """The parts of all weights that tensor-parallel rank `rank` of `tp` holds, by their Hugging
    Face names, in `dtype`.

    Shards stored in `dtype` are memory-mapped and read-only: nothing is copied or read before it is
    used, and the processes of a machine share the pages. Other shards are checked and converted;
    of a checkpoint the rank's slices are read and converted. Raises UserError as `check_fits`
    does, and for damaged shards where they are converted.
    """
    check_fits(source, tp)
    if isinstance(source, ShardDirectory):
        file, parts = map_file(source.file(rank)), source.parts(rank)
        if source.dtype(next(iter(parts))) == dtype:
            return {name: part.array.view(file) for name, part in parts.items()}
        weights = _allocate({name: part.array.shape for name, part in parts.items()}, dtype)
        for name, part in parts.items():
            part.check()
            weights[name][...] = part.array.view(file)
        return weights
    cuts = {w.name: w.slices(source.config, tp, rank) for w in weight_table(source.config)}
    shards = {name: source.view(name, slices) for name, slices in cuts.items()}
    weights = _allocate({name: shard.shape for name, shard in shards.items()}, dtype)
    for name, shard in shards.items():
        weights[name][...] = shard
    return weights


def _allocate(shapes: dict[str, tuple[int, ...]], dtype: DTypeLike) -> dict[str, np.ndarray]:
    """Arrays of these shapes, one after the other in a single allocation: NumPy asks the system to
    back a large one with huge pages, from which products read some 4 % faster than from pages of
    4 KiB."""
    dtype = np.dtype(dtype)
    places, stop = {}, 0
    for name, shape in shapes.items():
        start, stop = stop, stop + -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        places[name] = slice(start, start + prod(shape) * dtype.itemsize)
    room = np.empty(stop + ALIGNMENT, np.uint8)
    room = room[-room.ctypes.data % ALIGNMENT :]
    return {name: room[places[name]].view(dtype).reshape(shapes[name]) for name in shapes}
