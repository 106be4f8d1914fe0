"""Files of text that users hand over: read through gzip, and refused as a whole where they are not
what is asked for."""

from __future__ import annotations

import gzip
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import IO, cast

from mpishard.errors import UserError, brief

GZIP = b"\x1f\x8b"
BOM = b"\xef\xbb\xbf"

# How files begin that are not text, what they are, and what is to be done.
UNICODE = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
ARCHIVES = {
    b"PK\x03\x04": "a zip archive (or an .npz or .xlsx file)",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ\0": "an xz file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3\0": "an SQLite database",
    b"\x89HDF": "an HDF5 file",
    b"%PDF": "a PDF file",
}
LOOK = 4096  # bytes from the beginning that tell what a file is


def open_input(flag: str, path: Path) -> IO[bytes]:
    """The file that `flag` names, at its beginning; it can be read in any order, also where it is
    gzip or a pipe. Raises UserError if it cannot be read or is not text."""
    where = f"{flag} {path}"
    try:
        file: IO[bytes] = open(path, "rb")  # noqa: SIM115 (handed over)
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}") from None
    try:
        if not file.seekable():
            file = _copied(file, file, where)
        if file.read(len(GZIP)) == GZIP:
            file.seek(0)
            file = _copied(file, cast(IO[bytes], gzip.GzipFile(fileobj=file)), where)
        file.seek(0)
        problem = not_text(file.read(LOOK))
        file.seek(0)
    except OSError as error:
        file.close()
        raise UserError(f"{where} cannot be read: {error.strerror}") from None
    except UserError:
        file.close()
        raise
    if problem:
        file.close()
        raise UserError(f"{where} {problem}")
    return file


def read_text(flag: str, path: Path) -> str:
    """The text of the file that `flag` names, without a byte order mark. Raises UserError."""
    with open_input(flag, path) as file:
        try:
            content = file.read()
        except OSError as error:
            raise UserError(f"{flag} {path} cannot be read: {error.strerror}") from None
    try:
        return content.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        if name := _wide(content):
            raise UserError(f"{flag} {path} {_convert(name)}") from None
        raise UserError(
            f"{flag} {path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from None


def not_text(start: bytes) -> str:
    """Why a file that begins so is not text, as the end of a sentence; "" if it may be, apart from
    some damage."""
    for mark, kind in ARCHIVES.items():
        if start.startswith(mark):
            return f"is {kind}, not text: unpack or convert it first"
    if (name := _wide(start)) and start.count(0) > len(start) // 8:
        return _convert(name)
    half = len(start) // 2
    if half and any(start[first::2].count(0) > half // 2 for first in (0, 1)):
        # Letters of Latin scripts have one NUL of two bytes. More of them are no text at all.
        return _convert("UTF-16") if start.count(0) < 1.5 * half else "is not text: it has NULs"
    return ""


def _wide(start: bytes) -> str:
    """The encoding of a file that begins with the mark of one that is not UTF-8, else ""."""
    return next((name for mark, name in UNICODE.items() if start.startswith(mark)), "")


class LinesLook:
    """What the lines of a file look like together, of which some are `objects`. Single lines may be
    damaged; a file that is something else than lines of JSON is refused as a whole."""

    def __init__(self) -> None:
        self._first = self._last = b""
        self._count = self._damaged = self.objects = 0

    def take(self, line: bytes, is_object: bool) -> None:
        """Look at the next `line` that is not blank, which may be a JSON object."""
        self._first = self._first or line.strip()[:LOOK]
        self._last = line.strip()[-LOOK:]
        self._count += 1
        self.objects += is_object
        self._damaged += line.lstrip().startswith(b"{") and line.strip() != b"{"

    def problem(self, purpose: str) -> str:
        """Why the file is not lines of JSON, as the end of a sentence; "" if it is. `purpose` is
        what is done with lines."""
        if not self._count:
            return f"has no line to {purpose}"
        is_list = self._first.startswith(b"[") and self._last.endswith(b"]")
        if is_list and (self._count == 1 or not self._first.endswith(b"]")):
            return "is one JSON array, not a JSON object a line: `jq -c '.[]'` makes lines of it"
        if self.objects:
            return ""
        if b"\r" in self._first and self._count == 1:
            return "has lone carriage returns for line ends: `tr '\\r' '\\n'` makes lines of it"
        if self._first == b"{":
            return "has a JSON object over several lines: `jq -c .` makes lines of it"
        if self._damaged:  # they begin like objects
            return ""
        if name := _wide(self._first):
            return _convert(name)
        start = self._first[:40].decode(errors="backslashreplace")
        if b"\0" in self._first:
            return f"is not text: it has NULs, and begins with {start}"
        return f"has no line that is a JSON object; the first begins with {start}"


def _convert(name: str) -> str:
    return f"is {name}: convert it to UTF-8, `iconv -f {name} -t UTF-8`"


def _copied(source: IO[bytes], content: IO[bytes], where: str) -> IO[bytes]:
    """The `content` of a file that is then closed, `source`, in one without a name."""
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (handed over)
    try:
        with source, content:
            shutil.copyfileobj(content, copy, 2**20)
        copy.seek(0)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        copy.close()
        raise UserError(
            f"{where} is a gzip file that is damaged or cut short: {brief(str(error))}"
        ) from None
    except OSError as error:
        copy.close()
        raise UserError(
            f"{where} cannot be unpacked into {tempfile.gettempdir()}: {error.strerror}"
        ) from None
    return copy
