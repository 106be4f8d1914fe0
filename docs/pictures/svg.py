"""Drawing primitives. Styles are the classes of ``frame.svg.in``, which follows the reader's light
or dark colour scheme: r0 to r3 are the colours of ranks, p0 to p3 the same hatched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

import numpy as np

FRAME = Template((Path(__file__).parent / "frame.svg.in").read_text(encoding="utf-8"))
Point = tuple[float, float]


class Picture:
    """A drawing of `width` x `height` pixels. `title` and `description` say it in words."""

    def __init__(self, width: int, height: int, title: str, description: str):
        self.values = dict(width=width, height=height, title=title, description=description)
        self.parts: list[str] = []

    def __str__(self) -> str:
        texts = {name: escape(str(value)) for name, value in self.values.items()}
        return FRAME.substitute(texts, content="\n".join(self.parts))

    def box(
        self, x: float, y: float, width: float, height: float, style: str = "", text: str = ""
    ) -> None:
        """A rectangle, `text` in its middle."""
        x, y, width, height = (round(value, 1) for value in (x, y, width, height))
        place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2"'
        self.parts.append(f'<rect class="{style}" {place}/>')
        self.text(x + width / 2, y + height / 2 + 5, text, "", "middle")

    def text(
        self,
        x: float,
        y: float,
        text: object,
        style: str = "",
        anchor: str = "start",
        turn: int = 0,
    ) -> None:
        """Text on the baseline `y` whose start, end or middle is at `x`, turned by degrees."""
        if text == "":
            return
        x, y = round(x, 1), round(y, 1)
        turned = f' transform="rotate({turn} {x:g} {y:g})"' if turn else ""
        place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"{turned}'
        self.parts.append(f'<text class="{style}" {place}>{escape(str(text))}</text>')

    def dot(self, x: float, y: float) -> None:
        """A dot around a point."""
        self.parts.append(f'<circle class="dot" cx="{x:g}" cy="{y:g}" r="6"/>')

    def path(self, points: Sequence[Point], style: str = "sent") -> None:
        """Straight lines from point to point; "sent" ends in the head of an arrow."""
        line = " L".join(f"{round(x, 1):g} {round(y, 1):g}" for x, y in points)
        self.parts.append(f'<path class="{style}" d="M{line}"/>')

    def band(self, start: Point, stop: Point, height: float, style: str) -> None:
        """A curved band from left to right, by the upper corners of its ends."""
        (x, y), (u, v), c = start, stop, (start[0] + stop[0]) / 2
        low, end = y + height, v + height
        way = f"M{x} {y} C{c} {y}, {c} {v}, {u} {v} L{u} {end} C{c} {end}, {c} {low}, {x} {low} Z"
        self.parts.append(f'<path class="band {style}" d="{way}"/>')

    def strip(
        self, x: float, y: float, width: float, height: float, owners: Sequence[int | None]
    ) -> None:
        """Cells side by side in the colours of their owners, those without one left empty."""
        self.box(x, y, width, height, "absent")
        cell = width / len(owners)
        for place, owner in enumerate(owners):
            if owner is not None:
                self.box(x + place * cell, y, cell, height, f"r{owner}")

    def each_to_each(self, starts: Sequence[Point], stops: Sequence[Point]) -> None:
        """Arrows of a collective."""
        for start in starts:
            for stop in stops:
                self.path([start, stop])


def ranges(numbers: Iterable[int] | slice) -> str:
    """Ascending numbers in words.

    >>> ranges([0, 1, 2, 7, 9])
    '0–2, 7, 9'
    """
    values = np.r_[numbers] if isinstance(numbers, slice) else np.array(list(numbers))
    runs = np.split(values, np.flatnonzero(np.diff(values) != 1) + 1)
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
