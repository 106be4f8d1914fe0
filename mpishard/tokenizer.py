"""Text in, text out: the tokenizer, the chat template, and the text of an answer as it grows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mpishard.errors import UserError, brief
from mpishard.storage.model_dir import read_json

TOKENIZER = "tokenizer.json"

# What decoding makes of bytes that are not, or not yet, a whole character.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# Tokens before an answer with which its first ones are decoded: a decoder strips the space before
# a word that stands alone.
CONTEXT = 6


class Tokenizer:
    """The tokenizer of a model directory, and its chat template if it has one.

    Raises UserError if the directory has no ``tokenizer.json`` or it cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / TOKENIZER
        if not path.is_file():
            raise UserError(
                f"{path} does not exist: text needs the model's tokenizer; "
                f"give token ids instead, or copy {TOKENIZER} there"
            )
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{path} is not a tokenizer that can be read: {_line(error)}") from None
        # Files often carry the settings of some training run: a prompt is taken as it is.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The token ids of `text`, with the tokens that the tokenizer adds to a prompt unless
        `special` is false. Raises UserError for what cannot be written in UTF-8."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the prompt {text[:40]!r} is not valid text: character {error.start} "
                "is no character of Unicode; give UTF-8"
            ) from None
        return self.tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def chat(self, messages: str | Sequence[Mapping[str, str]]) -> list[int]:
        """The token ids of a conversation up to where the assistant answers. Its `messages` have a
        ``role`` and a ``content``; a string is the message of a user who opens it.

        Raises UserError if the model has no chat template or it fails.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        settings = _settings(self.directory / "special_tokens_map.json")
        settings |= _settings(self.directory / "tokenizer_config.json")
        try:
            template = _environment().from_string(self._template(settings))
            text = template.render(
                messages=messages,
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **_special_tokens(settings),
            )
        except UserError:
            raise
        except Exception as error:  # a template is a program, and may fail in any way
            raise UserError(
                f"the chat template of {self.directory} failed: {_line(error)}; "
                "omit --chat to complete plain text"
            ) from None
        return self.encode(text, special=False)  # the template has written them

    def _template(self, settings: dict[str, Any]) -> str:
        path = self.directory / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = settings.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if not isinstance(template, str):
            raise UserError(
                f"a chat needs a chat template, but {self.directory} has neither "
                "chat_template.jinja nor a chat_template in tokenizer_config.json; "
                "omit --chat to complete plain text"
            )
        return template


class IncrementalDetokenizer:
    """The text of an answer, token by token, up to the first of the strings `stops`: without half
    characters, and never with a part of a stop string.

    `prompt` are the ids that the answer follows, which decide whether its first word begins with a
    space; `write` is called with each new piece.
    """

    def __init__(
        self,
        text: Tokenizer,
        prompt: Sequence[int],
        stops: Sequence[str] = (),
        write: Callable[[str], Any] = lambda piece: None,
    ) -> None:
        self._text, self._stops, self._write = text, stops, write
        self._ids = list(prompt[-CONTEXT:])
        self._prompt = self._read = len(self._ids)
        self._from = 0  # decoding begins here, a little before the tokens that are yet to be read
        self._pending = ""
        self._pieces: list[str] = []
        self.stopped = False

    def __str__(self) -> str:
        """The text so far, without what may turn out to begin a stop string."""
        return "".join(self._pieces)

    def update(self, answer: Sequence[int]) -> bool:
        """Take in the tokens by which `answer` has grown; whether it has reached a stop string."""
        for token in answer[len(self._ids) - self._prompt :]:
            self._ids.append(token)
            self._pending += self._new_text()
            self._look_for_stops()
        return self.stopped

    def flush(self) -> None:
        """Write what was held back: nothing will follow that makes a stop string of it."""
        if not self.stopped:
            self._pending += self._new_text(whole=False).rstrip(REPLACEMENT)
            self._look_for_stops()
        if not self.stopped:
            self._emit(len(self._pending))

    def _new_text(self, whole: bool = True) -> str:
        """What the tokens not yet read add to the text; "" until they end in a `whole` character.

        Two decodings, with and without them, from where the last piece began: a decoder may treat
        the first token apart, and characters may span tokens.
        """
        before = self._text.decode(self._ids[self._from : self._read])
        text = self._text.decode(self._ids[self._from :])
        if whole and (text.endswith(REPLACEMENT) or len(text) <= len(before)):
            return ""
        self._from, self._read = self._read, len(self._ids)
        return text[len(before) :]

    def _look_for_stops(self) -> None:
        """Write as much as is certain. The stop string counts that is complete first."""
        if self.stopped:
            return
        places = [(self._pending.find(stop), len(stop)) for stop in self._stops]
        ends = [(place + length, place) for place, length in places if place >= 0]
        if ends:
            self._emit(min(ends)[1])
            self.stopped = True
        else:
            self._emit(len(self._pending) - self._held_back())

    def _held_back(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._pending)), 0, -1):
            if any(stop.startswith(self._pending[-length:]) for stop in self._stops):
                return length
        return 0

    def _emit(self, length: int) -> None:
        if length:
            self._pieces.append(self._pending[:length])
            self._write(self._pending[:length])
            self._pending = self._pending[length:]


def finish_output(
    answer: Sequence[int], finish_reason: str, growing: IncrementalDetokenizer | None
) -> dict[str, str | list[int] | None]:
    """What an answer's tokens, which are complete, come to: `text`, None without one that grows,
    `output_ids` and `finish_reason`."""
    if growing:
        growing.update(answer)
        growing.flush()
        finish_reason = "stop" if growing.stopped else finish_reason
    text = None if growing is None else str(growing)
    return {"text": text, "output_ids": list(answer), "finish_reason": finish_reason}


class _Generation(Extension):
    """The tag ``{% generation %}``, which marks for a trainer what an assistant says."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """What chat templates expect of their surroundings, which transformers has made a standard."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """The tokens that templates refer to by name, such as ``bos_token``."""
    named = {name: value for name, value in settings.items() if name.endswith("_token")}
    texts = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in named.items()
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _settings(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _line(error: Exception) -> str:
    """An error of a library, as a part of a sentence."""
    return brief(" ".join(str(error).split()), 300).rstrip(".")
