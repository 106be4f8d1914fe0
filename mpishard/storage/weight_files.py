"""The safetensors files of a Hugging Face directory, and the headers that say what is in them.

A directory holds one file, several with an index, or one or several without: some downloads leave
the index out. `read_headers` finds the files; where there are none, or where they are not what they
should be, it says what is there instead and what to do about it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mpishard.errors import UserError, brief
from mpishard.storage.downloads import refuse_placeholder, unfinished_downloads
from mpishard.storage.foreign_formats import foreign_format, is_foreign
from mpishard.storage.model_dir import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NUMBERED = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.safetensors")

Header = tuple[Path, int, dict[str, Any]]  # file, offset of its data, entry of the tensor


def read_headers(directory: Path) -> dict[str, Header]:
    """The headers of all tensors in a directory, by name, as they are stored.

    Raises UserError if there are no safetensors files, if one is missing, unreadable, damaged or no
    safetensors file at all, and if an index contradicts the files.
    """
    if os.path.lexists(directory / SINGLE):
        return _read_header(directory / SINGLE)
    if os.path.lexists(directory / INDEX):
        return _read_indexed(directory)
    return _read_all(directory, _unindexed(directory))


def _read_indexed(directory: Path) -> dict[str, Header]:
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError(f"{directory / INDEX} has no weight_map from tensor names to file names")
    files: dict[str, dict[str, Header]] = {}
    for name, file in weight_map.items():
        if file not in files:
            _check_file(directory, file, name)
            files[file] = _read_header(directory / file)
        if name not in files[file]:
            raise UserError(f"{directory / file} lacks {brief(name)}, which {INDEX} places in it")
    unlisted = {name: header for headers in files.values() for name, header in headers.items()}
    return unlisted | {name: files[file][name] for name, file in weight_map.items()}


def _check_file(directory: Path, file: str, name: str) -> None:
    """Refuse a file of the index that is not there, or not below the directory (UserError)."""
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise UserError(
            f"{directory / INDEX} places {brief(name)} in {brief(file)}, outside of the directory: "
            "copy that file into it and name it there"
        )
    if not os.path.isfile(directory / file):
        raise UserError(
            f"{directory / brief(file)} is missing: {INDEX} places {brief(name)} in it"
            f"{unfinished_downloads(directory)}"
        )


def _unindexed(directory: Path) -> list[Path]:
    """The safetensors files of a directory without an index: one, or a complete numbered set."""
    files = sorted(file for file in directory.glob("*.safetensors") if not is_foreign(file.name))
    if not files:
        raise UserError(
            f"{directory} has neither {SINGLE} nor {INDEX}: "
            f"{foreign_format(directory) or 'no weights to read'}{unfinished_downloads(directory)}"
        )
    if len(files) == 1 and not NUMBERED.fullmatch(files[0].name):
        return files
    sets = {(number[1], int(number[3])) for number in map(_number, files) if number}
    if len(sets) != 1 or not all(map(_number, files)):
        raise UserError(
            f"{directory} has {_listed(file.name for file in files)}, and no {INDEX} that says "
            "which of them are the model: keep only those, or add the index"
        )
    ((stem, count),) = sets
    for number in range(1, min(count, len(files) + 1) + 1):  # a damaged number may be any
        file = directory / f"{stem}-{number:05}-of-{count:05}.safetensors"
        if file not in files:
            raise UserError(
                f"{file} is missing: {files[0].name} is one of {count} files"
                f"{unfinished_downloads(directory)}"
            )
    return files


def _number(file: Path) -> re.Match[str] | None:
    return NUMBERED.fullmatch(file.name)


def _read_all(directory: Path, files: list[Path]) -> dict[str, Header]:
    headers: dict[str, Header] = {}
    for file in files:
        for name, header in _read_header(file).items():
            if name in headers:
                raise UserError(
                    f"{directory}: {headers[name][0].name} and {file.name} both hold "
                    f"{brief(name)}, and there is no {INDEX}: keep the files of one model"
                )
            headers[name] = header
    return headers


def _read_header(path: Path) -> dict[str, Header]:
    refuse_placeholder(path)
    try:
        with safe_open(path, "np"), open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
    except SafetensorError as error:
        size, problem = path.stat().st_size, brief(str(error), 300)
        raise UserError(
            f"{path} ({size} bytes) is truncated or damaged: {problem}"
            f"{_whole_size(path)}{unfinished_downloads(path.parent)}"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    entries.pop("__metadata__", None)
    return {name: (path, 8 + length, entry) for name, entry in entries.items()}


def _whole_size(path: Path) -> str:
    """The size that the header of a truncated file gives it, as the end of a sentence."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(min(length, path.stat().st_size)))
        entries.pop("__metadata__", None)
        end = 8 + length + max(int(entry["data_offsets"][1]) for entry in entries.values())
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return ""
    return f"; its header asks for {end} bytes" if end > path.stat().st_size else ""


def _listed(names: Iterable[str]) -> str:
    first, second, *others = (brief(name) for name in names)
    return f"{first}, {second} and {len(others)} more" if others else f"{first} and {second}"
