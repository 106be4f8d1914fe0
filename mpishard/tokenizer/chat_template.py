"""Chat templates, rendered as transformers renders them: the files in which they stand, and what
they are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes

from mpishard.errors import UserError, brief
from mpishard.storage.downloads import refuse_placeholder
from mpishard.storage.model_dir import named_templates, read_json
from mpishard.tokenizer.template_environment import template_environment

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
        environment = template_environment()
        try:
            return environment.from_string(source).render(
                messages=[_normalized(one) for one in messages],
                tools=tools,
                documents=documents,
                **given,
            )
        except Exception as error:  # a template is a program, and may fail in any way
            raise self._failure(error) from None

    def takes_parts(self, tools: object = None) -> bool:
        """Whether the template for a conversation with these `tools` takes the content of a message
        apart itself, where that is a list of parts. UserError as `render`."""
        try:
            return _loops_over_content(template_environment().parse(self._select(tools)))
        except TemplateError as error:
            raise self._failure(error) from None

    def _failure(self, error: Exception) -> UserError:
        return UserError(
            f"the chat template of {self._directory} failed: {_line(error)}; "
            "omit --chat to complete plain text"
        )

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


def _loops_over_content(template: nodes.Template) -> bool:
    return any(
        "content" in (getattr(node, "name", ""), getattr(node, "attr", ""))
        or (isinstance(node, nodes.Const) and node.value == "content")
        for loop in template.find_all(nodes.For)
        for node in (loop.iter, *loop.iter.find_all((nodes.Name, nodes.Getattr, nodes.Const)))
    )


def _normalized(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: without fields that are null, and with its reasoning under
    the name that they read."""
    message = {name: value for name, value in message.items() if value is not None}
    reasoning = next((message[name] for name in REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _line(error: Exception) -> str:
    """An error of a library, as a part of a sentence."""
    return brief(" ".join(str(error).split()), 300).rstrip(".")
