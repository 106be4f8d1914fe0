"""The text of tokens as they come, each character as soon as no later token can change it.

What decoding makes of a sequence depends on more than one token at two places. A decoder may treat
the first token apart: it strips the space of a text's first word. And characters beyond ASCII may
span tokens:

byte level      each token is some bytes (GPT-2). The bytes at the end may begin a character.
byte fallback   some tokens, <0x00> to <0xFF>, are a byte each (SentencePiece). A run of them is
                decoded together: if it is not UTF-8 as a whole, each becomes a replacement
                character, the earlier ones too. A run is therefore certain when it has ended.

A replacement character that ends the text is looked at in the bytes: it may stand for the beginning
of a character, or be what the model wrote.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mpishard.tokenizer import byte_level
from mpishard.tokenizer.tokenizer import Tokenizer

# Tokens of a prompt with which the first ones of an answer are decoded.
CONTEXT = 6
LONGEST_CHARACTER = 4  # bytes, in UTF-8


class TextStream:
    """The text of an answer that follows the ids `prompt`.

    `provisional` is what the text goes on with if no further token comes. Tokens that are left out
    of the text, if `skip_special_tokens`, are not to be pushed.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._kind = byte_decoder(tokenizer)
        self._ids = self._context(prompt)
        self._from = 0  # decoding begins here, a little before the tokens that are yet to be read
        self._read = len(self._ids)
        certain, self.provisional = self._decode()
        self._done = len(certain) + len(self.provisional)  # characters of the decoded text
        self.provisional = ""

    def push(self, token: int) -> str:
        """What becomes certain of the text with the next token."""
        if self._word(token) is None:  # models have more rows in their embedding than tokens
            return ""
        self._ids.append(token)
        certain, provisional = self._decode()
        new, whole = certain[self._done :], certain + provisional
        self.provisional = whole[max(self._done, len(certain)) :]
        self._done = max(self._done, len(certain))
        if new and not self._is_open():
            self._from, self._read = self._read, len(self._ids)
            self._done = len(self._decode()[0])
        return new

    def _decode(self) -> tuple[str, str]:
        """The text of the tokens from `_from` on that is certain, and what follows provisionally;
        half a character at the end is in neither."""
        ids = self._ids[self._from :]
        text = self._text(ids)
        if self._kind == "ByteLevel":
            return (text[:-1] if _ends_within(self._last_bytes(ids)) else text), ""
        run = self._run(ids) if self._kind == "ByteFallback" else []
        if not run:
            return text, ""
        whole = len(run) - _ends_within(bytes(run))
        if not _is_utf8(bytes(run[:whole])):
            return text, ""  # and remains so whatever follows
        certain = self._text(ids[: -len(run)])
        text = self._text(ids[: len(ids) - len(run) + whole])
        return certain, text[len(certain) :]

    def _is_open(self) -> bool:
        """Whether the next token may belong to a character or a run that has begun."""
        if self._kind == "ByteLevel":
            return bool(_ends_within(self._last_bytes(self._ids)))
        return self._kind == "ByteFallback" and bool(self._run(self._ids[-1:]))

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The last tokens of a prompt, from where a character and a run begins."""
        special = self._tokenizer.special_texts if self._skip else {}
        found: list[int] = []
        for token in reversed(prompt):
            word = self._word(token)
            if word is None or token in special:
                continue
            found.append(token)
            if len(found) >= CONTEXT and not self._joins(word):
                break
        return found[::-1]

    def _joins(self, word: str) -> bool:
        """Whether a token may go on with what those before it have begun."""
        if self._kind == "ByteLevel":
            first = byte_level.to_bytes(word)[:1]
            return b"\x80" <= first < b"\xc0"
        return self._kind == "ByteFallback" and _fallback_byte(word) is not None

    def _last_bytes(self, ids: list[int]) -> bytes:
        """The last bytes of byte-level tokens, as many as a character may have."""
        last = b""
        for token in reversed(ids):
            if len(last) >= LONGEST_CHARACTER:
                break
            last = byte_level.to_bytes(self._word(token) or "") + last
        return last

    def _run(self, ids: list[int]) -> list[int]:
        """The bytes of the run of byte-fallback tokens that ends a sequence."""
        run: list[int] = []
        for token in reversed(ids):
            byte = _fallback_byte(self._word(token))
            if byte is None:
                break
            run.append(byte)
        return run[::-1]

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip)

    def _word(self, token: int) -> str | None:
        return self._tokenizer.tokenizer.id_to_token(token)


def byte_decoder(tokenizer: Tokenizer) -> str:
    """How a tokenizer's decoder treats bytes: "ByteLevel", "ByteFallback", or neither: ""."""
    decoder = tokenizer.tokenizer.decoder
    types = set(_types(json.loads(decoder.__getstate__()))) if decoder is not None else set()
    return next((kind for kind in ("ByteLevel", "ByteFallback") if kind in types), "")


def _types(decoder: dict[str, Any]) -> list[str]:
    """The types of a decoder and of those that it consists of."""
    return [decoder["type"], *(kind for one in decoder.get("decoders", []) for kind in _types(one))]


def _ends_within(data: bytes) -> int:
    """How many bytes at the end of `data` begin a character of UTF-8 that they do not end."""
    for length in range(1, min(len(data), LONGEST_CHARACTER - 1) + 1):
        try:
            data[-length:].decode()
        except UnicodeDecodeError as error:
            if error.start == 0 and error.reason == "unexpected end of data":
                return length
    return 0


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _fallback_byte(word: str | None) -> int | None:
    """The byte that a token of byte fallback stands for; None for another token."""
    if word is None or len(word) != 6 or not (word.startswith("<0x") and word.endswith(">")):
        return None
    try:
        return bytes.fromhex(word[3:5])[0]
    except ValueError:
        return None
