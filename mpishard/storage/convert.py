"""Converts a checkpoint, or shards for another layout, to shards.

Everything is written into ``OUT.incomplete``, which is renamed to ``OUT`` at the end. The manifest
has another name until then, so that an unfinished directory never looks valid. Weights pass through
memory in blocks of rows. Several processes can share the work, with a barrier after each step:

prepare (one process) -> write (all processes, each some of the files) -> finish (one process)
"""

from __future__ import annotations

import shutil
import uuid
from math import prod
from pathlib import Path

from mpishard.config.weight_sharding import WeightSharding
from mpishard.config.weight_specs import (
    WeightSpec,
    check_weight_sharding,
    specs_of_shard,
    weight_specs,
)
from mpishard.errors import UserError
from mpishard.storage import rank_file
from mpishard.storage.arrays import Progress, StoredArray, as_bytes, checksum, row_blocks
from mpishard.storage.manifest import Manifest
from mpishard.storage.model_dir import copy_companions
from mpishard.storage.rank_file import dtype_of, rank_file_name
from mpishard.storage.shards import MANIFEST, UNFINISHED_MANIFEST, ShardDirectory
from mpishard.storage.source import Source

SHARD_DTYPES = ("float32", "bfloat16")
SOURCE_ITEMSIZE = 4  # of the widest dtype that is read, which bounds the rows of a block


def convert(
    source: Source,
    out: str | Path,
    tp: int,
    dtype: str = "float32",
    progress: Progress = lambda done: None,
    ep: int = 1,
    ranks: int = 0,
) -> None:
    """Writes `source` as shards into the new directory `out`, in this process. Parameters and
    errors are those of `Conversion`."""
    conversion = Conversion(source, out, tp, dtype, ep, ranks)
    conversion.prepare()
    conversion.write(progress=progress)
    conversion.finish()


class Conversion:
    """One conversion of `source` to the shards of ``WeightSharding(tp, ep, ranks)``, in `dtype`, in
    the new directory `out`. Raises UserError for a sharding that does not fit the model, and for a
    dtype that is not one of `SHARD_DTYPES`."""

    def __init__(
        self,
        source: Source,
        out: str | Path,
        tp: int,
        dtype: str = "float32",
        ep: int = 1,
        ranks: int = 0,
    ):
        self.sharding = WeightSharding(tp, ep, ranks)
        check_weight_sharding(source.config, self.sharding)
        if dtype not in SHARD_DTYPES:
            raise UserError(f"--dtype {dtype} is not one of {', '.join(SHARD_DTYPES)}")
        self.source = source
        self.out = Path(out)
        self.dtype = dtype
        self.incomplete = self.out.with_name(self.out.name + ".incomplete")

    @property
    def total_bytes(self) -> int:
        """The bytes of weights in all files together."""
        return self.worker_bytes(0, 1)

    def worker_bytes(self, worker: int, workers: int) -> int:
        """The bytes of weights that one of `workers` processes writes."""
        config = self.source.config
        return sum(
            dtype_of(weight, self.dtype).itemsize
            * prod(weight.shard_shape(config, self.sharding, rank))
            for rank in range(worker, self.sharding.ranks, workers)
            for weight in specs_of_shard(config, self.sharding, rank)
        )

    def prepare(self) -> None:
        """Makes the directory to write into, and removes what an interrupted conversion left.

        Raises UserError if `out` exists, cannot be made or does not fit on the disk.
        """
        if self.out.exists():
            raise UserError(f"{self.out} exists already: remove it or choose another directory")
        config = self.source.config
        manifest = Manifest(
            uuid.uuid4().hex,
            str(self.source.path),
            self.dtype,
            self.sharding,
            config.ignored_fields,
            config.head_differs,
        )
        try:
            self._remove_interrupted()
            self._check_space()
            self.incomplete.mkdir()
            manifest.write(self.incomplete / UNFINISHED_MANIFEST)
            copy_companions(self.source.path, self.incomplete)
        except OSError as error:
            raise UserError(f"cannot write {self.incomplete}: {error}") from None

    def _check_space(self) -> None:
        free = shutil.disk_usage(self.out.parent).free
        if free < self.total_bytes:
            raise UserError(
                f"{self.out} needs {self.total_bytes} bytes, but {free} are free on that disk"
            )

    def _remove_interrupted(self) -> None:
        if not self.incomplete.exists():
            return
        content = [file.name for file in self.incomplete.iterdir()]
        if content and not {MANIFEST, UNFINISHED_MANIFEST}.intersection(content):
            raise UserError(f"{self.incomplete} is in the way and not a conversion: remove it")
        shutil.rmtree(self.incomplete)

    def write(
        self, worker: int = 0, workers: int = 1, progress: Progress = lambda done: None
    ) -> None:
        """Writes the files of ranks `worker`, `worker` + `workers`, …, and calls `progress` with
        the bytes of each block. Raises UserError if the disk or the source fails."""
        manifest = Manifest.read(self.incomplete / UNFINISHED_MANIFEST)
        paths = {
            rank: self.incomplete / rank_file_name(rank, self.sharding.ranks)
            for rank in range(worker, self.sharding.ranks, workers)
        }
        try:
            places = {
                rank: rank_file.create(path, manifest, rank, self.source.config)
                for rank, path in paths.items()
            }
            checksums: dict[int, dict[str, int]] = {rank: {} for rank in paths}
            # Weight by weight, not file by file, so that the source is read from disk only once.
            for weight in weight_specs(self.source.config):
                for rank in paths:
                    place = places[rank].get(weight.name)
                    if place is not None:  # None for an expert of other ranks
                        checksums[rank][weight.name] = self._copy(weight, rank, place, progress)
            for rank, path in paths.items():
                rank_file.seal(path, checksums[rank])
        except (OSError, RuntimeError) as error:  # HDF5 raises either
            reason = " ".join(str(error).split())
            raise UserError(f"cannot write {self.incomplete}: {reason}") from None

    def _copy(self, weight: WeightSpec, rank: int, place: StoredArray, progress: Progress) -> int:
        """Copies a rank's part of a weight to its place in the file; the checksum of the part."""
        rows, *others = weight.slices(self.source.config, self.sharding, rank)
        crc32 = 0
        with open(place.path, "r+b") as file:
            file.seek(place.offset)
            for part in row_blocks(place.shape, SOURCE_ITEMSIZE):
                source_rows = slice(rows.start + part.start, rows.start + part.stop)
                block = self.source.read(weight.name, (source_rows, *others), place.dtype)
                file.write(as_bytes(block))
                crc32 = checksum(block, crc32)
                progress(block.nbytes)
        return crc32

    def finish(self) -> None:
        """Checks that all files are there and complete, and gives the directory its name. Raises
        UserError as `ShardDirectory.check_files` does."""
        manifest = self.incomplete / UNFINISHED_MANIFEST
        shards = ShardDirectory(self.incomplete, Manifest.read(manifest))
        shards.check_files()
        for rank in range(self.sharding.ranks):
            shards.parts(rank)
        if self.out.exists():
            raise UserError(f"{self.out} came to exist during the conversion; remove it")
        manifest.rename(self.incomplete / MANIFEST)
        described = [file for file in self.incomplete.iterdir() if file.suffix != ".h5"]
        rank_file.flush(*described, self.incomplete)
        self.incomplete.rename(self.out)
        rank_file.flush(self.out.parent)
