"""Each collective against NumPy on all ranks' data: axes, uneven and empty blocks, types, arrays
that go in pieces; and what the ledger says of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from covering import covering
from mpi4py import MPI

from mpishard.communication import collectives
from mpishard.communication.collectives import (
    LIMIT,
    all_gather,
    all_reduce,
    all_to_all,
    broadcast,
    gather,
    isendrecv,
    reduce_scatter,
)
from mpishard.communication.ledger import Ledger
from mpishard.communication.mesh import Group

pytestmark = pytest.mark.ranks

DTYPES = (np.float32, np.float64, np.int64, np.uint8)
SHAPES = ((7,), (5, 8), (3, 1, 4), (2, 3, 0), ())
# From far fewer elements in a message than there are, to no limit in sight.
LIMITS = (1, 5, LIMIT)


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
    for row in covering({"shape": SHAPES, "dtype": DTYPES, "limit": LIMITS}):
        shape, dtype, limit = row.values()
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
    axes = {"sizes": uneven(group.size), "axis": range(3), "limit": LIMITS, "dtype": DTYPES}
    for row in covering(axes):
        sizes, axis, limit, dtype = row.values()
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
    with pytest.raises(ValueError, match=f"there are 2 rows, sizes say {3 * group.size}"):
        reduce_scatter(np.zeros(2), group, sizes=[3] * group.size)


def test_reduce_scatter(group):
    for row in covering({"sizes": uneven(group.size), "axis": range(3), "limit": LIMITS}):
        sizes, axis, limit = row.values()
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


def test_axes_count_from_the_end_too(group):
    everyones = blocks([3] * group.size, 2, np.float64)
    whole = all_gather(everyones[group.rank], group, axis=-1)
    np.testing.assert_array_equal(whole, np.concatenate(everyones, axis=-1))
    shard = reduce_scatter(whole, group, axis=-1)
    np.testing.assert_array_equal(shard, everyones[group.rank] * group.size)


@pytest.mark.parametrize("limit", LIMITS)
def test_arrays_of_no_elements(group, limit: int):
    """On all ranks, whichever axis is the empty one."""
    p = group.size
    for shape, dtype in zip(((0, 24), (3, 0), (0, 0), (0,)), DTYPES, strict=True):
        x = np.zeros(shape, dtype)
        for same in (
            all_reduce(x, group, limit=limit),
            all_reduce(x, group, collectives.MAX, limit),
            broadcast(x, group, limit),
        ):
            assert same.shape == shape and same.dtype == dtype
        for axis in range(len(shape)):
            joined = list(shape)
            joined[axis] *= p
            sizes = [shape[axis]] * p
            assert all_gather(x, group, axis, limit=limit).shape == tuple(joined)
            assert all_gather(x, group, axis, sizes, limit).shape == tuple(joined)
            at_root = gather(x, group, axis, sizes, limit)
            assert (at_root is None) == (group.rank > 0)
            assert at_root is None or at_root.shape == tuple(joined)
            whole = np.zeros(joined, dtype)
            assert reduce_scatter(whole, group, axis, limit=limit).shape == shape
            assert reduce_scatter(whole, group, axis, sizes, limit).shape == shape


@pytest.mark.parametrize("limit", LIMITS)
def test_fewer_rows_than_ranks(group, limit: int):
    """One row, which rank 0 keeps: a step of one token in sequence parallelism."""
    x = np.arange(24.0).reshape(1, 24)
    shard = reduce_scatter(x, group, limit=limit)
    np.testing.assert_array_equal(shard, group.size * x[: group.rank == 0])
    sizes = [1] + [0] * (group.size - 1)
    whole = all_gather(shard, group, sizes=sizes, limit=limit)
    np.testing.assert_array_equal(whole, group.size * x)


def test_broadcast(group):
    for row in covering({"shape": SHAPES, "dtype": DTYPES, "limit": LIMITS}):
        shape, dtype, limit = row.values()
        root = data(0, shape, dtype)
        mine = root if group.rank == 0 else np.zeros_like(root)
        np.testing.assert_array_equal(broadcast(mine, group, limit), root)


class Counting:
    """A communicator that notes how many elements the calls on it carry."""

    def __init__(self, comm: MPI.Comm) -> None:
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.elements: list[int] = []

    def __getattr__(self, name: str) -> Callable:
        def counted(*arguments: Any, **options: Any) -> Any:
            arrays = [a[0] if isinstance(a, list) else a for a in arguments]
            self.elements += [a.size for a in arrays if isinstance(a, np.ndarray)]
            return getattr(self.comm, name)(*arguments, **options)

        return counted


@pytest.mark.parametrize("limit", [8, 13, 100])
def test_no_call_carries_more_than_the_limit(comm, limit: int):
    p = comm.size
    counting: Any = Counting(comm)
    group = Group(counting, "test", Ledger())
    x = np.ones((p, 13), np.float32)
    for collective in (all_reduce, all_gather, reduce_scatter, gather, broadcast):
        collective(x, group, limit=limit)
    all_to_all(x, group, [1] * p, [1] * p, limit)
    isendrecv(x, group, (comm.rank + 1) % p, x.shape, (comm.rank - 1) % p, limit=limit).wait()
    assert max(counting.elements) <= limit


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
