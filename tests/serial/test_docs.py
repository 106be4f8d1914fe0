"""README and ``docs/``: short, linked, and what they show of the source is what the source is."""

from __future__ import annotations

import re

import pytest
from pages import FENCED, PAGES, README, ROOT, anchors, commands, prose, synced

import mpishard
from mpishard.cli import RENAMED, RENAMED_VALUES, make_parser

CHANGELOG = ROOT / "CHANGELOG.md"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def test_readme_is_short():
    size = len(README.read_bytes())
    assert size <= 9_000, f"README.md has {size} bytes"


def test_readme_has_one_line_that_tests():
    """Continuous integration runs it as it stands there."""
    lines = re.findall(r"^ *python3 -m venv .* -m pytest *$", README.read_text(), re.MULTILINE)
    assert len(lines) == 1


@each_page
def test_page_shows_the_source(page):
    """Its listings and its lengths of modules."""
    assert page.read_text() == synced(page), "run `python tests/pages.py`"


@each_page
def test_links_lead_somewhere(page):
    """And pictures have words for those who do not see them."""
    for picture, words, target in LINK.findall(prose(page.read_text())):
        assert words or not picture, f"the picture {target} has no words"
        if ":" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(file), f"{target}: there is no such heading"


@each_page
def test_commands_parse(page):
    for _, words in commands(page.read_text()):
        if words:  # options only, as a script of Slurm passes them on, are not a command
            make_parser().parse_args(words)


@each_page
def test_files_and_names_exist(page):
    """Files of the repository that the page names, and what its Python code takes from mpishard."""
    text = page.read_text()
    for path in re.findall(
        r"(?:mpishard|tests|scripts|data|docs)/[\w/.-]*\w\.(?:py|sh|md)\b", text
    ):
        beside = (page.parent / path, ROOT / path)
        assert any(file.exists() for file in beside), f"{path} does not exist"
    for language, code in FENCED.findall(text):
        if language == "python":
            names = set(re.findall(r"\bmpishard\.(\w+)", code))
            assert names <= set(mpishard.__all__), names


def test_every_picture_is_on_a_page():
    shown = {
        (page.parent / target).resolve()
        for page in PAGES
        for _, _, target in LINK.findall(page.read_text())
    }
    assert set(ROOT.glob("docs/pictures/*.svg")) <= shown


def test_readme_shows_commands():
    shown = {words[0] for _, words in commands(README.read_text())}
    assert shown == {"generate", "shard", "inspect", "logits", "bench", "batch"}


def test_changelog_has_the_renamed_options():
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|$", CHANGELOG.read_text(), re.MULTILINE)
    values = {
        (f"{old} {value}", f"{new} {RENAMED_VALUES[new, value]}")
        for old, new in RENAMED.items()
        for name, value in RENAMED_VALUES
        if name == new
    }
    assert {*RENAMED.items(), *values} <= set(rows)
