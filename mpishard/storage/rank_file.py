"""One HDF5 file of a shard directory: one shard of the weights.

The file describes itself. Its root carries the attributes ``format_version``, ``conversion``,
``dtype``, the mapping (``tp``, ``ep``, ``ranks``), ``rank`` and ``config`` (config.json). Every
weight is a contiguous, page-aligned dataset with the name of the global tensor and the attributes

===========  =======================================================================
names        the name of the global tensor; several names if tensors share the data
shape        the global tensor's shape
start, stop  the part of it in this file, for each axis
dtype        the type of the numbers: HDF5 has no bfloat16, so its bits are stored as uint16
crc32        the checksum of the bytes of the dataset
===========  =======================================================================
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mpishard.config.model_config import ModelConfig
from mpishard.config.weight_specs import WeightSpec, specs_of_shard
from mpishard.errors import UserError, brief
from mpishard.storage.arrays import DTYPES, StoredArray, checksum
from mpishard.storage.manifest import FORMAT_VERSION, Manifest, check_version

UNSEALED = 0  # the format version of a file that is being written

_FILE_OPTIONS: dict[str, Any] = {
    "libver": "v110",  # the first version with checksums of HDF5's metadata
    "alignment_threshold": 1,  # so that every dataset begins a page
    "alignment_interval": 4096,
    "meta_block_size": 1 << 16,  # keeps metadata together, apart from the data
    "locking": False,  # some network file systems have no locks
}
# Nothing is ever freed, and the search for free space would be very slow for many experts.
_NEW_FILE_OPTIONS = _FILE_OPTIONS | {"fs_strategy": "aggregate"}


def rank_file_name(rank: int, ranks: int) -> str:
    """The name of the file of a rank.

    >>> rank_file_name(0, 4)
    'rank-00000-of-00004.h5'
    """
    return f"rank-{rank:05d}-of-{ranks:05d}.h5"


def dtype_of(weight: WeightSpec, dtype: str) -> np.dtype:
    """The dtype of a weight in shards of `dtype`."""
    return DTYPES["float32" if weight.keep_fp32 else dtype]


@dataclass(frozen=True)
class Part:
    """The part of a weight in a rank file: the slice, its place in the file and its checksum."""

    name: str
    names: list[str]  # of the global tensors that share the data, as stored
    whole_shape: tuple[int, ...]
    held: tuple[slice, ...]
    array: StoredArray
    crc32: int

    def check(self) -> None:
        """Reads the data. Raises UserError if their checksum differs from the stored one."""
        computed = 0
        for block in self.array.blocks():
            computed = checksum(block, computed)
        self.compare(computed)

    def compare(self, computed: int) -> None:
        """Raises UserError if `computed` differs from the stored checksum."""
        if computed != self.crc32:
            raise UserError(
                f"{self.array.path} is damaged: {self.name} has checksum {computed:08x}, "
                f"but {self.crc32:08x} was stored with it"
            )


def create(
    path: Path, manifest: Manifest, rank: int, config: ModelConfig
) -> dict[str, StoredArray]:
    """Makes the file of a rank with space for each of its weights; the place of each weight.

    The file is not valid until `seal` has written the checksums. The caller writes the data
    directly into the file, without HDF5, which does not survive a full disk.
    """
    allocated = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    allocated.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    allocated.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with h5py.File(path, "x", **_NEW_FILE_OPTIONS) as file:
        file.attrs["format_version"] = UNSEALED
        for name, value in _identity(manifest, rank).items():
            file.attrs[name] = value
        file.attrs["config"] = _as_text(config.raw)
        return {
            weight.name: _create_dataset(file, weight, config, manifest, rank, allocated)
            for weight in specs_of_shard(config, manifest.sharding, rank)
        }


def _create_dataset(
    file: h5py.File,
    weight: WeightSpec,
    config: ModelConfig,
    manifest: Manifest,
    rank: int,
    allocated: h5py.h5p.PropDCID,
) -> StoredArray:
    dtype = dtype_of(weight, manifest.dtype)
    held = weight.slices(config, manifest.sharding, rank)
    shape = weight.shard_shape(config, manifest.sharding, rank)
    dataset = file.create_dataset(weight.name, shape, _stored_dtype(dtype), dcpl=allocated)
    dataset.attrs["names"] = [weight.name]
    dataset.attrs["shape"] = weight.shape
    dataset.attrs["start"] = [part.start for part in held]
    dataset.attrs["stop"] = [part.stop for part in held]
    dataset.attrs["dtype"] = dtype.name
    dataset.attrs["crc32"] = np.uint32(0)
    return StoredArray(Path(file.filename), dataset.id.get_offset() or 0, dtype, shape)


def seal(path: Path, checksums: dict[str, int]) -> None:
    """Writes the checksums of all weights, which makes the file valid, and syncs it to disk."""
    with h5py.File(path, "r+", **_FILE_OPTIONS) as file:
        for name, crc32 in checksums.items():
            file[name].attrs.modify("crc32", np.uint32(crc32))
        file.attrs.modify("format_version", FORMAT_VERSION)
    flush(path)


def _stored_dtype(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.uint16) if dtype == DTYPES["bfloat16"] else dtype


def flush(*paths: Path) -> None:
    """Syncs files or directories to disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def check_header(path: Path, manifest: Manifest, rank: int, config: dict[str, Any]) -> None:
    """Refuse a file that is not of `rank` in the conversion of `manifest`, or that is of another
    model (UserError with both values)."""
    with _opened(path) as file:
        attributes = _attributes(file)
    if attributes.get("format_version") == UNSEALED:
        raise UserError(f"{path} is unfinished: convert the model again with `mpishard shard`")
    check_version(path, attributes.get("format_version"))
    for name, value in _identity(manifest, rank).items():
        if attributes.get(name) != value:
            raise UserError(
                f"{path} says {name} {brief(str(attributes.get(name)))}, but "
                f"{brief(str(value))} belongs here: "
                f"the file is {_stranger(name)}"
            )
    if attributes.get("config") != _as_text(config):
        raise UserError(
            f"{path} was written for another model configuration than the config.json beside it"
        )


