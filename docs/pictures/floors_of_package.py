"""Picture of the floors of the package, and which part imports which, read from its source."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Sequence
from pathlib import Path

from svg import Picture

PACKAGE = Path(__file__).parents[2] / "mpishard"
TEST = PACKAGE.parent / "tests" / "serial" / "test_layering.py"
SURFACE = "CLI and API"  # all that is on no floor
LEFT, NAME, MATRIX, TOP, WIDE, HIGH = 20, 34, 508, 150, 26, 30


def floors() -> Picture:
    """A table of the package's parts, the highest floor first."""
    listed = next(line for line in _read(TEST).body if ast.unparse(line).startswith("FLOORS ="))
    assert isinstance(listed, ast.Assign)
    stack = (*ast.literal_eval(listed.value), (SURFACE,))[::-1]
    parts = [part for floor in stack for part in floor]
    # A folder without sources is what an older checkout left.
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.stem for path in PACKAGE.glob("*.py")} | packages
    surface = sorted(name for name in modules - set(parts) if not name.startswith("_"))
    bottom = TOP + HIGH * len(parts)
    picture = Picture(
        *(MATRIX + WIDE * len(parts) + 60, bottom + 44, "The floors of the package"),
        "A table of the package's parts, the highest floor first: a dot says that the part of the "
        "row imports the part of the column. All dots lie on the side of lower floors.",
    )
    picture.text(LEFT, 26, "The floors of the package: imports only go down", "heading")
    meaning = "A dot: the part of the row imports the part of the column."
    picture.text(LEFT, 49, meaning, "small soft")
    for floor in stack:
        first, y = parts.index(floor[0]), TOP + parts.index(floor[0]) * HIGH
        wide, high = WIDE * len(floor), HIGH * len(floor)
        picture.box(LEFT, y, MATRIX - LEFT + WIDE * len(parts), high)
        picture.box(MATRIX + first * WIDE, y, wide, high, "whole")
    for row, part in enumerate(parts):
        y = TOP + row * HIGH
        about = ", ".join(surface) if part == SURFACE else _about(part)
        lines = textwrap.wrap(about, 54)[:2]
        for line, words in enumerate(lines):
            picture.text(NAME + 128, y + 27 - 8 * len(lines) + 15 * line, words, "tiny soft")
        picture.text(NAME, y + 20, part, "strong")
        picture.text(MATRIX + (row + 0.5) * WIDE + 4, TOP - 8, part, "small", turn=-45)
        imported = _imports(surface if part == SURFACE else [part]) - {part}
        for column in (column for column, other in enumerate(parts) if other in imported):
            picture.dot(MATRIX + (column + 0.5) * WIDE, y + HIGH / 2)
    meaning = "Grey: parts of one floor. They do not import each other."
    picture.text(LEFT, bottom + 26, meaning, "small soft")
    return picture


def _read(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _about(part: str) -> str:
    """The first sentence of its docstring, without "Floor of"."""
    package = PACKAGE / part / "__init__.py"
    tree = _read(package if package.exists() else PACKAGE / f"{part}.py")
    sentence = " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split()).split(". ")[0]
    return sentence.split(": ", 1)[-1].rstrip(".").replace("`", "")


def _imports(names: Sequence[str]) -> set[str]:
    """The parts of the package that some of its modules and folders import."""
    files = [file for name in names for file in (PACKAGE / name).rglob("*.py")]
    files += [PACKAGE / f"{name}.py" for name in names if (PACKAGE / f"{name}.py").exists()]
    found = set()
    for node in (node for file in files for node in ast.walk(_read(file))):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        modules = [prefix + alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in modules if name.startswith("mpishard.")}
    return found
