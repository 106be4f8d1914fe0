"""Sets of modules, as configurations name them: each producer in its own way."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from mpishard.config.fields import Fields, as_json

_LITERAL = re.compile(r"[\w.-]+")  # in which a dot is meant as a dot


@dataclass(frozen=True)
class Modules:
    """Some modules of a model, by their names.

    >>> some = Modules(within=frozenset({"a.b"}), ends=frozenset({"gate"}))
    >>> [name in some for name in ("a.b.c", "a.bc", "x.gate", "x.gate_proj")]
    [True, False, True, False]
    """

    whole: frozenset[str] = frozenset()  # names
    within: frozenset[str] = frozenset()  # names of modules, with all that is within them
    ends: frozenset[str] = frozenset()  # ends of names, after a dot
    starts: tuple[str, ...] = ()  # beginnings of names, of any length
    expressions: tuple[re.Pattern[str], ...] = ()  # which match from the first character on

    def __contains__(self, name: str) -> bool:
        # A checkpoint may have a hundred thousand modules, and a list of a thousand names.
        if name in self.whole or name.startswith(self.starts):
            return True
        parts = name.split(".")
        outer = accumulate(parts, "{}.{}".format)
        if self.within and any(module in self.within for module in outer):
            return True
        if self.ends and any(".".join(parts[n:]) in self.ends for n in range(len(parts))):
            return True
        return any(expression.match(name) for expression in self.expressions)

    def __or__(self, other: Modules) -> Modules:
        return Modules(
            self.whole | other.whole,
            self.within | other.within,
            self.ends | other.ends,
            self.starts + other.starts,
            self.expressions + other.expressions,
        )


EVERY = Modules(starts=("",))


def of_transformers(fields: Fields, name: str) -> Modules:
    """Modules as transformers names them: by the whole name, or its beginning or end at a dot. A
    beginning may be a regular expression, such as ``model.layers.*.self_attn``."""
    given = strings(fields, name)
    expressions = [
        compile_expression(fields, name, rf"(?:{one})(?:(?<=\.)|(?=\.|$))")
        for one in given
        if not _LITERAL.fullmatch(one)
    ]
    names = frozenset(given)
    return Modules(within=names, ends=names, expressions=tuple(expressions))


def of_compressed_tensors(fields: Fields, name: str) -> Modules:
    """Modules as compressed-tensors names them: by the whole name, or a regular expression after
    ``re:``. ``Linear`` means all."""
    given = strings(fields, name)
    expressions = [
        compile_expression(fields, name, one.removeprefix("re:"))
        for one in given
        if one.startswith("re:")
    ]
    some = Modules(whole=frozenset(given), expressions=tuple(expressions))
    return some | EVERY if "Linear" in given else some


def of_modelopt(names: Iterable[str]) -> Modules:
    """Modules as ModelOpt names them: by a name with the wildcards of a shell, which stands for all
    modules within it, too."""
    some = Modules()
    for one in names:
        start = one.removesuffix("*")
        if _LITERAL.fullmatch(one):
            some |= Modules(within=frozenset({one}))
        elif _LITERAL.fullmatch(start):
            some |= Modules(starts=(start,))
        else:
            both = (re.compile(fnmatch.translate(pattern)) for pattern in (one, f"{one}.*"))
            some |= Modules(expressions=tuple(both))
    return some


def strings(fields: Fields, name: str) -> list[str]:
    """A list of strings; empty if there is no such field."""
    value = fields.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        fields.refuse(name, "must be a list of names")
    return value


def compile_expression(fields: Fields, name: str, expression: str) -> re.Pattern[str]:
    """The regular expression in the field `name`."""
    try:
        return re.compile(expression)
    except (re.error, OverflowError, RecursionError):
        fields.refuse(name, f"has {as_json(expression)}, which is not a regular expression")
