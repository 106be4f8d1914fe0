"""Covering designs: few combinations of many choices in which every two choices still meet.

Most faults need one choice or two that meet (D. R. Kuhn, D. R. Wallace, A. M. Gallo, "Software
fault interactions and implications for software testing", IEEE Transactions on Software Engineering
30, 2004). A product of ten choices has thousands of combinations; some dozens have all pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Row = dict[str, Any]

# Whether sweeps run whole, which is the option --exhaustive of the tests.
exhaustive = False


def covering(
    axes: Mapping[str, Sequence[Any]],
    together: Collection[tuple[str, ...]] = (),
    allowed: Callable[[Row], bool] = lambda row: True,
) -> list[Row]:
    """Rows, with a value of each axis, in which every pair of values of two axes occurs, and every
    combination of values of the axes that are named `together`: those at least that occur in an
    `allowed` row. Always the same rows, each the one that has most of what is missing."""
    names = list(axes)
    sets = [[names.index(name) for name in some] for some in (*combinations(names, 2), *together)]
    rows, masks = [], []
    bits: dict[
        tuple, int
    ] = {}  # the place in a mask of each combination of values, by their places
    for places in product(*(range(len(values)) for values in axes.values())):
        row = {name: axes[name][place] for name, place in zip(names, places, strict=True)}
        if allowed(row):
            mask = 0
            for some in sets:
                combination = tuple(some), tuple(places[axis] for axis in some)
                mask |= 1 << bits.setdefault(combination, len(bits))
            rows.append(row)
            masks.append(mask)
    missing, chosen = (1 << len(bits)) - 1, []
    while missing:
        best = max(range(len(rows)), key=lambda place: (masks[place] & missing).bit_count())
        chosen.append(rows[best])
        missing &= ~masks[best]
    return chosen
