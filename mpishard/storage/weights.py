"""The weights of one rank, already cut, from shards or straight from a checkpoint."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

from mpishard.description.layout import check_tensor_parallel
from mpishard.description.partition import weight_table
from mpishard.errors import UserError
from mpishard.storage.arrays import map_file
from mpishard.storage.rank_file import Part
from mpishard.storage.shards import ShardDirectory
from mpishard.storage.source import Source


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
        file = map_file(source.file(rank))
        parts = source.parts(rank)
        return {name: _load_part(part, file, dtype) for name, part in parts.items()}
    return {
        weight.name: source.read(weight.name, weight.slices(source.config, tp, rank), dtype)
        for weight in weight_table(source.config)
    }


def _load_part(part: Part, file: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    if part.array.dtype == dtype:
        return part.array.view(file)
    part.check()
    return part.array.view(file).astype(dtype)
