"""Files that a download, a clone or a copy has left incomplete."""

from __future__ import annotations

from pathlib import Path

from mpishard.errors import UserError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".tmp")
HUB_CACHE = (".cache", "huggingface", "download")  # below a directory that `hf download` writes


def refuse_placeholder(path: Path) -> None:
    """Refuse a file that cannot be opened, or in whose place there is a pointer of git-lfs, nothing
    at all, a web page or a link that leads nowhere (UserError)."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError as error:
        if path.is_symlink() and isinstance(error, FileNotFoundError):
            raise UserError(
                f"{path} is a link to {path.readlink()}, which does not exist: "
                "download the model again, or copy it with the files that its links lead to"
            ) from None
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if start == LFS_POINTER:
        raise UserError(
            f"{path} is a pointer of git-lfs, not the file itself: run `git lfs pull` in "
            f"{path.parent}"
        )
    if not start:
        raise UserError(
            f"{path} is empty (0 bytes): download or copy it again"
            f"{unfinished_downloads(path.parent)}"
        )
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise UserError(
            f"{path} is a web page, not the file itself: its download needs a login, or the file's "
            "own address"
        )


def unfinished_downloads(directory: Path) -> str:
    """What downloads into a directory have not finished, as the end of a sentence; nothing if there
    are none."""
    places = (directory, directory.joinpath(*HUB_CACHE))
    found = [file.name for place in places for file in _files(place) if file.suffix in UNFINISHED]
    if not found:
        return ""
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"; {min(found)}{more} is of a download that did not finish: start it again"


def _files(directory: Path) -> list[Path]:
    try:
        return [file for file in directory.iterdir() if file.is_file()]
    except OSError:
        return []
