"""The journal of a job: its results so far, each on disk as soon as it is finished.

A job that was killed continues where its journal ends. The first line describes the job; each
further line is a finished piece of work::

    {"journal": "mpishard 2", "input": "sha256 …", …}
    3f2b11d0 17 {"id": "a", …}

It has a CRC-32 of the first line and of the rest of this line, an index into the input, and the
result. A line from the journal of another job therefore counts as damaged. Lines are appended whole
and never changed. A torn last line, left by a kill, is truncated; a crash of the host may damage
more lines, which the checksums reveal.

Appended lines survive the end of the process. They survive a crash of the host once they are
synced, which `append` does from time to time, for at most 2 % of the time.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from pathlib import Path
from time import perf_counter
from typing import Any
from zlib import crc32

from mpishard.errors import UserError
from mpishard.storage.output_file import resolved, whole_file
from mpishard.storage.parsing import parse_json

FORMAT = "mpishard 2"

# The least time between two syncs: in seconds, and as a multiple of the time of a sync.
SYNC_SECONDS = 1.0
SYNC_PATIENCE = 50


class Journal:
    """The journal at `path` of the job that `facts` describe, open for appending.

    Raises UserError if it cannot be written, belongs to another job or is in use, or if the file is
    not a journal.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path = path
        self._header = json.dumps({"journal": FORMAT, **facts}).encode() + b"\n"
        self.damaged = 0  # lines with a wrong checksum
        self._places: dict[int, tuple[int, int]] = {}  # offset and length of the result
        self._synced, self._sync_seconds = perf_counter(), 0.0
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UserError(f"{path} cannot be opened: {error.strerror}") from None
        try:
            self._lock()
            self._end = self._read()
        except BaseException:
            os.close(self._file)
            raise

    def __contains__(self, place: int) -> bool:
        return place in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: int) -> bytes:
        """The result for `place` in the input; the first one, if there are several."""
        offset, length = self._places[place]
        return os.pread(self._file, length, offset)

    def append(self, made: Iterable[tuple[int, bytes]]) -> None:
        """Append results, as pairs of a place in the input and a line without its end. A place that
        is in the journal is skipped. Raises UserError if the disk fails; the file is then
        unchanged."""
        lines, end = [], self._end
        for place, content in made:
            if place in self._places:
                continue
            rest = b"%d %s" % (place, content)
            line = b"%s %s\n" % (self._checksum(rest), rest)
            self._places[place] = (end + len(line) - len(content) - 1, len(content))
            lines.append(line)
            end += len(line)
        if lines:
            self._write(b"".join(lines))
            self._end = end
            self._sync_now_and_then()

    def close(self) -> None:
        """Sync and close the file."""
        with suppress(OSError):  # a full disk may show only now; written lines are there
            os.fsync(self._file)
        os.close(self._file)

    def remove(self) -> None:
        """Delete the file, because the job is done. The journal must still be closed."""
        self.path.unlink()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.path} is in use: another job writes to it; wait for its end, or give "
                "another --output"
            ) from None
        except OSError:
            pass  # a file system without locks

    def _checksum(self, rest: bytes) -> bytes:
        """The checksum that begins a line with this `rest`."""
        return b"%08x" % crc32(rest, crc32(self._header))

    def _read(self) -> int:
        """Read the lines in the file; the offset at which to append."""
        own = self._header
        with os.fdopen(os.dup(self._file), "rb") as file:
            first = file.readline()
            if own.startswith(first) and first != own:  # empty, or torn in the first line
                os.ftruncate(self._file, 0)
                self._write(own)
                sync_directory(self.path.parent)
                return len(own)
            self._check(first)
            end = len(first)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._take(line, end)
                end += len(line)
        os.ftruncate(self._file, end)
        return end

    def _take(self, line: bytes, start: int) -> None:
        checksum, _, rest = line[:-1].partition(b" ")
        if checksum != self._checksum(rest):
            self.damaged += 1
            return
        place, _, content = rest.partition(b" ")
        offset = start + len(line) - len(content) - 1
        self._places.setdefault(int(place), (offset, len(content)))

    def _check(self, first: bytes) -> None:
        """Refuse the journal of another job, and a file that is not a journal."""
        header = json.loads(self._header)
        try:
            there = parse_json(first)
        except ValueError:
            there = None
        if not isinstance(there, dict) or "journal" not in there:
            raise UserError(
                f"{self.path} is in the way: it is no journal of a job; give another --output"
            )
        for name in dict.fromkeys([*header, *there]):
            if there.get(name) != header.get(name):
                raise UserError(
                    f"{self.path} is the journal of another job: its {name} is "
                    f"{json.dumps(there.get(name))}, here it is {json.dumps(header.get(name))}; "
                    "give the same command to go on, or another --output, or remove the journal"
                )

    def _write(self, data: bytes) -> None:
        start = os.fstat(self._file).st_size
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, start)
            raise UserError(
                f"{self.path} cannot be written: {error.strerror}; make room, and the same "
                "command goes on from here"
            ) from None

    def _sync_now_and_then(self) -> None:
        started = perf_counter()
        if started - self._synced >= max(SYNC_SECONDS, SYNC_PATIENCE * self._sync_seconds):
            os.fsync(self._file)
            self._synced = perf_counter()
            self._sync_seconds = self._synced - started


def write_whole(target: Path, lines: Iterable[bytes]) -> None:
    """Write the file `target`, under another name until it is complete; as gzip where its name ends
    in .gz. Raises UserError if the disk fails."""
    try:
        with whole_file(target) as temporary, open(temporary, "wb") as file:
            packed = gzip.GzipFile("", "wb", fileobj=file) if target.suffix == ".gz" else None
            with packed or nullcontext(file) as output:
                for line in lines:
                    output.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        sync_directory(resolved(target).parent)
    except OSError as error:
        raise UserError(
            f"--output {target} cannot be written: {error.strerror}; make room, and the same "
            "command goes on from here"
        ) from None


def sync_directory(directory: Path) -> None:
    """Sync the names in a directory to disk, if the file system can."""
    handle = os.open(directory, os.O_RDONLY)
    with suppress(OSError):
        os.fsync(handle)
    os.close(handle)
