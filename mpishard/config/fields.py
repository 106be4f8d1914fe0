"""Typed access to the fields of a JSON object, with one error sentence for each kind of defect.

`Fields` keeps the names that its readers asked for. `Fields.reject_unknown` then refuses every
other field that could change the logits, unless the user answers for it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from mpishard.config.known_fields import COMMON_FIELDS, KNOWN_FIELDS
from mpishard.config.unsupported import IGNORED_FIELDS, UNSUPPORTED_FIELDS
from mpishard.errors import UserError, brief

# No model counts or measures anything beyond this number.
MOST = 2**31 - 1


class Answered:
    """The fields that the user answers for (``--ignore-config``), and those of them that were in
    the way. A nested field has the name of its object before it: ``rope_scaling.some_field``."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names = tuple(dict.fromkeys(names))
        self.needed: set[str] = set()

    def refuse_needless(self, raw: dict[str, Any], source: str) -> None:
        """Raise UserError for a field that is not in `raw` or that nothing would have refused."""
        for name in self.names:
            if name not in self.needed:
                there = _has(raw, name.split("."))
                problem = (
                    "is implemented, or changes nothing" if there else "is not a field of the file"
                )
                raise UserError(
                    f"{source}: --ignore-config {brief(name)} has no effect, because it {problem}: "
                    "leave it out"
                )


def _has(values: Any, path: list[str]) -> bool:
    for name in path:
        if not isinstance(values, dict) or name not in values:
            return False
        values = values[name]
    return True


