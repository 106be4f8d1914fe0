"""The check of collectives: ranks that are about to do different things are told so, all of them,
in one sentence that names two of them and where each calls; ranks that agree are left alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sweep import accepted, layouts
from tiny_models import tiny_config
from tiny_text import write_speaker

import mpishard
from mpishard.communication import check
from mpishard.communication.check import check_collective
from mpishard.communication.collectives import (
    MAX,
    SUM,
    all_gather,
    all_reduce,
    all_to_all,
    barrier,
    broadcast,
    gather,
    isendrecv,
    reduce_scatter,
)
from mpishard.communication.group import CallTracker, CollectiveCall, Group
from mpishard.communication.ledger import Ledger
from mpishard.config.layout import LAYOUT_OPTIONS
from mpishard.engine.sampling_params import SamplingParams
from mpishard.errors import CollectiveMismatch

pytestmark = pytest.mark.ranks(2, 3, timeout=30)

MIXTURE = "mixtral-full"

X = np.arange(12, dtype=np.float32).reshape(6, 2)


@pytest.fixture
def group(comm) -> Group:
    members = tuple(10 + rank for rank in range(comm.size))
    return Group(comm, "tp", Ledger(), CallTracker(check_collective), members)


@pytest.fixture
def odd(group) -> bool:
    """Whether this rank, the last, is the one that does something else."""
    return group.rank == group.size - 1


def mismatch(act: Callable[[], object]) -> str:
    with pytest.raises(CollectiveMismatch) as raised:
        act()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def sides(message: str, group: Group) -> list[tuple[str, int]]:
    """What the two ranks make that the message names, and their lines in this file."""
    other = 10 + group.size - 1
    call = r"rank %d makes (.*) \(number (\d+) of the group, at \S*test_check\.py:(\d+)\)"
    pattern = f"the ranks of tp do not make the same collective: {call}, but {call}" % (10, other)
    found = re.fullmatch(pattern, message)
    assert found, message
    assert found[2] == found[5], "none was left out"
    return [(found[1], int(found[3])), (found[4], int(found[6]))]


def exercise(group: Group) -> list[np.ndarray | None]:
    """Every collective, in which all ranks agree, with blocks that are uneven or empty."""
    p, rank = group.size, group.rank
    sizes = list(range(p))
    near = (rank + 1) % p, (rank - 1) % p
    barrier(group)
    pending = isendrecv(X[:rank], group, near[0], X[: near[1]].shape, near[1])
    empty = isendrecv(X[:0], group, near[0], None, near[1])
    return [
        all_reduce(X, group),
        all_reduce(X[:, ::-1], group, MAX),
        all_reduce(np.array(float(rank)), group),
        all_gather(X[:rank], group, sizes=sizes),
        all_gather(X, group, axis=1),
        reduce_scatter(X, group),
        reduce_scatter(X, group, axis=1),
        gather(X, group),
        broadcast(X * rank, group),
        all_to_all(X[: sum(sizes)], group, sizes, [rank] * p),
        pending.wait(),
        empty.wait(),
    ]


def test_what_agrees_passes_and_the_ledger_does_not_see_the_check(group):
    plain = Group(group.comm, "tp", Ledger())
    for checked, unchecked in zip(exercise(group), exercise(plain), strict=True):
        np.testing.assert_array_equal(checked, unchecked)
    counts = [
        [
            (operation, entry.calls, entry.payload_bytes, entry.wire_bytes)
            for operation, _, entry in of
        ]
        for of in (group.ledger, plain.ledger)
    ]
    assert counts[0] == counts[1]
    assert group.calls.done == group.calls.begun == plain.calls.done == {"tp": 13}


def test_another_collective(group, odd):
    message = mismatch(lambda: (all_gather if odd else all_reduce)(X, group))
    blocks = "+".join(["6"] * group.size)
    (one, line), (other, same_line) = sides(message, group)
    assert one == "all_reduce of 12 float32 (sum)"
    assert other == f"all_gather of {blocks} rows of 2 float32"
    assert line == same_line
    all_reduce(X, group)  # where the check has spoken nothing is left over


@pytest.mark.parametrize(
    "x, op, different",
    [
        (X[1:], SUM, "10 float32 (sum)"),
        (X.astype(float), SUM, "12 float64 (sum)"),
        (X, MAX, "12 float32 (maximum)"),
    ],
)
def test_another_argument_of_an_all_reduce(group, odd, x, op, different):
    message = mismatch(lambda: all_reduce(x, group, op) if odd else all_reduce(X, group))
    assert [what for what, _ in sides(message, group)] == [
        "all_reduce of 12 float32 (sum)",
        f"all_reduce of {different}",
    ]


@pytest.mark.parametrize("collective", [all_gather, gather, reduce_scatter])
def test_other_lengths_of_blocks(group, odd, collective):
    p = group.size
    first, last = [1] * p, [2] + [1] * (p - 1)
    if collective is reduce_scatter:
        first[0], last[1] = 2, 2  # as many rows for other ranks
        last[0] = 1
        x = X[: sum(first)]
    else:
        x = X[:1]
    message = mismatch(lambda: collective(x, group, sizes=last if odd else first))
    (one, _), (other, _) = sides(message, group)
    assert one == f"{collective.__name__} of {'+'.join(map(str, first))} rows of 2 float32"
    assert other == f"{collective.__name__} of {'+'.join(map(str, last))} rows of 2 float32"


def test_blocks_of_another_length_where_all_should_be_alike(group, odd):
    sides(mismatch(lambda: all_gather(X[:5] if odd else X, group)), group)


def test_rows_of_another_width(group, odd):
    sides(mismatch(lambda: gather(X[:, :1] if odd else X, group)), group)


def test_another_shape_of_a_broadcast(group, odd):
    sides(mismatch(lambda: broadcast(X[0] if odd else X, group)), group)


def test_a_collective_left_out_before_another_of_the_same_kind_and_size(group, odd):
    def act() -> None:
        if not odd:
            all_reduce(X, group)
        all_reduce(X, group)

    (one, line), (other, next_line) = sides(mismatch(act), group)
    assert one == other == "all_reduce of 12 float32 (sum)"
    assert next_line == line + 1


def test_another_number_of_collectives_before(group, odd):
    if odd:
        next(group.checked)
    message = mismatch(lambda: barrier(group))
    assert "rank 10 makes barrier (number 1 of the group" in message
    assert f"rank {9 + group.size} makes barrier (number 2 of the group" in message


def test_the_rank_that_differs_from_most_is_named(group):
    if group.size == 3:
        message = mismatch(lambda: barrier(group) if group.rank == 0 else all_reduce(X, group))
        assert "rank 11 makes all_reduce" in message and "but rank 10 makes barrier" in message


def test_rows_that_another_rank_does_not_expect(group, odd):
    p = group.size
    sizes = [1] * p
    expected = [2, *sizes[1:]] if odd else sizes
    message = mismatch(lambda: all_to_all(X[:p], group, sizes, expected))
    assert re.fullmatch(
        r"all_to_all, on all ranks at \S*test_check.py:\d+: rank 10 sends 2 float32 to "
        f"rank {9 + p}, which expects 4 float32",
        message,
    )


def test_rows_of_another_type(group, odd):
    p = group.size
    x = X[:p].astype(np.float64 if odd else np.float32)
    message = mismatch(lambda: all_to_all(x, group, [1] * p, [1] * p))
    (one, _), (other, _) = sides(message, group)
    assert (one, other) == ("all_to_all of rows of 2 float32", "all_to_all of rows of 2 float64")


@pytest.mark.parametrize(
    "x, shape, sent, expected",
    [
        (X, (2, 2), "12 float32", "4 float32"),
        (X.astype(float), (6, 2), "12 float64", "12 float32"),
        (None, (6, 2), "nothing", "12 float32"),
        (X, None, "12 float32", "nothing"),
    ],
)
def test_an_exchange_round_a_ring_that_does_not_fit(group, odd, x, shape, sent, expected):
    """What rank 0 sends; the last rank, from which it comes round, sends and gets what is right."""
    p, rank = group.size, group.rank
    to, source = (rank + 1) % p, (rank - 1) % p
    mine = x if rank == 0 else X
    coming = shape if rank == 1 else X.shape
    message = mismatch(lambda: isendrecv(mine, group, to, coming, source, np.float32))
    assert re.fullmatch(
        rf"isendrecv, on all ranks at \S*test_check.py:\d+: rank 10 sends {sent} to rank 11, "
        f"which expects {expected}",
        message,
    )


def test_a_ring_in_which_one_rank_turns_the_other_way(group, odd):
    if group.size == 3:
        step = -1 if odd else 1
        to, source = (group.rank + step) % 3, (group.rank - step) % 3
        message = mismatch(lambda: isendrecv(X, group, to, X.shape, source))
        assert message.endswith("rank 10 sends nothing to rank 12, which expects 12 float32") or (
            message.endswith("rank 11 sends 12 float32 to rank 12, which expects nothing")
        )


def test_a_long_list_of_blocks_is_shortened(group, odd):
    """But compared to its end."""
    sizes = [10**70, *[0] * (group.size - 1)]
    what = "+".join(map(str, sizes * 6)) + ("0" if odd else "")
    message = mismatch(lambda: CollectiveCall("all_gather", group, lambda: what).__enter__())
    assert message.count("…") == 2 and len(message) < 1000


def ways(ranks: int, variant: str) -> Iterator[dict[str, Any]]:
    """Arguments of `load` that divide a model over so many ranks: over all axes, in many forms."""
    if variant == MIXTURE:
        yield {"tp": 2, "ep": 2, "sequence_parallel": True}
        yield {"cp": 2, "ep": ranks, "moe_token_dispatcher": "all-gather"}
        yield {"tp": ranks, "ep": 2}
        yield {"dp": ranks, "ep": ranks}
    else:
        for plain in layouts(ranks, variant):
            layout = accepted(plain, tiny_config(variant))
            values = {name: getattr(layout, name) for name in LAYOUT_OPTIONS}
            layout_options = {
                name: one for name, one in values.items() if one != LAYOUT_OPTIONS[name].default
            }
            yield {"tp": layout.tp, "dp": layout.dp, "cp": layout.cp} | layout_options


@pytest.mark.ranks(2, 4, timeout=60)
@pytest.mark.parametrize("variant", ["llama-gqa", MIXTURE])
def test_every_layout_makes_the_same_collectives_on_all_ranks(comm, variant, tmp_path):
    """From the same lines: nothing that this package does is refused."""
    path = write_speaker(variant, tmp_path / "model")
    prompts = [[1, 5, 6, 0, 9, 3], [2], [3, 3, 3]]
    unchecked = mpishard.load(path).generate(prompts, SamplingParams(max_tokens=3))
    with mpishard.Watchdog(comm, timeout=0, check_collectives=True) as watch:
        for how in ways(comm.size, variant):
            model = mpishard.load(path, comm, watch=watch, **how)
            assert model.generate(prompts, SamplingParams(max_tokens=3)) == unchecked
            list(model.logits(prompts, hidden_states=True))
            assert sum(entry.calls for *_, entry in model.mesh.ledger)
    assert watch.calls.begun == watch.calls.done


def test_paths_are_short_within_the_package(group):
    assert check.PACKAGE == Path(mpishard.__file__).parent
