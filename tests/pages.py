"""What README and ``docs/`` show: listings of the source, lengths of modules, the families, links,
commands.

``python tests/pages.py`` rewrites the listings, the lengths and the families from the source.
"""

from __future__ import annotations

import ast
import re
import shlex
import textwrap
from pathlib import Path
from typing import NamedTuple

from family_table import names, table

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted([README, *ROOT.glob("docs/**/*.md"), *ROOT.glob("data/*/README.md")])
LISTING = re.compile(r"(<!-- source: (\S+) (\w+) -->\n```python\n).*?```", re.DOTALL)
TABLE = re.compile(r"(<!-- families -->\n).*?\n\n", re.DOTALL)
NAMES = re.compile(r"(<!-- family names -->\n).*?\n\n", re.DOTALL)
MODULE_LINES = re.compile(r"(\[\w+\.py\]\((\S+\.py)\)) \(\d+\)")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


class Command(NamedTuple):
    """An `mpishard` command of a page, as ``mpirun -n RANKS mpishard WORDS`` would run it."""

    ranks: int | None  # None without mpirun
    words: list[str]


def listing(path: str, name: str) -> str:
    """The function `name` of the file `path`, without its docstring and the annotations of its
    parameters and result, under a comment that names the file; "docstring" is the code in that of
    the module."""
    source = (ROOT / path).read_text()
    module = ast.parse(source)
    if name == "docstring":
        text = ast.get_docstring(module) or ""
        (code,) = re.findall(r"::\n\n((?: .*\n)+)", text)
        return f"# {path}, for one sequence\n{textwrap.dedent(code)}"
    (node,) = (n for n in module.body if getattr(n, "name", None) == name)
    assert isinstance(node, ast.FunctionDef), f"{name} of {path} is not a function"
    parameters = ", ".join(argument.arg for argument in node.args.args)
    body = node.body[1:] if ast.get_docstring(node) else node.body
    start = node.body[0].end_lineno if ast.get_docstring(node) else body[0].lineno - 1
    lines = source.splitlines()[start : node.end_lineno]
    return "\n".join([f"# {path}", f"def {name}({parameters}):", *lines, ""])


def synced(page: Path) -> str:
    """The text of `page` with its listings and lengths of modules as the source is."""
    text = LISTING.sub(lambda m: f"{m[1]}{listing(m[2], m[3])}```", page.read_text())
    text = TABLE.sub(lambda m: f"{m[1]}{table()}\n\n", text)
    text = NAMES.sub(lambda m: f"{m[1]}{names()}\n\n", text)

    def with_length(match: re.Match[str]) -> str:
        return f"{match[1]} ({len((page.parent / match[2]).read_text().splitlines())})"

    return MODULE_LINES.sub(with_length, text)


def prose(text: str) -> str:
    """`text` without its listings and code."""
    return re.sub(r"^    .*$", "", FENCED.sub("", text), flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> list[Command]:
    """Every `mpishard` command of the indented and fenced blocks of `text`."""
    blocks = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    blocks += [code for language, code in FENCED.findall(text) if language != "python"]
    found = []
    for line in re.sub(r"\\\n\s*", " ", "\n".join(blocks)).splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # output of a command, with an apostrophe
            continue
        names = [
            place for place, word in enumerate(words) if re.fullmatch(r"([^=]*/)?mpishard", word)
        ]
        if names and re.search(r"(^|[ /])(mpishard|mpirun|srun) ", line):
            end = next((i for i, w in enumerate(words) if w in "<>|" and i > names[-1]), None)
            ranks = re.search(r"mpirun -n (\d+) \S*mpishard ", line)
            found.append(Command(int(ranks[1]) if ranks else None, words[names[-1] + 1 : end]))
    return found


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(synced(page))
