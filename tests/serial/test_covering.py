"""Covering designs have every pair, and what is to meet, in few rows."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from covering import Row, covering

AXES = {"a": range(4), "b": "xyz", "c": (False, True), "d": (False, True), "e": (1, 2, 3)}
TRIPLE = ("a", "b", "c")


def allowed(row: Row) -> bool:
    """Of two switches one at most, and none with the first of `a`."""
    return not (row["c"] and row["d"]) and not (row["a"] == 0 and (row["c"] or row["d"]))


def met(rows: list[Row], names: tuple[str, ...]) -> set[tuple]:
    return {tuple(row[name] for name in names) for row in rows}


@pytest.mark.parametrize("rule", [lambda row: True, allowed], ids=["all", "some"])
def test_every_pair_and_the_triples_that_are_asked_for_occur(rule):
    product_ = [dict(zip(AXES, values, strict=True)) for values in product(*AXES.values())]
    possible = [row for row in product_ if rule(row)]
    rows = covering(AXES, [TRIPLE], rule)
    for names in [*combinations(AXES, 2), TRIPLE]:
        assert met(rows, names) == met(possible, names)
    assert all(row in possible for row in rows)
    assert len(rows) <= len(met(possible, TRIPLE)) + 3 < len(possible) / 3


def test_pairs_alone_need_hardly_more_rows_than_the_two_longest_axes():
    assert len(covering(AXES)) <= 4 * 3 + 2


def test_the_rows_are_always_the_same():
    assert covering(AXES, [TRIPLE], allowed) == covering(AXES, [TRIPLE], allowed)


def test_what_is_not_possible_is_not_asked_for():
    assert covering(AXES, allowed=lambda row: False) == []
    (row,) = covering({"a": [1], "b": [2]})
    assert row == {"a": 1, "b": 2}
