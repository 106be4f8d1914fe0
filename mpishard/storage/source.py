"""The source of weights: a Hugging Face directory or a shard directory."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mpishard.errors import UserError
from mpishard.storage.checkpoint import Checkpoint
from mpishard.storage.model_dir import CONFIG, companions
from mpishard.storage.shards import MANIFEST, UNFINISHED_MANIFEST, ShardDirectory

Source = Checkpoint | ShardDirectory


def open_source(path: str | Path) -> Source:
    """The checkpoint or the shards in a directory; ``mpishard.json`` tells which it is.

    Raises UserError if there is neither, and as `Checkpoint.open` and `ShardDirectory.open` do.
    """
    path = Path(path)
    if not path.is_dir():
        problem = "is not a directory" if path.exists() else "does not exist"
        raise UserError(
            f"model {path} {problem}: give a local Hugging Face directory or a shard directory"
        )
    if (path / MANIFEST).exists():
        return ShardDirectory.open(path)
    if (path / UNFINISHED_MANIFEST).exists():
        raise UserError(f"{path} is an interrupted conversion: run `mpishard shard` again")
    if any(path.glob("rank-*.h5")):
        raise UserError(f"{path} has rank files but no {MANIFEST}: the copy is incomplete")
    if not (path / CONFIG).exists():
        raise UserError(
            f"{path} has neither {CONFIG} (a Hugging Face directory) nor {MANIFEST} (shards)"
        )
    return Checkpoint.open(path)


def fingerprint(path: Path) -> str:
    """A digest that identifies a model directory, independent of its path: of the content of the
    small files, and of the names and sizes of files of weights."""
    digest = hashlib.sha256()
    for name in (*map(str, companions(path)), MANIFEST):
        if (path / name).is_file():
            digest.update(name.encode() + b"\0" + (path / name).read_bytes() + b"\0")
    weights = [*path.glob("*.safetensors"), *path.glob("rank-*.h5")]
    for file in sorted(weights):
        digest.update(f"{file.name} {file.stat().st_size}\0".encode())
    return f"sha256 {digest.hexdigest()}"
