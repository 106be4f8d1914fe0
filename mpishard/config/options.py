"""Options of a layout, each defined once: in the metadata of its field in `Layout`.

The definition of an option gives the flag of the command line and its help, the argument of
`mpishard.load` and its type, the checks of its value, and the flag in ``str(layout)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class LayoutOption:
    """One option: field `name` of the layout, with its `default` and the `flags` that set it."""

    name: str
    default: Any  # bool, int, float or str
    flags: tuple[str, ...]
    help: str
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    unset: int | None = None  # the value of the argument if the flag is not given
    moe: bool = False  # has no effect on a model without experts
    needs: str = ""  # the property of a layout without which it has no effect: a key of NEEDS

    @property
    def flag(self) -> str:
        """The flag in messages and in ``str(layout)``."""
        return self.flags[0]

    @property
    def kind(self) -> type:
        """The type of its values: bool, int, float or str."""
        return type(self.default)

    def as_typed(self, value: bool | float | str) -> str:
        """This option with `value`, as it is typed."""
        return self.flag if value is True else f"{self.flag} {value}"

    def argument(self, parsers: Mapping[type, Callable[[str], object]]) -> dict[str, Any]:
        """The keyword arguments with which argparse's ``add_argument`` adds the flags. `parsers`
        convert a string to an int and to a float, and check its range."""
        if self.kind is bool:
            return {"action": "store_true", "help": self.help}
        common = {"default": self.unset, "help": self.help}
        if self.choices:
            return {"choices": self.choices, **common}
        return {"type": parsers.get(self.kind, str), "metavar": self.metavar, **common}


def option_field(default: bool | int | float | str, *flags: str, **definition: Any) -> Any:
    """A dataclass field that is an option; `definition` are other fields of `LayoutOption`."""
    return field(default=default, metadata={"flags": flags, **definition})


def options_of(layout: Any) -> dict[str, LayoutOption]:
    """The options that a dataclass defines, by name, in the order of its fields."""
    return {
        one.name: LayoutOption(name=one.name, default=one.default, **one.metadata)
        for one in fields(layout)
    }
