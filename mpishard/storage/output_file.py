"""Files that commands write: refused before any work where they cannot be, and whole or not there
at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mpishard.errors import UserError

# What is appended to a name: .incomplete until the file is complete, .journal beside it.
LONGEST_SUFFIX = len(".incomplete")


def resolved(target: Path) -> Path:
    """The file that a path leads to, through symbolic links; it need not exist."""
    return Path(os.path.realpath(target))


def check_output(
    flag: str, target: Path, source: Path | None = None, known_as: str = "the --input"
) -> None:
    """Refuse what cannot become the file that `flag` names, before any work; it must not be
    `source`, which the user knows as that. UserError."""
    real = resolved(target)
    folder = real.parent
    if real.is_dir():
        raise UserError(f"{flag} {target} is a directory: give the name of a file")
    if real.is_symlink():
        raise UserError(f"{flag} {target} is a symbolic link that leads back to itself: remove it")
    if not folder.is_dir():
        raise UserError(f"{flag} {target}: there is no directory {folder}; make it first")
    if real.exists() and not real.is_file():
        raise UserError(f"{flag} {target} is no regular file: give the name of one")
    if source is not None and real.exists() and source.exists() and real.samefile(source):
        raise UserError(f"{flag} {target} is {known_as}: give another name")
    if real.exists() and not os.access(real, os.W_OK):
        raise UserError(f"{flag} {target} may not be written: give another name, or `chmod u+w`")
    longest = os.pathconf(folder, "PC_NAME_MAX") - LONGEST_SUFFIX
    if len(os.fsencode(real.name)) > longest:
        raise UserError(f"{flag}: the name {real.name[:40]}… is longer than {longest} bytes")
    try:  # the permissions of a directory do not tell all: its file system may be read-only
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"{flag} {target}: the directory {folder} cannot be written to: {error.strerror}"
        ) from None


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """The name of a new file that becomes `target`, or what that links to, when all is written to
    it; nothing stays of one that fails. Raises OSError."""
    target = resolved(target)
    temporary = target.with_name(target.name + ".incomplete")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        with suppress(OSError):
            temporary.unlink()
