"""The messages of a conversation, as OpenAI's API has them and as chat templates expect them."""

from __future__ import annotations

from typing import Any

from mpishard.batch.fields import check_fields, short, without_nulls
from mpishard.errors import UserError
from mpishard.storage.parsing import parse_json

Message = dict[str, Any]

# What a message may have; the template sees all of it.
FIELDS = (
    *("role", "content", "name", "tool_calls", "tool_call_id"),
    *("reasoning_content", "reasoning", "thinking"),
)

# What a chat template is given beside the messages.
TEMPLATE_FIELDS = ("tools", "documents", "chat_template_kwargs")


def read_messages(messages: Any, where: str) -> list[Message]:
    """A conversation, for a chat template: without nulls, contents as texts or lists of parts that
    are, and arguments of tool calls as objects, as the templates of transformers expect them
    (UserError)."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{where}: "messages" must be a list of messages, not {short(messages)}')
    return [_message(message, where) for message in messages]


def with_text_contents(messages: list[Message]) -> list[Message]:
    """The same conversation, for a template that takes no parts: the texts of parts in lines."""
    return [
        {**message, "content": "\n".join(part["text"] for part in message["content"])}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def template_kwargs(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """What a line gives to the chat template beside the messages (UserError)."""
    variables = fields.get("chat_template_kwargs", {})
    if not isinstance(variables, dict):
        raise UserError(
            f'{where}: "chat_template_kwargs" must be an object, not {short(variables)}'
        )
    return variables | {name: fields[name] for name in ("tools", "documents") if fields.get(name)}


def _message(given: Any, where: str) -> Message:
    message = without_nulls(given) if isinstance(given, dict) else {}
    for name in ("annotations", "tool_calls"):  # empty in answers that come back as turns
        if message.get(name) == []:
            del message[name]
    content = message.get("content")
    for part in content if isinstance(content, list) else []:
        if isinstance(part, dict) and part.get("type") != "text":
            raise UserError(
                f"{where}: a message has a part of the type {short(part.get('type'))}, but only "
                '"text" is built'
            )
    are_parts = isinstance(content, list) and all(map(_is_text, content))
    says_something = isinstance(content, str) or are_parts
    says_something |= content is None and "tool_calls" in message
    if not says_something or not isinstance(message.get("role"), str):
        raise UserError(
            f'{where}: a message must have a "role" and a "content" of text, or "tool_calls", not '
            f"{short(given)}"
        )
    check_fields(message, FIELDS, f"{where}: a message")
    if "tool_calls" in message:
        calls = message["tool_calls"]
        if not isinstance(calls, list):
            raise UserError(f'{where}: "tool_calls" must be a list, not {short(calls)}')
        message["tool_calls"] = [_tool_call(call, where) for call in calls]
    return message


def _tool_call(given: Any, where: str) -> dict[str, Any]:
    """A call of a function, its arguments an object."""
    call = without_nulls(given) if isinstance(given, dict) else {}
    function = call.get("function")
    function = without_nulls(function) if isinstance(function, dict) else {}
    if not isinstance(function.get("name"), str):
        raise UserError(
            f'{where}: one of the "tool_calls" must have a "function" with a "name", not '
            f"{short(given)}"
        )
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments) if arguments.strip() else {}
        except ValueError:
            pass
    if not isinstance(arguments, dict):
        raise UserError(
            f'{where}: the "arguments" of a tool call must be a JSON object, not {short(arguments)}'
        )
    return {**call, "function": {**function, "arguments": arguments}}


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )
