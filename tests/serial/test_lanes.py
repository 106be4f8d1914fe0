"""What runs beside what: lanes of tests, and how many of them the machine carries."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mpi_runner import launch
from mpi_runner.lane import WAITING, Lane, divide, fits


def item(path: str, ranks: int | None = None, waits: int | None = None) -> Any:
    """As much of a test as lanes look at."""
    marks = {
        "ranks": ranks and SimpleNamespace(),
        "waits": waits and SimpleNamespace(args=(waits,)),
    }
    return SimpleNamespace(
        path=Path("tests") / path,
        get_closest_marker=marks.get,
        callspec=SimpleNamespace(params={"ranks": ranks}),
    )


SERIAL, COMMAND, HOST = (
    item(f"{folder}/test_a.py") for folder in ("serial", "commands", "cluster")
)
SHORT, LONG = item("serial/test_short.py", waits=5), item("commands/test_long.py", waits=50)
ONE, EIGHT = item("parallel/test_c.py", ranks=1), item("parallel/test_c.py", ranks=8)
ALL = [EIGHT, SHORT, HOST, COMMAND, ONE, LONG, SERIAL]


def test_each_kind_of_test_has_a_lane_and_the_longest_waits_start_first():
    own, lanes = divide(ALL, is_watched=False)
    assert own == [SERIAL]
    assert [(lane.name, lane.size, lane.waits, lane.items) for lane in lanes] == [
        ("commands", None, False, [COMMAND]),
        ("cluster", None, False, [HOST]),
        ("waiting: test_long", None, True, [LONG]),
        ("waiting: test_short", None, True, [SHORT]),
        ("np1", 1, False, [ONE]),
        ("np8", 8, False, [EIGHT]),
    ]


def test_serial_tests_of_one_kind_stay_in_the_process():
    assert divide([COMMAND, COMMAND], is_watched=False) == ([COMMAND, COMMAND], [])
    own, lanes = divide([ONE], is_watched=False)
    assert own == [] and [lane.name for lane in lanes] == ["np1"]


def test_somebody_who_looks_on_sees_all_serial_tests_in_the_process():
    own, lanes = divide(ALL, is_watched=True)
    assert own == [SHORT, HOST, COMMAND, LONG, SERIAL]
    assert [lane.name for lane in lanes] == ["np1", "np8"]


WAITS, COMMANDS, NP1 = Lane("w", waits=True), Lane("commands"), Lane("np1", 1)
NP2, NP8 = Lane("np2", 2), Lane("np8", 8)


@pytest.mark.parametrize(
    "lane, beside, busy, cores, right",
    [
        (COMMANDS, [], 1, 2, True),  # beside the tests of the controller
        (NP1, [COMMANDS], 1, 2, False),
        (NP1, [COMMANDS], 0, 2, True),
        (COMMANDS, [], 1, 1, False),
        (WAITS, [COMMANDS], 1, 2, True),  # though no core is idle
        (WAITS, [WAITS] * (WAITING - 1), 1, 1, True),
        (WAITS, [WAITS] * WAITING, 0, 2, False),
        (NP1, [WAITS, COMMANDS], 0, 2, True),
        (NP2, [], 0, 2, True),
        (NP8, [], 0, 2, True),
        (NP2, [], 1, 2, False),
        (NP2, [NP1], 0, 2, False),  # ranks that wait for each other do so best alone
        (NP2, [WAITS], 0, 2, False),
        (WAITS, [NP2], 0, 2, False),
        (NP8, [NP2], 0, 2, False),
        (NP2, [NP8, WAITS], 0, 16, True),  # where all have cores
        (NP8, [NP8], 1, 16, False),
        (NP2, [], 0, 1, True),
    ],
)
def test_what_the_machine_carries(lane, beside, busy, cores, right):
    assert fits(lane, beside, busy, cores) == right


@pytest.mark.parametrize("is_busy", [True, False])
def test_the_ranks_of_tests_wait_as_those_of_the_product_do(monkeypatch, is_busy):
    """By what is idle at their start, and as the user wishes."""
    name = "MPIR_CVAR_ENABLE_HEAVY_YIELD"
    monkeypatch.delenv(name, raising=False)
    asked = []

    def waiting_should_sleep(*about: object) -> bool:
        asked.append(about)
        return is_busy

    monkeypatch.setattr(launch, "waiting_should_sleep", waiting_should_sleep)
    monkeypatch.setattr(launch, "allowed_cores", lambda: 4)
    assert launch.environment(5, {}).get(name) == ("1" if is_busy else None)
    assert asked == [(5, 4, [os.getpid()])]
    assert launch.environment(4, {}).get(name) is None, "a core for each"
    monkeypatch.setenv(name, "0")
    assert launch.environment(5, {})[name] == "0"
