"""The tokenizer of a model directory: text to token ids and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import processors

from mpishard.errors import UserError, brief
from mpishard.storage.downloads import refuse_placeholder
from mpishard.tokenizer.length_bound import LengthBound
from mpishard.tokenizer.special_tokens import SpecialTokens, read_settings
from mpishard.tokenizer.vocabularies import find_vocabulary

if TYPE_CHECKING:
    from mpishard.tokenizer.chat_template import ChatTemplate

TOKENIZER = "tokenizer.json"

# A text with more characters than this for each token that it may have is looked at before it is
# encoded: tokens of all languages have fewer on average.
LONG_TOKEN = 8


def has_tokenizer(directory: Path) -> bool:
    """Whether a model directory has a tokenizer that can be read."""
    if (directory / TOKENIZER).is_file():
        return True
    return callable(find_vocabulary(directory, read_settings(directory)))


class Tokenizer:
    """The tokenizer of a model directory, with the tokens that the files beside it add, and its
    chat template if it has one.

    `add_bos` says whether a prompt begins with the token of that name; None leaves it to the
    tokenizer. A text that has more than `most_tokens` for certain is refused before it is encoded.
    `notices` are sentences for the user: what other programs do differently with these
    files. Raises UserError if the directory has no ``tokenizer.json``, where a file cannot be read,
    and for an `add_bos` without such a token.
    """

    def __init__(
        self, directory: Path, add_bos: bool | None = None, most_tokens: int | None = None
    ) -> None:
        self.directory, self._add_bos, self._most_tokens = directory, add_bos, most_tokens
        settings = read_settings(directory)
        self.tokenizer, settings, source = _read_tokenizer(directory, settings)
        tokens = SpecialTokens(self.tokenizer, directory, settings)
        self.names = tokens.names
        self.notices = [
            f"{directory}: {brief(repr(token))} is token {actual} of {source}, although the "
            f"files beside it say {declared}"
            for token, (declared, actual) in tokens.moved.items()
        ]
        # Files often carry the settings of some training run: a prompt is taken as it is.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = settings.get("split_special_tokens") is True
        self._settings = settings
        if source != TOKENIZER:
            self._add_ends(settings)
        self._check_bos(settings.get("add_bos_token"))

    def _add_ends(self, settings: Mapping[str, Any]) -> None:
        """Have prompts begin and end with the tokens that the settings say. A ``tokenizer.json``
        says it itself."""
        ends = {
            name: self.names[f"{name}_token"]
            for name in ("bos", "eos")
            if settings.get(f"add_{name}_token") is True and f"{name}_token" in self.names
        }
        parts = [ends.get("bos", ""), "$A", ends.get("eos", "")]
        self.tokenizer.post_processor = processors.TemplateProcessing(
            single=[part for part in parts if part],
            special_tokens=[(end, self.tokenizer.token_to_id(end)) for end in ends.values()],
        )

    def _check_bos(self, declared: object) -> None:
        bos = self.names.get("bos_token")
        self._bos_id = None if bos is None else self.tokenizer.token_to_id(bos)
        prefix = self.tokenizer.encode("").ids
        self._adds_bos = self._bos_id is not None and prefix[:1] == [self._bos_id]
        if self._add_bos and self._bos_id is None:
            raise UserError(
                f"--add-bos: {self.directory} has no bos_token in tokenizer_config.json; leave "
                "the flag out"
            )
        if declared is True and bos and not self._adds_bos and self._add_bos is None:
            self.notices.append(
                f"{self.directory}: tokenizer_config.json says add_bos_token, but {TOKENIZER} adds "
                f"none, and decides as in transformers 5 (4 did add it); --add-bos begins prompts "
                f"with {bos}, --no-add-bos says that they are right as they are"
            )

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The token ids of `text`, with the tokens that the tokenizer adds to a prompt unless
        `special` is false. Raises UserError for what cannot be written in UTF-8 or is too long."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the prompt {text[:40]!r} is not valid text: character {error.start} "
                "is no character of Unicode; give UTF-8"
            ) from None
        self._check_length(text)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        if not special or self._add_bos in (None, self._adds_bos):
            return ids
        assert self._bos_id is not None
        return [self._bos_id, *ids] if self._add_bos else ids[1:]

    def _check_length(self, text: str) -> None:
        most = self._most_tokens
        if most is None or len(text) <= LONG_TOKEN * most:
            return
        if (least := self._length_bound.at_least(text, most + 1)) > most:
            raise UserError(
                f"the prompt of {len(text)} characters has at least {least} tokens, but the model "
                f"has only {most} positions; shorten it, or allow more with --max-model-len"
            )

    @cached_property
    def _length_bound(self) -> LengthBound:
        return LengthBound(self.tokenizer)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`, special tokens left out unless `skip_special_tokens` is false."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @cached_property
    def special_texts(self) -> dict[int, str]:
        """The texts of the special tokens, by id."""
        added = self.tokenizer.get_added_tokens_decoder()
        return {
            token: text.content
            for token, text in added.items()
            if not self.decode([token]) and self.decode([token], skip_special_tokens=False)
        }

    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids of a conversation up to where the assistant answers. Its `messages` have a
        ``role`` and a ``content``; a string is the message of a user who opens it. What
        `chat_template_kwargs` have, such as ``tools``, ``documents`` or ``enable_thinking``, is
        given to the template.

        Raises UserError if the model has no chat template or it fails.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        text = self.chat_template.render(messages, **(chat_template_kwargs or {}))
        return self.encode(text, special=False)  # the template has written them

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template."""
        # Imported here, because only chats need it and its Jinja.
        from mpishard.tokenizer.chat_template import ChatTemplate

        return ChatTemplate(self.directory, self._settings, self.names)


def _read_tokenizer(
    directory: Path, settings: dict[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, Any], str]:
    """The tokenizer, the settings with the defaults that belong to it, and where it comes from."""
    path = directory / TOKENIZER
    if not path.is_file() and not path.is_symlink():
        found = find_vocabulary(directory, settings)
        if callable(found):
            tokenizer, defaults = found()
            return tokenizer, {**defaults, **settings}, "its vocabulary"
        if found:
            raise UserError(found)
        raise UserError(
            f"{path} does not exist: text needs the model's tokenizer; "
            f"give token ids instead, or copy {TOKENIZER} there"
        )
    refuse_placeholder(path)
    try:
        return tokenizers.Tokenizer.from_file(str(path)), settings, TOKENIZER
    except Exception as error:  # the library raises plain Exception
        reason = brief(" ".join(str(error).split()), 300).rstrip(".")
        raise UserError(f"{path} is not a tokenizer that can be read: {reason}") from None