def _identity(manifest: Manifest, rank: int) -> dict[str, Any]:
    return {
        "conversion": manifest.conversion,
        "dtype": manifest.dtype,
        **manifest.mapping,
        "rank": rank,
    }


def _as_text(config: dict[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


def _stranger(attribute: str) -> str:
    if attribute == "rank":
        return "another rank's, swapped or renamed"
    if attribute == "conversion":
        return "from another conversion"
    return "from a conversion to another layout or dtype"


def read_parts(path: Path) -> dict[str, Part]:
    """The parts in a rank file, by the names of their weights. No weight is read."""
    with _opened(path) as file:
        return {name: _read_part(path, name, file) for name in file}


def _attributes(holder: h5py.File | h5py.Dataset) -> dict[str, Any]:
    """The attributes of a file or a dataset, as Python values and lists."""
    return {
        name: value.tolist() if isinstance(value, np.generic | np.ndarray) else value
        for name, value in holder.attrs.items()
    }


def _read_part(path: Path, name: str, file: h5py.File) -> Part:
    dataset, where = file[name], f"{path}: {brief(name)}"
    linked = not isinstance(file.get(name, getlink=True), h5py.HardLink)
    if linked or not isinstance(dataset, h5py.Dataset) or dataset.shape is None:
        raise UserError(f"{where} is not stored here as numbers")
    attributes = _attributes(dataset)
    _check_attributes(attributes, where)
    dtype = DTYPES[attributes["dtype"]]
    held = tuple(map(slice, attributes["start"], attributes["stop"]))
    offset = dataset.id.get_offset()  # None if the dataset is empty or not contiguous
    if dataset.dtype != _stored_dtype(dtype) or (offset is None and dataset.size > 0):
        raise UserError(
            f"{where} is not stored contiguously as {dtype.name}, so it cannot be mapped"
        )
    array = StoredArray(path, offset or 0, dtype, dataset.shape)
    if array.offset + array.nbytes > path.stat().st_size:
        raise UserError(f"{where} reaches beyond the end of the file, which is truncated")
    whole_shape = tuple(attributes["shape"])
    return Part(name, attributes["names"], whole_shape, held, array, attributes["crc32"])


def _check_attributes(attributes: dict[str, Any], where: str) -> None:
    """Refuse a dataset with attributes of the wrong type. The UserError begins with `where`."""
    right = {
        **dict.fromkeys(("shape", "start", "stop"), (int, "a list of whole numbers")),
        "names": (str, "a list of names"),
    }
    for name, (kind, what) in right.items():
        value = attributes.get(name)
        if not isinstance(value, list) or not all(type(one) is kind for one in value):
            raise UserError(f"{where} has {name} {brief(repr(value))}, which must be {what}")
    if attributes.get("dtype") not in list(DTYPES):
        dtype = brief(repr(attributes.get("dtype")))
        raise UserError(f"{where} has dtype {dtype}, not one of {', '.join(DTYPES)}")
    if type(attributes.get("crc32")) is not int:
        crc32 = brief(repr(attributes.get("crc32")))
        raise UserError(f"{where} has crc32 {crc32}, which must be a whole number")


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """A rank file, open for reading. Errors of HDF5 become a UserError."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{path} is truncated, damaged or not a shard file: {problem}") from None
