"""Texts that answers have beside their own: those of single tokens, and of an echoed prompt."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from mpishard.tokenizer import Tokenizer

# Before a token that is decoded by itself, so that the space in it stays: decoders strip the first.
ANCHOR = "a"


class AnswerTexts:
    """The texts that `tokenizer` makes of tokens; without one, ids stand for them."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode(ANCHOR, special=False) if tokenizer else []
        self.of_token = lru_cache(maxsize=100_000)(self._of_token)

    def _of_token(self, token: int) -> str:
        """The text of a token by itself, that of a special token too. A part of a character is a
        replacement character."""
        if self._tokenizer is None:
            return f"token_id:{token}"  # as vLLM writes it
        decode = self._tokenizer.tokenizer.decode
        before = decode(self._anchor, skip_special_tokens=False)
        text = decode([*self._anchor, token], skip_special_tokens=False)
        if text.startswith(before):
            return text[len(before) :]
        return decode([token], skip_special_tokens=False)

    def of_prompt(self, prompt: Any) -> str:
        """The text of a prompt, which may be token ids."""
        if isinstance(prompt, str):
            return prompt
        return self._tokenizer.decode(prompt) if self._tokenizer else ""
