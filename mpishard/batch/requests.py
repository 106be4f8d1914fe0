"""The lines of a batch: what each asks for, and its answer in the same form.

plain    ``{"id": "a", "prompt": "text", "max_tokens": 9}`` or with ``"input_ids": [1, 2]``
OpenAI   ``{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {…}}``, the
         form of OpenAI's Batch API, which vLLM's run-batch takes as well, or ``/v1/completions``

Forms may be mixed. A line that cannot be answered is answered with the reason, in its own form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from time import time
from typing import Any

from mpishard.engine.sampling_params import SamplingParams
from mpishard.errors import UserError, brief
from mpishard.storage.parsing import parse_json

PLAIN, COMPLETION, CHAT = "plain", "/v1/completions", "/v1/chat/completions"

# The numbers among the fields of SamplingParams that a line may have, and their types.
NUMBERS = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "seed": int,
    "max_tokens": int,
}
SWITCHES = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")
PARAMS = (*NUMBERS, "stop", "stop_token_ids", *SWITCHES)
PLAIN_FIELDS = ("id", "prompt", "input_ids", *PARAMS)
OPENAI_FIELDS = ("custom_id", "method", "url", "body")

# Fields of an OpenAI body that change nothing about the answer, and those that may be there only
# with the value that asks for nothing.
UNRELATED = ("model", "user", "metadata", "store", "service_tier")
NEUTRAL: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "stream": False,
    "echo": False,
    "logprobs": False,
    "top_logprobs": 0,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
}


@dataclass(frozen=True)
class BatchRequest:
    """What one line asks for. `error` says why it cannot be answered, if it cannot."""

    number: int  # in the file, from 1
    form: str = PLAIN
    name: Any = None
    prompt: str | list[int] | list[dict[str, str]] = ""
    params: SamplingParams = SamplingParams()
    model: str = ""
    error: str = ""

    def answer(
        self, text: str | None, ids: list[int], finish_reason: str, prompt_tokens: int
    ) -> bytes:
        """The line of the output that has the answer."""
        counts = {"prompt_tokens": prompt_tokens, "completion_tokens": len(ids)}
        if self.form == PLAIN:
            return _dump(
                {
                    "id": self.name,
                    "prompt": self.prompt,
                    "text": text,
                    "output_ids": ids,
                    "finish_reason": finish_reason,
                    **counts,
                }
            )
        said: dict[str, Any] = {"text": text}
        if self.form == CHAT:
            said = {"message": {"role": "assistant", "content": text}}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}
        body = {
            "id": f"cmpl-{self.number}",
            "object": "chat.completion" if self.form == CHAT else "text_completion",
            "created": int(time()),
            "model": self.model,
            "choices": [choice],
            "usage": {**counts, "total_tokens": sum(counts.values())},
        }
        return self._respond(200, body, None)

    def error_response(self, reason: str) -> bytes:
        """The line of the output that says why there is no answer."""
        if self.form == PLAIN:
            return _dump({"id": self.name, "line": self.number, "error": reason})
        error = {"message": reason, "type": "invalid_request_error", "param": None, "code": None}
        return self._respond(
            400, {"error": error}, {"code": "invalid_request_error", "message": reason}
        )

    def _respond(self, status: int, body: dict[str, Any], error: dict[str, str] | None) -> bytes:
        request = f"line-{self.number}"
        response = {"status_code": status, "request_id": request, "body": body}
        return _dump({"id": request, "custom_id": self.name, "response": response, "error": error})


def read_request(content: bytes, number: int, defaults: SamplingParams, where: str) -> BatchRequest:
    """The request of line `number` of a file, which errors call `where`; `defaults` are the
    sampling parameters of lines that say nothing else."""
    line = BatchRequest(number)
    try:
        fields = read_object(content, where)
        if fields.keys() & {"custom_id", "body"}:
            line = replace(line, form=_form(fields), name=fields.get("custom_id"))
            return _read_openai(line, fields, defaults, where)
        line = replace(line, name=fields.get("id"))
        check_fields(fields, PLAIN_FIELDS, where)
        line = replace(line, name=name_of(fields, "id", where))
        return replace(
            line, prompt=prompt_of(fields, where), params=_params(fields, defaults, where)
        )
    except UserError as error:
        name = None if isinstance(line.name, bool | float | list | dict) else line.name
        return replace(line, name=name, error=str(error))


def read_object(content: bytes | str, where: str) -> dict[str, Any]:
    """The JSON object of one line (UserError)."""
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
    return fields


def check_fields(fields: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    """Refuse fields that would be ignored (UserError)."""
    if unknown := sorted(fields.keys() - set(known)):
        names = ", ".join(f'"{name}"' for name in known)
        raise UserError(f'{where} has the unknown field "{brief(unknown[0])}"; known are {names}')


def name_of(fields: dict[str, Any], key: str, where: str) -> str | int:
    """The name that a line's answer is to bear (UserError)."""
    name = fields.get(key)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise UserError(f'{where} must be an object with an "{key}", not {_short(fields)}')
    return name


