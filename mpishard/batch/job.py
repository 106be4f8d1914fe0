"""The files of a batch job: its input, its journal, its output. Rank 0 alone has them in hand, and
so only its host needs to see them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from mpishard.batch.requests import BatchRequest, read_request
from mpishard.engine.sampling_params import SamplingParams
from mpishard.errors import UserError, brief
from mpishard.storage.input_file import BOM, LinesLook, open_input
from mpishard.storage.journal import Journal, write_whole
from mpishard.storage.output_file import check_output, resolved


class Span(NamedTuple):
    """Where a line of the input is, and a checksum of it."""

    number: int
    offset: int
    length: int
    checksum: int


class BatchJob:
    """A batch job: the lines of `source`, to be answered in `target`.

    `defaults` are the sampling parameters of lines that say nothing else. With `chat`, plain
    prompts open a conversation in the model's chat template; `chat_template_kwargs` are given to
    the template, and lines may have others. `metadata` is what else answers depend on.

    Raises UserError where the input cannot be read or is not lines of JSON, where the output exists
    or cannot be made, and as `Journal` does.
    """

    def __init__(
        self,
        source: Path,
        target: Path,
        defaults: SamplingParams,
        metadata: dict[str, Any] | None = None,
        chat: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.source, self.target, self.defaults, self.chat = (
            source,
            resolved(target),
            defaults,
            chat,
        )
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        check_output("--output", target, source)
        if source.exists() and not source.is_file() and not source.is_dir():
            raise UserError(f"--input {source} is no file: lines have to be read more than once")
        self._file = open_input("--input", source)
        try:
            self._open_journal(target, metadata)
        except BaseException:
            self._file.close()
            raise
        self._next = 0

    def _open_journal(self, target: Path, metadata: dict[str, Any] | None) -> None:
        """Read where the lines are, and what an earlier run has answered."""
        defaults = self.defaults
        self._spans, self._twice, digest = self._read()
        path = self.target.with_name(self.target.name + ".journal")
        if self.target.exists() and not path.exists():
            raise UserError(
                f"--output {target} exists already and no job is to be continued there: give "
                "another name, or remove it"
            )
        told = asdict(defaults) | {"chat": self.chat}
        told["chat_template_kwargs"] = self.chat_template_kwargs
        own = {"input": f"sha256 {digest}", "lines": len(self._spans)}
        self.journal = Journal(path, {**own, **(metadata or {}), **told})

    def __enter__(self) -> BatchJob:
        return self

    def __exit__(self, *exception: object) -> None:
        self.journal.close()
        self._file.close()

    def __len__(self) -> int:
        """The lines that are to be answered, blank ones left out."""
        return len(self._spans)

    @property
    def left(self) -> int:
        """The lines not answered yet."""
        return len(self) - len(self.journal)

    def line(self, place: int) -> BatchRequest:
        """What the line at `place` asks for. Raises UserError if the input has changed."""
        span = self._spans[place]
        where = f"{self.source} line {span.number}"
        content = os.pread(self._file.fileno(), span.length, span.offset)
        if crc32(content) != span.checksum:
            raise UserError(
                f"{where} is not what it was when the job began: leave --input as it is until the "
                "job has ended; what the journal has belongs to what was there"
            )
        line = read_request(content, span.number, self.defaults, where)
        if not line.error and place in self._twice:
            first = self._twice[place]
            return BatchRequest(
                line.number,
                line.form,
                line.name,
                error=f"{where} has the id {brief(repr(line.name))} of line {first}",
            )
        return line

    def next(self) -> tuple[int, BatchRequest] | None:
        """The next line that is not answered yet, and its place; None if there is no other."""
        while self._next < len(self):
            place = self._next
            self._next += 1
            if place not in self.journal:
                return place, self.line(place)
        return None

    def finish(self) -> None:
        """Write the output, in the order of the input, and take the journal away."""
        write_whole(self.target, (self.journal[place] for place in range(len(self))))
        self.journal.remove()

    def _read(self) -> tuple[list[Span], dict[int, int], str]:
        """Where the lines are; of those with an earlier one's name that one's number; and the
        input's digest. Raises UserError for an input that is not lines of JSON."""
        spans: list[Span] = []
        first: dict[Any, int] = {}
        twice: dict[int, int] = {}
        digest = hashlib.sha256()
        look = LinesLook()
        for span, content in self._raw_lines(digest):
            line = read_request(content, span.number, self.defaults, "")
            look.take(content, line.is_object)
            if not line.error:
                earlier = first.setdefault((type(line.name), line.name), span.number)
                if earlier != span.number:
                    twice[len(spans)] = earlier
            spans.append(span)
        if problem := look.problem("answer"):
            raise UserError(f"--input {self.source} {problem}")
        return spans, twice, digest.hexdigest()

    def _raw_lines(self, digest: Any) -> Iterator[tuple[Span, bytes]]:
        """The lines of the input that are not blank, without a byte order mark; `digest` takes in
        everything."""
        try:
            end = 0
            for number, content in enumerate(self._file, 1):
                digest.update(content)
                start, end = end, end + len(content)
                if start == 0 and content.startswith(BOM):
                    start, content = len(BOM), content[len(BOM) :]
                if content.strip():
                    yield Span(number, start, len(content), crc32(content)), content
        except OSError as error:
            raise UserError(f"--input {self.source} cannot be read: {error.strerror}") from None
