"""What identifies a model: digests of its small files, of the names and shapes of its tensors, and
of a sample of the bytes of its weights.

The sample takes a few hundred small reads, however large the model is. It has the end of each
tensor that is drawn, because rows for new tokens are the last ones of embedding and head.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from mpishard.storage.checkpoint import Checkpoint
from mpishard.storage.model_dir import (
    CONFIG,
    GENERATION_CONFIG,
    QUANTIZATION_CONFIG,
    companions,
)
from mpishard.storage.shards import MANIFEST
from mpishard.storage.source import Source

SAMPLED_ARRAYS = 256
SAMPLE_BYTES = 64

_CONFIGURATION = (CONFIG, GENERATION_CONFIG, QUANTIZATION_CONFIG)

Extent = tuple[Path, int, int]  # a file, where an array in it begins, and its bytes


def identity(source: Source) -> dict[str, str]:
    """The digests by what they are of, independent of the path. OSError if a file cannot be
    read."""
    files = companions(source.path)
    configuration = [name for name in files if name in _CONFIGURATION]
    tokenizer = [name for name in files if name not in _CONFIGURATION]
    described = _described_arrays(source)
    return {
        "the configuration": _digest(_contents(source.path, configuration)),
        "the tokenizer": _digest(_contents(source.path, tokenizer)),
        "the names and shapes of the tensors": _digest(name.encode() for name in described),
        "the bytes of the weights": _digest(_sample(list(described.values()))),
    }


def fingerprint(source: Source) -> str:
    """One digest of all that `identity` has."""
    return f"sha256 {_digest(digest.encode() for digest in identity(source).values())}"


def _described_arrays(source: Source) -> dict[str, Extent]:
    """The stored arrays, by lines that have their names and shapes, in a fixed order."""
    if isinstance(source, Checkpoint):
        return {
            f"{name} {array.shape} {array.dtype.name}": (array.path, array.offset, array.nbytes)
            for name, array in sorted(source.arrays.items())
        }
    files = [source.file(rank) for rank in range(source.sharding.ranks)]
    sizes = {file: file.stat().st_size for file in files}
    manifest = (source.path / MANIFEST).read_text()  # it has an id of the conversion
    parts = {f"{file.name} {size} {manifest}": (file, 0, size) for file, size in sizes.items()}
    return parts


def _contents(directory: Path, names: Iterable[str]) -> Iterator[bytes]:
    for name in names:
        yield name.encode() + b"\0" + (directory / name).read_bytes()


def _sample(extents: list[Extent]) -> Iterator[bytes]:
    """Bytes of arrays that are spread over the model: amid each, and at its end."""
    count = min(len(extents), SAMPLED_ARRAYS)
    drawn = sorted({number * (len(extents) - 1) // max(1, count - 1) for number in range(count)})
    by_file: dict[Path, list[tuple[int, int]]] = {}
    for number in drawn:
        path, offset, size = extents[number]
        last = max(0, size - SAMPLE_BYTES)
        amid = last * (number + 1) // (len(extents) + 1)
        by_file.setdefault(path, []).extend([(offset + amid, size), (offset + last, size)])
    for path, places in by_file.items():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            for place, size in places:
                yield os.pread(descriptor, min(SAMPLE_BYTES, size), place)
        finally:
            os.close(descriptor)


def _digest(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little") + piece)
    return digest.hexdigest()
