"""Chat templates, rendered as transformers renders them: the files in which they stand, what they
are given, and the surroundings that they expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from mpishard.errors import UserError, brief
from mpishard.storage.downloads import refuse_placeholder
from mpishard.storage.model_dir import named_templates, read_json

TEMPLATE_FILE = "chat_template.jinja"
PROCESSOR_TEMPLATE = "chat_template.json"  # of multimodal models, in older checkpoints

# What a template is rendered with, and what else decides about that elsewhere: arguments, and so
# no variables that a user may set beside them.
ARGUMENTS = frozenset(
    "messages conversation chat_template continue_final_message tokenize padding truncation "
    "max_length return_tensors return_dict return_assistant_tokens_mask sanitize_control_tokens "
    "tokenizer_kwargs".split()
)

# Names under which a message may have the reasoning before its content.
REASONING = ("reasoning_content", "thinking", "reasoning")

Messages = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """The chat template of a model directory, or several of them by name; `names` are the texts of
    special tokens that templates call by name."""

    def __init__(self, directory: Path, settings: Mapping[str, Any], names: dict[str, str]) -> None:
        self._directory, self._names = directory, names
        self._templates = _read_templates(directory, settings)

    def render(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation up to where the assistant answers, unless `variables` say
        ``add_generation_prompt=False``; they reach the template under their names.

        Raises UserError if the model has no chat template, and for what a template is not given or
        fails on.
        """
        if refused := sorted(ARGUMENTS & variables.keys()):
            raise UserError(
                f'"{refused[0]}" is no variable of a chat template, and is not built: leave it out '
                "of chat_template_kwargs"
            )
        _check_objects("messages", messages)
        if not messages:
            raise UserError("a chat needs at least one message")
        for name, values in (("tools", tools), ("documents", documents)):
            if values is not None:
                _check_objects(name, values)
        source = self._select(tools)
        given = {"add_generation_prompt": True, **self._names, **variables}
        try:
            return (
                _environment()
                .from_string(source)
                .render(
                    messages=[_normalized(one) for one in messages],
                    tools=tools,
                    documents=documents,
                    **given,
                )
            )
        except Exception as error:  # a template is a program, and may fail in any way
            raise UserError(
                f"the chat template of {self._directory} failed: {_line(error)}; "
                "omit --chat to complete plain text"
            ) from None

    def _select(self, tools: object) -> str:
        """The source of the template for a conversation with these `tools`, which may be None."""
        templates = self._templates
        if not isinstance(templates, dict):
            return templates
        if not templates:
            raise UserError(
                f"a chat needs a chat template, but {self._directory} has neither {TEMPLATE_FILE} "
                "nor a chat_template in tokenizer_config.json; omit --chat to complete plain text"
            )
        name = "tool_use" if tools is not None and "tool_use" in templates else "default"
        if name not in templates:
            raise UserError(
                f"{self._directory} has the chat templates {', '.join(sorted(templates))}, and "
                f"none of them is the default: copy the one to use to {TEMPLATE_FILE}"
            )
        return templates[name]


def _read_templates(directory: Path, settings: Mapping[str, Any]) -> str | dict[str, str]:
    """A template, or several by name; none if there are none. Files of their own count before
    ``tokenizer_config.json``."""
    files = {path.stem: path for path in named_templates(directory)}
    if (directory / TEMPLATE_FILE).is_file():
        files = {"default": directory / TEMPLATE_FILE, **files}
    if files:
        found: Any = {name: _read_text(path) for name, path in files.items()}
        return found["default"] if found.keys() == {"default"} else found
    where, found = "tokenizer_config.json", settings.get("chat_template")
    if found is None and (directory / PROCESSOR_TEMPLATE).is_file():
        where = PROCESSOR_TEMPLATE
        found = read_json(directory / where).get("chat_template")
    if isinstance(found, list) and all(isinstance(one, dict) for one in found):
        found = {one.get("name"): one.get("template") for one in found}
    if found is None or isinstance(found, str):
        return {} if found is None else found
    if not isinstance(found, dict) or not all(
        isinstance(one, str) for pair in found.items() for one in pair
    ):
        raise UserError(
            f'{directory / where}: "chat_template" must be a text, or texts by name, not '
            f"{brief(repr(found))}"
        )
    return found


def _read_text(path: Path) -> str:
    refuse_placeholder(path)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _check_objects(name: str, values: object) -> None:
    ours = isinstance(values, Sequence) and not isinstance(values, str | bytes)
    if not ours or not all(isinstance(one, Mapping) for one in values):  # type: ignore[attr-defined]
        raise UserError(f'"{name}" must be a list of objects, not {brief(repr(values))}')


def _normalized(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: without fields that are null, and with its reasoning under
    the name that they read."""
    message = {name: value for name, value in message.items() if value is not None}
    reasoning = next((message[name] for name in REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


class _Generation(Extension):
    """The tag ``{% generation %}``, which marks for a trainer what an assistant says. It is a
    block of its own: variables that are set in it are not seen outside."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

    def _as_it_is(self, caller: Any) -> str:
        return str(caller())


class TemplateNamespace(Namespace):
    """Jinja's namespace, without names that begin with an underscore."""

    def __init__(*args: Any, **values: Any) -> None:  # noqa: N805 (a value may be called self)
        for name in dict(*args[1:], **values):
            _check_name(name)
        Namespace.__init__(*args, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not have the name {name!r}")


class TemplateDict:
    """The function dict, and nothing else of the type."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """``dict.fromkeys``."""
        return dict.fromkeys(*args)


def _environment() -> jinja2.Environment:
    """What chat templates expect of their surroundings, which transformers has made a standard."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": TemplateDict(),
        "namespace": TemplateNamespace,
    }
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter ``tojson``, which escapes no HTML, unlike Jinja's."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _line(error: Exception) -> str:
    """An error of a library, as a part of a sentence."""
    return brief(" ".join(str(error).split()), 300).rstrip(".")
