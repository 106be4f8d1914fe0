"""Each collective against NumPy on all ranks' data: axes, uneven and empty blocks, types, arrays
that go in pieces; and what the ledger says of it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from mpishard.communication import collectives
from mpishard.communication.collectives import (
    LIMIT,
    all_gather,
    all_reduce,
    broadcast,
    gather,
    reduce_scatter,
)
from mpishard.communication.ledger import Ledger
from mpishard.communication.mesh import Group

pytestmark = pytest.mark.ranks

DTYPES = (np.float32, np.float64, np.int64, np.uint8)
SHAPES = ((7,), (5, 8), (3, 1, 4), (2, 3, 0), ())
# From far fewer elements in a message than there are, to no limit in sight.
LIMITS = (1, 3, 10, LIMIT)


@pytest.fixture
def group(comm) -> Group:
    return Group(comm, "test", Ledger())


def data(rank: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """What `rank` holds: integers, whose sums are exact in any order."""
    values = np.random.RandomState(rank).randint(0, 9, shape)
    return np.asarray(values).astype(dtype)


def uneven(size: int) -> list[list[int]]:
    """Lengths of blocks: even, growing, one empty, all on the last rank."""
    return [[3] * size, list(range(size)), [2] * (size - 1) + [0], [0] * (size - 1) + [5]]


def blocks(sizes: list[int], axis: int, dtype: type) -> list[np.ndarray]:
    """One block for each rank, as long as `sizes` say along `axis` of three."""
    shapes = [[2, 3, 4] for _ in sizes]
    for shape, size in zip(shapes, sizes, strict=True):
        shape[axis] = size
    return [data(rank, tuple(shape), dtype) for rank, shape in enumerate(shapes)]


def test_all_reduce(group):
    for shape, dtype, limit in product(SHAPES, DTYPES, LIMITS):
        everyones = [data(rank, shape, dtype) for rank in range(group.size)]
        mine = everyones[group.rank].copy()
        total = all_reduce(mine, group, limit=limit)
        assert total.dtype == dtype and total.shape == shape
        np.testing.assert_array_equal(total, np.sum(everyones, axis=0, dtype=dtype))
        np.testing.assert_array_equal(mine, everyones[group.rank])  # the argument is left alone
        most = all_reduce(mine, group, collectives.MAX, limit)
        np.testing.assert_array_equal(most, np.max(everyones, axis=0))


def test_all_reduce_of_a_view(group):
    x = data(group.rank, (6, 4), np.float64)
    total = all_reduce(x[::2].T, group)
    expected = sum(data(rank, (6, 4), np.float64) for rank in range(group.size))
    np.testing.assert_array_equal(total, np.asarray(expected)[::2].T)


@pytest.mark.parametrize("collective", [all_gather, gather])
def test_gathering(group, collective: Callable):
    for sizes, axis, limit in product(uneven(group.size), range(3), LIMITS):
        for dtype in DTYPES:
            everyones = blocks(sizes, axis, dtype)
            whole = collective(everyones[group.rank], group, axis, sizes, limit)
            if collective is gather and group.rank > 0:
                assert whole is None
                continue
            assert whole.dtype == dtype and whole.flags.c_contiguous
            np.testing.assert_array_equal(whole, np.concatenate(everyones, axis))


def test_even_blocks_need_no_sizes(group):
    everyones = blocks([3] * group.size, 1, np.float32)
    whole = all_gather(everyones[group.rank], group, axis=1)
    np.testing.assert_array_equal(whole, np.concatenate(everyones, axis=1))


def test_sizes_must_be_those_of_the_blocks(group):
    with pytest.raises(ValueError, match="rows"):
        all_gather(np.zeros(2), group, sizes=[3] * group.size)


def test_reduce_scatter(group):
    for sizes, axis, limit in product(uneven(group.size), range(3), LIMITS):
        shape = [2, 3, 4]
        shape[axis] = sum(sizes)
        everyones = [data(rank, tuple(shape), np.float64) for rank in range(group.size)]
        shard = reduce_scatter(everyones[group.rank], group, axis, sizes, limit)
        bounds = np.cumsum(sizes)[:-1]
        expected = np.split(sum(everyones), bounds, axis)[group.rank]
        np.testing.assert_array_equal(shard, expected)


def test_reduce_scatter_divides_evenly_unless_told(group):
    whole = np.arange(11.0)
    shard = reduce_scatter(whole, group)
    expected = np.array_split(whole * group.size, group.size)[group.rank]
    np.testing.assert_array_equal(shard, expected)


def test_broadcast(group):
    for shape, dtype, limit in product(SHAPES, DTYPES, LIMITS):
        root = data(0, shape, dtype)
        mine = root if group.rank == 0 else np.zeros_like(root)
        np.testing.assert_array_equal(broadcast(mine, group, limit), root)


def test_the_ledger_counts_calls_and_bytes(group):
    p = group.size
    x = np.zeros((4 * p, 5), np.float32)
    n = x.nbytes
    all_reduce(x, group, limit=7)  # in pieces, and still one call
    all_reduce(x, group)
    all_gather(x, group)
    reduce_scatter(x, group)
    gather(x, group)
    broadcast(x, group)
    entries = {operation: entry for operation, _, entry in group.ledger}
    assert {group_name for _, group_name, _ in group.ledger} == {"test"}
    assert {operation: entry.calls for operation, entry in entries.items()} == {
        "all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "gather": 1, "broadcast": 1,
    }  # fmt: skip
    assert {operation: entry.payload_bytes for operation, entry in entries.items()} == {
        "all_reduce": 2 * n, "all_gather": n, "reduce_scatter": n, "gather": n, "broadcast": n,
    }  # fmt: skip
    assert entries["all_reduce"].wire_bytes == pytest.approx(2 * 2 * (p - 1) / p * n)
    assert entries["all_gather"].wire_bytes == (p - 1) * n
    assert entries["reduce_scatter"].wire_bytes == pytest.approx((p - 1) / p * n)
    assert entries["gather"].wire_bytes == (n if group.rank else 0)
    assert entries["broadcast"].wire_bytes == pytest.approx((p - 1) / p * n)
    assert group.ledger.seconds > 0
    group.ledger.clear()
    assert not list(group.ledger) and group.ledger["all_reduce", "test"].calls == 0
