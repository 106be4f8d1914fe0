"""The fields of a line: JSON objects from outside, and the sentences that refuse them."""

from __future__ import annotations

import json
from typing import Any

from mpishard.errors import UserError, brief
from mpishard.storage.parsing import parse_json


def read_object(content: bytes | str, where: str) -> dict[str, Any]:
    """The JSON object of one line, without its fields that are null (UserError)."""
    try:
        text = content.decode() if isinstance(content, bytes) else content
        fields = parse_json(text)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from None
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise UserError(f'{where} must be an object with an "id", not {text.strip()[:60]}')
    return without_nulls(fields)


def without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that say something: one that is null is as good as absent, known or not."""
    return {name: value for name, value in fields.items() if value is not None}


def check_fields(fields: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    """Refuse fields that would be ignored (UserError)."""
    if unknown := sorted(fields.keys() - set(known)):
        names = ", ".join(f'"{name}"' for name in known)
        raise UserError(f'{where} has the unknown field "{brief(unknown[0])}"; known are {names}')


def name_of(fields: dict[str, Any], key: str, where: str) -> str | int:
    """The name that a line's answer is to bear (UserError)."""
    name = fields.get(key)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise UserError(f'{where} must be an object with an "{key}", not {short(fields)}')
    return name


def decoder_ids_of(fields: dict[str, Any], where: str) -> list[int] | None:
    """What the decoder beside an encoder is to begin with, if a line says so (UserError)."""
    ids = the_one(fields.get("decoder_input_ids"))
    if ids is not None and not are_ids(ids):
        raise UserError(
            f'{where}: "decoder_input_ids" must be a list of integers, not {short(ids)}'
        )
    return ids


def prompt_of(fields: dict[str, Any], where: str) -> str | list[int]:
    """What a plain line gives to go on from (UserError)."""
    given = [name for name in ("input_ids", "prompt") if name in fields]
    if len(given) != 1:
        raise UserError(f'{where} must have either "input_ids" or "prompt"')
    if given == ["prompt"]:
        return one_prompt(fields["prompt"], where)
    ids = the_one(fields["input_ids"])
    if not are_ids(ids):
        raise UserError(
            f'{where}: "input_ids" must be a list of integers, not {short(fields["input_ids"])}'
        )
    return ids


def one_prompt(prompt: Any, where: str) -> str | list[int]:
    """A prompt, a text or token ids, which may be the one item of a list (UserError)."""
    only = the_one(prompt)
    if isinstance(only, str) or are_ids(only):
        return only
    problem = "must be one string or one list of token ids"
    if isinstance(prompt, list) and len(prompt) > 1 and all(isinstance(p, str) for p in prompt):
        problem = "has several prompts, but a line has one: it must be one string"
    raise UserError(f'{where}: "prompt" {problem}, not {short(prompt)}')


def the_one(value: Any) -> Any:
    """The text or list in a list of one; anything else as it is."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        return value[0]
    return value


def are_ids(ids: Any) -> bool:
    """Whether something is a list of integers."""
    return isinstance(ids, list) and all(type(one) is int for one in ids)


def short(value: Any) -> str:
    """A value as JSON, cut off to fit into a sentence."""
    return json.dumps(value, ensure_ascii=False)[:60]
