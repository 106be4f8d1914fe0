"""The source of weights: a Hugging Face directory or a shard directory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mpishard.errors import UserError
from mpishard.storage.checkpoint import Checkpoint
from mpishard.storage.downloads import unfinished_downloads
from mpishard.storage.foreign_formats import foreign_file, foreign_format
from mpishard.storage.model_dir import CONFIG
from mpishard.storage.shards import MANIFEST, UNFINISHED_MANIFEST, ShardDirectory
from mpishard.storage.text_half import modules_of

Source = Checkpoint | ShardDirectory


def open_source(path: str | Path, ignore_config: Iterable[str] = ()) -> Source:
    """The checkpoint or the shards in a directory; ``mpishard.json`` tells which it is. The user
    answers for fields of its configuration in `ignore_config`.

    Raises UserError if there is neither, and as `Checkpoint.open` and `ShardDirectory.open` do.
    """
    path = Path(path)
    if isinstance(ignore_config, str):  # which is iterable, too
        ignore_config = [ignore_config]
    _check_directory(path)
    if (path / MANIFEST).exists():
        return ShardDirectory.open(path, ignore_config)
    if (path / UNFINISHED_MANIFEST).exists():
        raise UserError(f"{path} is an interrupted conversion: run `mpishard shard` again")
    if any(path.glob("rank-*.h5")):
        raise UserError(f"{path} has rank files but no {MANIFEST}: the copy is incomplete")
    if not (path / CONFIG).exists():
        snapshots = sorted(path.glob(f"snapshots/*/{CONFIG}"))
        if snapshots:
            raise UserError(f"{path} is a folder of the hub's cache: give {snapshots[0].parent}")
        other = foreign_format(path)
        raise UserError(
            f"{path} has neither {CONFIG} (a Hugging Face directory) nor {MANIFEST} (shards)"
            f"{f': {other}' if other else ''}{unfinished_downloads(path)}"
        )
    return Checkpoint.open(path, ignore_config)


def _check_directory(path: Path) -> None:
    """Refuse a model that is no directory, or one that cannot be read (UserError)."""
    try:
        os.stat(path / ".")
        os.listdir(path)
    except NotADirectoryError:
        other = foreign_file(path.name)
        problem = f"is not a directory{f', and {other}' if other else ''}"
    except FileNotFoundError:
        problem = "does not exist"
    except OSError as error:
        raise UserError(f"cannot read model {path}: {error.strerror}") from None
    except ValueError:  # a character that no path has
        problem = "does not exist"
    else:
        return
    raise UserError(
        f"model {path} {problem}: give a local Hugging Face directory or a shard directory"
    )


def _tied_in(fields: dict[str, Any]) -> Any:
    return fields.get("tie_word_embeddings")


def notices(source: Source) -> list[str]:
    """What a user of a model should know before its numbers, a sentence each."""
    config, said = source.config, []
    if config.ignored_fields:
        said.append(f"ignored fields of {CONFIG}: {', '.join(config.ignored_fields)}")
    if config.head_differs and True in map(_tied_in, (config.raw, config.text_fields)):
        said.append(
            "the stored output head differs from the embedding and is used, although "
            "tie_word_embeddings is true"
        )
    if isinstance(source, Checkpoint) and source.unread:
        said.append(
            f"the text half of {config.wrapper}: {len(source.unread)} tensors of "
            f"{modules_of(source.unread)} are unread"
        )
    return said
