"""Damage of any kind of file: bytes, JSON, encodings."""

from __future__ import annotations

import json
from random import Random
from typing import Any

RAW = "@@raw@@"  # stands for what no JSON writer writes

ODD_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**31, 2**63, -(2**63), 2**64, 10**30, 10**400),
    *(0.0, -0.0, 0.5, 1.0, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf")),
    *("", "0", "8", "x", "\0", "a\nb", "\ud800", "\x1b[31m", "é", "x" * 5000, "../config.json"),
    *([], [0], [1, 2], [[]], [None], {}, {"a": 1}, {"": None}, [{}], [2] * 500),
]
RAW_VALUES = [
    "[" * 900 + "]" * 900,
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 5000 + "1" + "}" * 5000,
    "9" * 5000,
    "-" + "9" * 4000,
    "1e999",
    "1e-999",
    "-0",
    "NaN",
    "01",
    "'x'",
    "",
    '"\\ud83d"',
    '"\\u0000"',
    "1,",
]


def odd_value(random: Random) -> Any:
    """Any JSON value, none of which belongs anywhere."""
    return RAW if random.random() < 0.2 else random.choice(ODD_VALUES)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container of a JSON value with each of its keys or indices."""
    if not isinstance(tree, dict | list):
        return []
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    found = [(tree, key) for key in keys]
    return found + [place for key in keys for place in places(tree[key])]


def damage_tree(tree: Any, random: Random, likely: tuple[str, ...] = ()) -> str:
    """Change one place of a JSON value, more often one whose key is `likely`; what was done."""
    everywhere = places(tree)
    preferred = [place for place in everywhere if place[1] in likely]
    holder, key = random.choice(preferred if preferred and random.random() < 0.6 else everywhere)
    what = random.choice(
        ["remove", "replace", "replace", "replace", "wrap", "nudge", "add", "move"]
    )
    if what == "remove":
        del holder[key]
    elif what == "wrap":
        holder[key] = random.choice([[holder[key]], {"a": holder[key]}, str(holder[key])])
    elif what == "nudge" and type(holder[key]) in (int, float):
        holder[key] = random.choice(
            [holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 1000, float(holder[key])]
        )
    elif what == "add" and isinstance(holder, dict):
        holder[random.choice(["extra", "a\nb", "", "x" * 3000, "\ud800"])] = odd_value(random)
    elif what == "move":
        other, place = random.choice(everywhere)
        holder[key] = json.loads(json.dumps(other.get(place) if isinstance(other, dict) else key))
    else:
        what = "replace"
        holder[key] = odd_value(random)
    return f"{what} {str(key)[:40]!r}"


def write_tree(tree: Any, random: Random) -> bytes:
    """A JSON value as text, mostly in UTF-8."""
    text = json.dumps(tree, ensure_ascii=random.random() < 0.5)
    while f'"{RAW}"' in text:
        text = text.replace(f'"{RAW}"', random.choice(RAW_VALUES), 1)
    return text.encode("utf-8", "surrogatepass")


def recode(data: bytes, random: Random) -> tuple[bytes, str]:
    """JSON text in another encoding, or spaced otherwise."""
    text = data.decode("utf-8", "surrogatepass")
    how = random.choice(["utf-8-sig", "utf-16", "utf-32", "utf-16-le", "spaces", "NUL at the end"])
    if how == "spaces":
        return f"\r\n\t {text} \r\n".encode("utf-8", "surrogatepass"), how
    if how == "NUL at the end":
        return data + b"\0", how
    return text.encode(how, "surrogatepass"), how


def damage_bytes(data: bytes, random: Random, stop: int | None = None) -> tuple[bytes, str]:
    """Bytes before `stop` flipped, cut out, doubled or overwritten, or the end torn off."""
    spoilt, stop = bytearray(data), min(len(data), stop or len(data))
    what = random.choice(["flip", "flip", "flip", "tear", "cut", "double", "zero", "noise", "grow"])
    if not stop:
        return b"\0", "grow"
    start = random.randrange(stop)
    end = min(len(data), start + random.choice([1, 4, 16, 512]))
    if what == "flip":
        for place in random.choices(range(stop), k=random.choice([1, 1, 1, 3, 20])):
            spoilt[place] ^= 1 << random.randrange(8)
    elif what == "tear":
        del spoilt[start:]
    elif what == "cut":
        del spoilt[start:end]
    elif what == "double":
        spoilt[start:start] = spoilt[start:end]
    elif what == "grow":
        spoilt += random.randbytes(random.choice([1, 8, 4096]))
    else:
        spoilt[start:end] = bytes(end - start) if what == "zero" else random.randbytes(end - start)
    return bytes(spoilt), f"{what} at {start}"