def prompt_of(fields: dict[str, Any], where: str) -> str | list[int]:
    """What a plain line gives to go on from (UserError)."""
    ids: list[int] | None = fields.get("input_ids")
    prompt: str | None = fields.get("prompt")
    if (ids is None) == (prompt is None):
        raise UserError(f'{where} must have either "input_ids" or "prompt"')
    if prompt is not None and not isinstance(prompt, str):
        raise UserError(f'{where}: "prompt" must be a string, not {_short(prompt)}')
    if ids is not None and not _are_ids(ids):
        raise UserError(f'{where}: "input_ids" must be a list of integers, not {_short(ids)}')
    return prompt if ids is None else ids  # type: ignore[return-value]  # one of them is there


def _params(fields: Mapping[str, Any], defaults: SamplingParams, where: str) -> SamplingParams:
    """The sampling parameters of a line; null is as good as nothing."""
    given = {name: fields[name] for name in PARAMS if fields.get(name) is not None}
    for name, kind in NUMBERS.items():
        if name in given:
            given[name] = _number(name, given[name], kind, where)
    if "stop" in given:
        given["stop"] = _stops(given["stop"], where)
    if not _are_ids(given.get("stop_token_ids", [])):
        raise UserError(
            f'{where}: "stop_token_ids" must be a list of integers, not '
            f"{_short(given['stop_token_ids'])}"
        )
    for name in SWITCHES:
        if not isinstance(given.get(name, False), bool):
            raise UserError(f'{where}: "{name}" must be true or false, not {_short(given[name])}')
    try:
        return replace(defaults, **given)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _number(name: str, value: Any, kind: type, where: str) -> Any:
    if type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(max(-(2**64), min(value, 2**64)))  # one that large remains out of range
    what = "a whole number" if kind is int else "a number"
    raise UserError(f'{where}: "{name}" must be {what}, not {_short(value)}')


def _stops(value: Any, where: str) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise UserError(
            f'{where}: "stop" must be a string or a list of strings, not {_short(value)}'
        )
    return tuple(stops)


def _form(fields: dict[str, Any]) -> str:
    return fields["url"] if fields.get("url") in (COMPLETION, CHAT) else CHAT


def _read_openai(
    line: BatchRequest, fields: dict[str, Any], defaults: SamplingParams, where: str
) -> BatchRequest:
    check_fields(fields, OPENAI_FIELDS, where)
    name_of(fields, "custom_id", where)
    if fields.get("method", "POST") != "POST":
        raise UserError(f'{where}: "method" must be "POST", not {_short(fields["method"])}')
    if fields.get("url") not in (COMPLETION, CHAT):
        raise UserError(
            f'{where}: "url" must be "{CHAT}" or "{COMPLETION}", not {_short(fields.get("url"))}'
        )
    body = fields.get("body")
    if not isinstance(body, dict):
        raise UserError(f'{where}: "body" must be an object, not {_short(body)}')
    prompt = "messages" if line.form == CHAT else "prompt"
    known = (prompt, *PARAMS, "max_completion_tokens", *UNRELATED, *NEUTRAL)
    check_fields(body, known, f"{where}: its body")
    for name, neutral in NEUTRAL.items():
        if not _asks_nothing(body.get(name), neutral):
            raise UserError(
                f'{where}: "{name}" {_short(body[name])} is not built: leave it out, or say '
                f"{json.dumps(neutral)}"
            )
    if not isinstance(body.get("model", ""), str):
        raise UserError(f'{where}: "model" must be a string, not {_short(body["model"])}')
    line = replace(line, model=body.get("model", ""))
    asked = _messages(body.get("messages"), where) if prompt == "messages" else _text(body, where)
    return replace(line, prompt=asked, params=_params(_one_limit(body, where), defaults, where))


def _asks_nothing(value: Any, neutral: Any) -> bool:
    """Whether a field says what it would mean left out; 0 and false are not the same."""
    same = value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
    return value is None or same


def _text(body: dict[str, Any], where: str) -> str | list[int]:
    prompt: str | list[int] = body.get("prompt")  # type: ignore[assignment]  # looked at now
    if not isinstance(prompt, str) and not _are_ids(prompt):
        raise UserError(
            f'{where}: "prompt" must be a string or a list of token ids, not {_short(prompt)}'
        )
    return prompt


def _one_limit(body: dict[str, Any], where: str) -> dict[str, Any]:
    """A body whose limit of tokens, which has two names, has the older one."""
    limit = body.get("max_completion_tokens")
    if limit is None:
        return body
    if body.get("max_tokens") not in (None, limit):
        raise UserError(
            f'{where}: "max_tokens" {_short(body["max_tokens"])} and "max_completion_tokens" '
            f"{_short(limit)} say the same thing differently: leave one out"
        )
    return body | {"max_tokens": limit}


def _messages(messages: Any, where: str) -> list[dict[str, str]]:
    """A conversation, its contents as strings."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{where}: "messages" must be a list of messages, not {_short(messages)}')
    plain = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and all(_is_text(part) for part in content):
            content = "\n".join(part["text"] for part in content)
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            raise UserError(
                f'{where}: a message must have a "role" and a "content" of text, not '
                f"{_short(message)}"
            )
        check_fields(message, ("role", "content", "name"), f"{where}: a message")
        plain.append({**message, "content": content})
    return plain


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def _are_ids(ids: Any) -> bool:
    return isinstance(ids, list) and all(type(one) is int for one in ids)


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:60]


def _dump(answer: dict[str, Any]) -> bytes:
    """One line of JSON, legible where it can be written in UTF-8."""
    try:
        return json.dumps(answer, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a character, in an id or a prompt
        return json.dumps(answer).encode()
