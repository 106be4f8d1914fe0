"""README and ``docs/``: short, linked, and what they show of the source is what the source is.

``python tests/serial/test_docs.py`` rewrites the listings from the source.
"""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("data/*/README.md")])
LISTING = re.compile(r"<!-- source: (\S+) (\w+) -->\n```python\n(.*?)```", re.DOTALL)
MODULE_LINES = re.compile(r"\[\w+\.py\]\((\S+\.py)\) \((\d+)\)")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def listing(path: str, name: str) -> str:
    """The function or class `name` of the file `path`, without docstrings and annotations of
    parameters and result, under a comment that names the file."""
    source = (ROOT / path).read_text()
    (node,) = (n for n in ast.parse(source).body if getattr(n, "name", None) == name)
    assert isinstance(node, ast.FunctionDef), f"{name} of {path} is not a function"
    parameters = ", ".join(argument.arg for argument in node.args.args)
    body = node.body[1:] if ast.get_docstring(node) else node.body
    start = node.body[0].end_lineno if ast.get_docstring(node) else body[0].lineno - 1
    lines = source.splitlines()[start : node.end_lineno]
    return "\n".join([f"# {path}", f"def {name}({parameters}):", *lines, ""])


def synced(text: str) -> str:
    """`text` with its listings as the source is."""
    return LISTING.sub(
        lambda m: f"<!-- source: {m[1]} {m[2]} -->\n```python\n{listing(m[1], m[2])}```", text
    )


def prose(text: str) -> str:
    """`text` without its listings and code."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> list[list[str]]:
    """The words of every `mpishard` command of the indented blocks of `text`, from its name on."""
    block = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    found = []
    for line in re.sub(r"\\\n\s*", " ", block).splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # output of a command, with an apostrophe
            continue
        names = [
            place for place, word in enumerate(words) if re.fullmatch(r"([^=]*/)?mpishard", word)
        ]
        if names and re.search(r"(^|[ /])(mpishard|mpirun|srun) ", line):
            end = next((i for i, w in enumerate(words) if w in "<>|" and i > names[-1]), None)
            found.append(words[names[-1] + 1 : end])
    return found


def test_readme_is_short():
    size = len((ROOT / "README.md").read_bytes())
    assert size <= 9_000, f"README.md has {size} bytes"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page):
    """Its listings are the source's, its links lead somewhere, and its pictures are described."""
    text = page.read_text()
    assert text == synced(text), "run `python tests/serial/test_docs.py`"
    for picture, words, target in LINK.findall(prose(text)):
        assert words or not picture, f"the picture {target} has no text for those who do not see it"
        if ":" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(file), f"{target}: there is no such heading"
    for target, lines in MODULE_LINES.findall(text):
        count = len((page.parent / target).read_text().splitlines())
        assert count == int(lines), f"{target} has {count} lines, not {lines}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page):
    from mpishard.cli import make_parser

    for words in commands(page.read_text()):
        if words:  # options only, as a script of Slurm passes them on, are not a command
            make_parser().parse_args(words)


def test_readme_shows_commands():
    shown = {words[0] for words in commands((ROOT / "README.md").read_text())}
    assert shown == {"generate", "shard", "inspect", "logits", "bench", "batch"}


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(synced(page.read_text()))
