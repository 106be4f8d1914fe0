"""What the files beside ``tokenizer.json`` add to it: tokens, and names by which templates call
them.

A checkpoint that was extended for chat often names its new tokens there alone. The order in which
files are read, which of them counts, and the order in which tokens are added, which decides their
ids, are those of transformers 5:

tokenizer_config.json    ``added_tokens_decoder``, ``bos_token`` and its like, and
                         ``extra_special_tokens``, before called ``additional_special_tokens``
special_tokens_map.json  the same names; it counts only without an ``added_tokens_decoder``
added_tokens.json        ids by token; it counts only without an ``added_tokens_decoder``
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from mpishard.errors import UserError, brief
from mpishard.storage.model_dir import read_json

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"

# The names that every tokenizer may give to tokens; a checkpoint may have others that end alike.
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DECODER = "added_tokens_decoder"
EXTRA, ADDITIONAL = "extra_special_tokens", "additional_special_tokens"
SPECIFIC = "model_specific_special_tokens"  # by name, as transformers 5 writes them
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_settings(directory: Path) -> dict[str, Any]:
    """The fields of ``tokenizer_config.json``, and those of ``special_tokens_map.json`` where they
    count. Raises UserError as `read_json` does."""
    settings = _read(directory / TOKENIZER_CONFIG)
    if not settings.get(EXTRA) and ADDITIONAL in settings:
        settings[EXTRA] = settings.pop(ADDITIONAL)
    if DECODER not in settings:
        for name, value in _read(directory / SPECIAL_TOKENS_MAP).items():
            if name == ADDITIONAL:
                settings.setdefault(EXTRA, value)
            elif name == EXTRA and isinstance(value, list):
                before = settings.get(EXTRA)
                settings[EXTRA] = [*(before if isinstance(before, list) else ()), *value]
            else:
                settings[name] = value
    return settings


class SpecialTokens:
    """The tokens that a model directory adds to its `tokenizer`, which gets them at once.

    `names` are the texts of the tokens that have a name, such as ``bos_token``; `moved` those that
    the files give another id than they come to have. Raises UserError for what is no token.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, directory: Path, settings: dict[str, Any]
    ) -> None:
        self._where = directory / TOKENIZER_CONFIG
        named = self._named(settings)
        extra = settings.get(EXTRA) or []
        if not isinstance(extra, list | dict):
            raise UserError(f'{self._where}: "{EXTRA}" must be a list or an object')
        others = [self._token(one, EXTRA) for one in extra] if isinstance(extra, list) else []
        by_id = self._added(tokenizer, directory, settings, named, others)

        known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
        new = {token.content: token for _, token in sorted(by_id.items())}
        for token in (*named.values(), *others):
            if token.content not in known:
                new.setdefault(token.content, token)
        self.names = {name: "" for name in NAMES if settings.get(name) == ""}
        self.names |= {name: token.content for name, token in named.items()}
        for content in self.names.values():
            if content in new:
                new[content].special = True
        tokenizer.add_tokens(list(new.values()))
        self.moved = {
            token.content: (declared, tokenizer.token_to_id(token.content))
            for declared, token in by_id.items()
            if tokenizer.token_to_id(token.content) != declared
        }

    def _named(self, settings: dict[str, Any]) -> dict[str, AddedToken]:
        named = {name: self._token(settings[name], name) for name in NAMES if settings.get(name)}
        for name, value in settings.items():
            if name.endswith("_token") and name not in NAMES and isinstance(value, str | dict):
                named[name] = self._token(value, name)
        for field in (SPECIFIC, EXTRA):
            if isinstance(tokens := settings.get(field), dict):
                named |= {name: self._token(value, name) for name, value in tokens.items()}
        return named

    def _added(
        self,
        tokenizer: tokenizers.Tokenizer,
        directory: Path,
        settings: dict[str, Any],
        named: dict[str, AddedToken],
        others: list[AddedToken],
    ) -> dict[int, AddedToken]:
        """The tokens that the files list with their ids."""
        if DECODER in settings:
            listed = settings[DECODER]
            if not isinstance(listed, dict) or not all(map(str.isdecimal, listed)):
                raise UserError(f'{self._where}: "{DECODER}" must have token ids and their tokens')
            return {int(place): self._token(token, DECODER) for place, token in listed.items()}
        special = {token.content for name, token in named.items() if name in NAMES}
        special |= {token.content for token in others}
        by_id: dict[int, AddedToken] = {}
        for content, place in _read(directory / ADDED_TOKENS).items():
            if type(place) is not int or place < 0 or not content:
                raise UserError(
                    f"{directory / ADDED_TOKENS}: {brief(repr(content))} must have a token id, not "
                    f"{brief(repr(place))}"
                )
            is_special = content in special
            by_id[place] = AddedToken(content, special=is_special, normalized=not is_special)
        return by_id | tokenizer.get_added_tokens_decoder()

    def _token(self, value: Any, name: str) -> AddedToken:
        """A token as files write it: its text, or an object with a ``content``."""
        if isinstance(value, str) and value and name != DECODER:
            return AddedToken(value, special=True)
        if isinstance(value, dict) and isinstance(value.get("content"), str) and value["content"]:
            flags = {key: value[key] for key in FLAGS if isinstance(value.get(key), bool)}
            if name != DECODER:
                flags["special"] = True
            return AddedToken(value["content"], **flags)
        raise UserError(
            f'{self._where}: "{brief(name)}" must be a token, which is a text or an object with a '
            f'"content", not {brief(repr(value))}'
        )


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
