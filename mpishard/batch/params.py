"""Sampling parameters of a line: vLLM's names, and those of OpenAI where they differ."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mpishard.batch.fields import are_ids, short
from mpishard.engine.sampling_params import SamplingParams
from mpishard.errors import UserError

# The numbers among the fields of SamplingParams that a line may have, and their types.
NUMBERS = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "seed": int,
    "max_tokens": int,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "logprobs": int,
    "n": int,
}
SWITCHES = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")
PARAMS = (*NUMBERS, *SWITCHES, "stop", "stop_token_ids", "logit_bias")


def read_params(fields: dict[str, Any], defaults: SamplingParams, where: str) -> SamplingParams:
    """The sampling parameters of a line, whose fields are not null (UserError)."""
    given = {name: fields[name] for name in PARAMS if name in fields}
    if given.get("logprobs") is False:  # said where it is a switch
        del given["logprobs"]
    if given.get("seed") == -1:  # none
        del given["seed"]
    for name, kind in NUMBERS.items():
        if name in given:
            given[name] = _number(name, given[name], kind, where)
    for name in SWITCHES:
        if not isinstance(given.get(name, False), bool):
            raise UserError(f'{where}: "{name}" must be true or false, not {short(given[name])}')
    if not are_ids(given.get("stop_token_ids", [])):
        raise UserError(
            f'{where}: "stop_token_ids" must be a list of integers, not '
            f"{short(given['stop_token_ids'])}"
        )
    if "stop" in given:
        given["stop"] = _stops(given["stop"], where)
    if "logit_bias" in given:
        given["logit_bias"] = _bias(given["logit_bias"], where)
    try:
        return replace(defaults, **given)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def openai_params(
    body: dict[str, Any], defaults: SamplingParams, is_chat: bool, where: str
) -> SamplingParams:
    """The same of the body of an OpenAI line, which has two names for the limit of tokens, and in a
    chat a switch for log-probabilities beside their number (UserError)."""
    fields = dict(body)
    limit = fields.pop("max_completion_tokens", None)
    if limit is not None and fields.setdefault("max_tokens", limit) != limit:
        raise UserError(
            f'{where}: "max_tokens" {short(fields["max_tokens"])} and "max_completion_tokens" '
            f"{short(limit)} say the same thing differently: leave one out"
        )
    top = fields.pop("top_logprobs", 0)
    if is_chat and "logprobs" in fields:
        if not isinstance(fields["logprobs"], bool):
            raise UserError(
                f'{where}: "logprobs" must be true or false, not {short(fields["logprobs"])}; the '
                'number of tokens is "top_logprobs"'
            )
        if fields["logprobs"]:
            fields["logprobs"] = _number("top_logprobs", top, int, where)
            top = 0
    if top != 0 or isinstance(top, bool):
        raise UserError(
            f'{where}: "top_logprobs" {short(top)} needs '
            + ('"logprobs" true' if is_chat else 'a chat: give the number as "logprobs"')
        )
    params = read_params(fields, defaults, where)
    if fields.get("best_of", params.n) != params.n:
        raise UserError(
            f'{where}: "best_of" {short(fields["best_of"])} is not built, except if it is "n", '
            f"which is {params.n}: leave it out"
        )
    return params


def _number(name: str, value: Any, kind: type, where: str) -> Any:
    if type(value) is kind:
        return value
    if kind is int and type(value) is float and value.is_integer():
        return int(value)  # as data frames write whole numbers beside missing ones
    if kind is float and type(value) is int:
        return float(max(-(2**64), min(value, 2**64)))  # one that large remains out of range
    what = "a whole number" if kind is int else "a number"
    raise UserError(f'{where}: "{name}" must be {what}, not {short(value)}')


def _stops(value: Any, where: str) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise UserError(
            f'{where}: "stop" must be a string or a list of strings, not {short(value)}'
        )
    return tuple(stops)


def _bias(value: Any, where: str) -> dict[int, float]:
    """A bias by token id; JSON has ids as strings."""
    if not isinstance(value, dict):
        raise UserError(
            f'{where}: "logit_bias" must be an object with numbers by token id, not {short(value)}'
        )
    bias = {}
    for token, one in value.items():
        if not (token.isascii() and token.isdigit() and len(token) < 20):
            raise UserError(f'{where}: "logit_bias" has {short(token)}, which is no token id')
        bias[int(token)] = _number(f"logit_bias {token}", one, float, where)
    return bias
