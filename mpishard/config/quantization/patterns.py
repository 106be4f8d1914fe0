"""The names of modules in configurations, which each producer writes in its own way."""

from __future__ import annotations

import fnmatch
import re

from mpishard.config.fields import Fields, as_json
from mpishard.config.quantization.scheme import EVERY, Patterns


def module_patterns(fields: Fields, name: str) -> Patterns:
    """Modules as transformers names them: by the whole name, or its beginning or end at a dot. A
    beginning may be a regular expression, such as ``model.layers.*.self_attn``."""
    patterns = []
    for one in strings(fields, name):
        patterns.append(compile_pattern(fields, name, rf"(?:{one})(?:(?<=\.)|(?=\.|$))"))
        patterns.append(re.compile(rf"(?:.*\.)?{re.escape(one)}$"))
    return tuple(patterns)


def target_patterns(fields: Fields, name: str) -> Patterns:
    """Modules as compressed-tensors names them: by the whole name, or a regular expression after
    ``re:``. ``Linear`` means all."""
    patterns: list[re.Pattern[str]] = []
    for one in strings(fields, name):
        if one == "Linear":
            patterns += EVERY
        elif one.startswith("re:"):
            patterns.append(compile_pattern(fields, name, one.removeprefix("re:")))
        else:
            patterns.append(re.compile(rf"{re.escape(one)}$"))
    return tuple(patterns)


def wildcard_patterns(names: list[str]) -> Patterns:
    """Modules as ModelOpt names them: by a name with the wildcards of a shell, which stands for all
    modules within it, too."""
    return tuple(
        re.compile(fnmatch.translate(pattern)) for one in names for pattern in (one, f"{one}.*")
    )


def strings(fields: Fields, name: str) -> list[str]:
    """A list of strings; empty if there is no such field."""
    value = fields.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        fields.refuse(name, "must be a list of names")
    return value


def compile_pattern(fields: Fields, name: str, expression: str) -> re.Pattern[str]:
    """The regular expression in the field `name`."""
    try:
        return re.compile(expression)
    except (re.error, OverflowError, RecursionError):
        fields.refuse(name, f"has {as_json(expression)}, which is not a regular expression")