class Fields:
    """The fields of one JSON object. Each method reads a field by name and checks its type; a null
    counts as no value. A defect raises UserError with `source`, the field and its value.

    `within` is the prefix of field names in errors: the name of the object if it is nested. The
    user answers for the fields in `answered`."""

    def __init__(
        self,
        values: dict[str, Any],
        source: str,
        within: str = "",
        answered: Answered | None = None,
    ) -> None:
        self.values = values
        self.source = source
        self.within = within
        self.answered = answered or Answered()
        self.asked: set[str] = set()
        self.written: dict[str, str] = {}  # names in the file that differ from those in `values`

    def respelled(self, spellings: Mapping[str, tuple[str, ...]], reader: str) -> Fields:
        """These fields by their usual names, where `spellings` has the names that the family
        `reader` gives them. Raises UserError for several that contradict each other, and for a
        usual name that the family does not have."""
        values = dict(self.values)
        fields = Fields(values, self.source, self.within, self.answered)
        fields.asked = self.asked
        for usual, names in spellings.items():
            given = [name for name in names if self.values.get(name) is not None]
            if usual not in names and values.pop(usual, None) is not None:
                known = f", which spells it {names[0]}" if names else ""
                self.refuse(usual, f"is not a field that is known for {reader}{known}")
            for name in given[1:]:
                if self.values[name] != self.values[given[0]]:
                    self.refuse(name, f"contradicts {given[0]} = {as_json(self.values[given[0]])}")
            there = [name for name in names if name in values]
            for name in there:
                value = values.pop(name)
            if there:
                values[usual] = self.values[given[0]] if given else value
            if names:
                fields.written[usual] = (given or there or [names[0]])[0]
        return fields

    def get(self, name: str, absent: Any = None) -> Any:
        """The value in the file, unchecked; `absent` if there is no such field."""
        self.asked.add(name)
        return self.values.get(name, absent)

    def refuse(self, name: str, problem: str) -> NoReturn:
        """Raise UserError: the field `name` has the `problem`."""
        value = f" = {as_json(self.values[name])}" if name in self.values else ""
        written = self.written.get(name, name)
        raise UserError(f"{self.source}: {self.within}{brief(written)}{value} {problem}")

    def optional_integer(self, name: str, absent: int | None = None) -> int | None:
        """A positive whole number, None for null, `absent` if there is no such field."""
        value = self.get(name, absent)
        if value is not None and (type(value) is not int or value < 1):
            self.refuse(name, "must be a positive whole number")
        if value is not None and value > MOST:
            self.refuse(name, f"must be at most {MOST}")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive whole number; without a `default` the field is required."""
        value = self.optional_integer(name)
        if value is None:
            value = default
        if value is None:
            self.refuse(name, "is missing: it must be a positive whole number")
        return value

    def non_negative_integer(self, name: str, default: int) -> int:
        """A whole number that is not negative."""
        value = self.get(name)
        if value is None:
            value = default
        if type(value) is not int or not 0 <= value <= MOST:
            self.refuse(name, "must be a whole number that is not negative")
        return value

    def same_integer(self, *names: str) -> int:
        """A positive whole number with several spellings: at least one of the `names` is required,
        and those that are there must agree."""
        values = {name: self.optional_integer(name) for name in names}
        given = [name for name in names if values[name] is not None]
        if not given:
            self.refuse(names[0], "is missing: it must be a positive whole number")
        for name in given[1:]:
            if values[name] != values[given[0]]:
                self.refuse(name, f"contradicts {given[0]} = {values[given[0]]}")
        return self.integer(given[0])

    def only(self, name: str, *allowed: Any) -> None:
        """Raise UserError unless the field has one of the `allowed` values, or no value."""
        verb = "is" if len(allowed) == 1 else "are"
        if self.get(name) not in (None, *allowed):
            self.refuse(name, f"is not implemented: {' and '.join(map(as_json, allowed))} {verb}")

    def unlist(self, name: str) -> None:
        """Take the entry of a list, whose entries must all be the same, for the field's value."""
        value = self.values.get(name)
        if isinstance(value, list) and value:
            if any(one != value[0] for one in value):
                self.refuse(name, "is not implemented: all entries must be the same")
            self.values = self.values | {name: value[0]}

    def fixed(self, name: str, value: Any, reader: str) -> None:
        """Raise UserError if the field is there and says something else than `value`, or a list of
        it. `reader` names the family for which nothing else is implemented."""
        found = self.get(name)
        entries = found if isinstance(found, list) else [found]
        if not all(one is None or one == value for one in entries):
            self.refuse(name, f"is not implemented for {reader}: {as_json(value)} is")

    def optional_number(self, name: str) -> float | None:
        """A finite number that is not negative, or None."""
        value = self.get(name)
        if value is None:
            return None
        if type(value) not in (int, float) or not 0 <= value <= sys.float_info.max:
            self.refuse(name, "must be a number that is not negative")
        return float(value)

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number; without a `default` the field is required."""
        value = self.optional_number(name)
        if value is None:
            value = default
        if value is None:
            self.refuse(name, "is missing: it must be a positive number")
        if value == 0:
            self.refuse(name, "must be a positive number")
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of positive numbers."""
        value = self.get(name)
        if not isinstance(value, list) or not all(
            type(one) in (int, float) and 0 < one <= sys.float_info.max for one in value
        ):
            self.refuse(name, "must be a list of positive numbers")
        return tuple(float(one) for one in value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name)
        if value is not None and type(value) is not bool:
            self.refuse(name, "must be true or false")
        return default if value is None else value

    def text(self, name: str, default: str) -> str:
        """A string."""
        value = self.get(name)
        if value is not None and type(value) is not str:
            self.refuse(name, "must be a string")
        return default if value is None else value

    def section(self, name: str) -> Fields | None:
        """The fields of the nested object `name`, or None if it is empty or absent."""
        value = self.get(name)
        if value is not None and type(value) is not dict:
            self.refuse(name, "must be an object")
        within = f"{self.within}{name}."
        return Fields(value, self.source, within, self.answered) if value else None

    def reject_unknown(self, reader: str, ignored: frozenset[str] = frozenset()) -> None:
        """Raise UserError for a field that was not read, is not `ignored` and may change the
        logits. `reader` names the reader in the error: a family or a kind of rope.

        A field that is null, false, 0 or empty changes nothing, unless transformers knows it for
        this family, or `UNSUPPORTED_FIELDS` do.
        """
        known = COMMON_FIELDS | KNOWN_FIELDS.get(reader, frozenset())
        for name, value in self.values.items():
            if name in self.asked | ignored | IGNORED_FIELDS or name.endswith("_token_id"):
                continue
            if name in UNSUPPORTED_FIELDS:
                needs, harmless = UNSUPPORTED_FIELDS[name]
                if value is None or value == harmless:
                    continue
                problem = f"asks for {needs}, not implemented"
            elif not value and name not in known:
                continue
            else:
                problem = f"is not a field that is known for {reader}"
            self._refuse_unanswered(name, problem)

    def _refuse_unanswered(self, name: str, problem: str) -> None:
        whole = f"{self.within}{self.written.get(name, name)}"
        if whole not in self.answered.names:
            remedy = (
                f"if it does not change the mathematics, give --ignore-config {brief(whole, 60)}"
            )
            self.refuse(name, f"{problem}: {remedy}")
        self.answered.needed.add(whole)


def as_json(value: object) -> str:
    """`value` as JSON, shortened to fit into a sentence."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return brief(text, 60)
