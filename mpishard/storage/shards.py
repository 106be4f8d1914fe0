"""A shard directory: a sharded model, one HDF5 file for each shard.

It holds ``config.json``, tokenizer files, the manifest ``mpishard.json``, and the rank files
``rank-00000-of-00004.h5`` … Opening it reads a few attributes of every file, and no weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from mpishard.config.weight_specs import (
    WeightSpec,
    check_weight_sharding,
    missing_weights,
    specs_of_shard,
    weight_specs,
)
from mpishard.errors import UserError, brief
from mpishard.storage.manifest import Manifest
from mpishard.storage.model_dir import read_config
from mpishard.storage.rank_file import (
    Part,
    check_header,
    dtype_of,
    rank_file_name,
    read_parts,
)

MANIFEST = "mpishard.json"
UNFINISHED_MANIFEST = "mpishard.json.incomplete"  # until all rank files are written


class ShardDirectory:
    """The weights of a shard directory. A weight is read when it is asked for."""

    def __init__(self, path: Path, manifest: Manifest, ignore_config: Iterable[str] = ()):
        self.path = path
        self.manifest = manifest
        self.sharding = manifest.sharding
        self.config = read_config(path, dict.fromkeys((*manifest.ignore_config, *ignore_config)))
        if manifest.head_differs:
            self.config = replace(self.config, tied=False, head_differs=True)
        self.weights = {weight.name: weight for weight in weight_specs(self.config)}
        self._parts: dict[int, dict[str, Part]] = {}
        self._checked_parts: set[tuple[int, str]] = set()

    @classmethod
    def open(cls, path: str | Path, ignore_config: Iterable[str] = ()) -> ShardDirectory:
        """The shards in a directory. The user answers for fields of the configuration in
        `ignore_config`, beside those that the manifest names.

        Raises UserError unless all files are there, belong together and cover every weight; it
        gives both values if two differ."""
        path = Path(path)
        shards = cls(path, Manifest.read(path / MANIFEST), ignore_config)
        shards.check_files()
        return shards

    def check_files(self) -> None:
        """Refuse rank files that are missing, surplus, truncated or of another conversion
        (UserError)."""
        present = {file.name for file in self.path.glob("rank-*.h5")}
        # The manifest may have any number. If it is too large, one of the first files is missing.
        ranks = range(min(self.sharding.ranks, len(present) + 1))
        expected = [rank_file_name(rank, self.sharding.ranks) for rank in ranks]
        missing = [name for name in expected if name not in present]
        surplus = sorted(present.difference(expected))
        if missing or surplus:
            raise UserError(
                f"{self.path} should hold {self.sharding.ranks} rank files as {MANIFEST} says, but "
                f"{len(present)} are there: "
                + (f"{missing[0]} is missing" if missing else f"{surplus[0]} is not one of them")
            )
        for rank in range(self.sharding.ranks):
            check_header(self.file(rank), self.manifest, rank, self.config.raw)
        check_weight_sharding(self.config, self.sharding)
        gaps = missing_weights(self.config, self.sharding)
        if gaps:
            raise UserError(f"{self.path}: {self.sharding} leaves parts of {gaps[0]} on no rank")

    def file(self, rank: int) -> Path:
        """The file of a rank."""
        return self.path / rank_file_name(rank, self.sharding.ranks)

    def parts(self, rank: int) -> dict[str, Part]:
        """The parts of weights in the file of a rank, by name. Raises UserError unless each part is
        the slice that `WeightSpec.slices` gives to this rank."""
        if rank not in self._parts:
            parts = read_parts(self.file(rank))
            held = {
                weight.name: weight for weight in specs_of_shard(self.config, self.sharding, rank)
            }
            self._refuse_strangers(rank, sorted(parts.keys() - held.keys()))
            for name, weight in held.items():
                if name not in parts:
                    raise UserError(f"{self.file(rank)} lacks {name}")
                self._check_part(rank, weight, parts[name])
            self._parts[rank] = {name: parts[name] for name in held}
        return self._parts[rank]

    def _refuse_strangers(self, rank: int, strangers: list[str]) -> None:
        for name in strangers:
            reason = "belongs to other ranks" if name in self.weights else "the model does not have"
            raise UserError(f"{self.file(rank)} holds {brief(name)}, which {reason}")

    def _check_part(self, rank: int, weight: WeightSpec, part: Part) -> None:
        held = weight.slices(self.config, self.sharding, rank)
        shape = weight.shard_shape(self.config, self.sharding, rank)
        for what, found, right in (
            ("the names", part.names, [weight.name]),
            ("the whole shape", part.whole_shape, weight.shape),
            ("the slice", _bounds(part.held), _bounds(held)),
            ("the shape", part.array.shape, shape),
            ("the dtype", part.array.dtype.name, self.dtype(weight.name).name),
        ):
            if found != right:
                raise UserError(
                    f"{self.file(rank)}: {weight.name} has {what} {found}, "
                    f"but rank {rank} of {self.sharding.ranks} should have {right}"
                )

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole shape of a weight."""
        return self.weights[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The stored dtype of a weight: the dtype of the shards, or float32."""
        return dtype_of(self.weights[name], self.manifest.dtype)

    def read(
        self, name: str, slices: tuple[slice, ...], dtype: DTypeLike | None = None
    ) -> np.ndarray:
        """``weight[slices]`` of the whole weight, assembled from the files of the ranks, in `dtype`
        or, without it, in the stored dtype. Raises UserError for data without the right checksum;
        the part of a rank is checked once."""
        weight = self.weights[name]
        axis = weight.axis or 0  # a weight without axis is whole on the first rank that has it
        start, stop, _ = slices[axis].indices(weight.shape[axis])
        pieces = []
        for rank in range(self.sharding.ranks):
            if not weight.is_held(self.config, self.sharding, rank):
                continue
            held = weight.slices(self.config, self.sharding, rank)[axis]
            upto = min(stop, held.stop)
            if held.start <= start < upto:
                rows = slice(start - held.start, upto - held.start)
                pieces.append(self._checked(rank, name)[_with(slices, axis, rows)])
                start = upto  # rows of several ranks are read from the first
        dtype = self.dtype(name) if dtype is None else dtype
        if not pieces:
            return np.empty(weight.shape, dtype)[slices]
        return np.concatenate(pieces, axis, dtype=dtype, casting="unsafe")

    def _checked(self, rank: int, name: str) -> np.ndarray:
        part = self.parts(rank)[name]
        if (rank, name) not in self._checked_parts:
            part.check()
            self._checked_parts.add((rank, name))
        return part.array.map()


def _with(slices: tuple[slice, ...], axis: int, part: slice) -> tuple[slice, ...]:
    return slices[:axis] + (part,) + slices[axis + 1 :]


def _bounds(slices: tuple[slice, ...]) -> str:
    return "[" + ", ".join(f"{part.start}:{part.stop}" for part in slices) + "]"
