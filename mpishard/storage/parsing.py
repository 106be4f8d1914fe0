"""JSON from outside: every defect is a ValueError."""

from __future__ import annotations

import json
from typing import Any

# Levels of nested lists and objects. Python reads nearly a thousand, but then fails to compare,
# write or print such a value. No file that is read here needs a tenth of that.
DEEPEST = 64


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text. Raises ValueError (also UnicodeDecodeError or json.JSONDecodeError)
    if it is not JSON, nested more than `DEEPEST` levels deep, or has a whole number of more digits
    than Python reads."""
    try:
        value = json.loads(content)
        too_deep = _is_deeper(value, DEEPEST)
    except RecursionError:
        too_deep = True
    except ValueError as error:
        if type(error) is ValueError:  # of int(), whose words differ from one Python to the next
            raise ValueError("it has a whole number of too many digits") from None
        raise
    if too_deep:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    parts = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(part, levels - 1) for part in parts)
