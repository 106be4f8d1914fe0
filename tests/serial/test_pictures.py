"""``docs/pictures``: every picture is what the package's functions say today."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from xml.etree import ElementTree

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "pictures"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def pictures():
    """The content of every picture, drawn anew, by the name of its file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield import_module("draw").pictures()


def test_pictures_are_up_to_date(pictures):
    """Byte for byte."""
    outdated = [
        name
        for name, content in pictures.items()
        if not (FOLDER / name).exists() or (FOLDER / name).read_bytes() != content.encode()
    ]
    assert outdated == [], f"run `python docs/pictures/draw.py`: {outdated} are out of date"


def test_nothing_else_is_drawn(pictures):
    assert {file.name for file in FOLDER.glob("*.svg")} == set(pictures)


def test_pictures_can_be_read_by_everyone(pictures):
    """Well-formed, with a title and a description, and colours for light and dark."""
    for name, content in pictures.items():
        root = ElementTree.fromstring(content)
        assert root.findtext(f"{SVG}title") and root.findtext(f"{SVG}desc"), name
        style = root.findtext(f"{SVG}style") or ""
        light, dark = style.split("@media (prefers-color-scheme: dark)")
        assert "--ink:" in light and "--ink:" in dark, name


def test_text_stays_within_the_pictures(pictures):
    """As far as that can be said without a font: of letters half as wide as they are high."""
    outside = []
    for name, content in pictures.items():
        root = ElementTree.fromstring(content)
        for text in root.iter(f"{SVG}text"):
            if "x" in text.attrib:
                width = 0.5 * 12 * len(text.text or "")
                shift = {"start": 0, "middle": width / 2, "end": width}[text.attrib["text-anchor"]]
                left = float(text.attrib["x"]) - shift
                if left < 0 or left + width > float(root.attrib["width"]):
                    outside.append(f"{name}: {text.text}")
    assert outside == []
