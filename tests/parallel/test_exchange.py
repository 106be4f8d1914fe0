"""all_to_all against NumPy on all ranks' rows, and isendrecv round a ring: uneven and empty
blocks, types, arrays that go in pieces; and what the ledger says of them."""

from __future__ import annotations

from itertools import product
from time import sleep

import numpy as np
import pytest

from mpishard.communication.collectives import LIMIT, all_reduce, all_to_all, isendrecv
from mpishard.communication.ledger import Ledger
from mpishard.communication.mesh import Group

pytestmark = pytest.mark.ranks

DTYPES = (np.float32, np.float64, np.float16, np.int64, np.uint8, np.bool_)
TRAILING = ((), (3,), (2, 4), (1, 0))
LIMITS = (1, 3, 10, LIMIT)


@pytest.fixture
def group(comm) -> Group:
    return Group(comm, "test", Ledger())


def data(rank: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """What `rank` holds."""
    return np.asarray(np.random.RandomState(rank).randint(0, 99, shape)).astype(dtype)


def routings(p: int) -> list[np.ndarray]:
    """``rows[i, j]`` that rank i has for rank j: even, any with a third of them zero, all for one
    rank, all from one rank, each rank's for itself, none."""
    random = np.random.RandomState(p)
    uneven = random.randint(0, 5, (p, p)) * (random.rand(p, p) > 1 / 3)
    one = np.arange(p) == p - 1
    return [
        np.full((p, p), 2),
        uneven,
        np.where(one, 3, 0) * np.ones((p, 1), int),
        np.where(one, 3, 0)[:, None] * np.ones((1, p), int),
        np.diag(np.arange(p)),
        np.zeros((p, p), int),
    ]


def expected_rows(everyones: list[np.ndarray], rows: np.ndarray, rank: int) -> np.ndarray:
    """What `rank` receives: of every rank's rows, those that follow the ones for lower ranks."""
    starts = np.cumsum(rows, axis=1) - rows
    blocks = [
        x[start : start + n]
        for x, start, n in zip(everyones, starts[:, rank], rows[:, rank], strict=True)
    ]
    return np.concatenate(blocks)


def test_all_to_all(group):
    for rows, trailing, dtype in product(routings(group.size), TRAILING, DTYPES):
        everyones = [data(i, (n, *trailing), dtype) for i, n in enumerate(rows.sum(axis=1))]
        mine = everyones[group.rank].copy()
        sizes = rows[group.rank].tolist(), rows[:, group.rank].tolist()
        received = all_to_all(mine, group, *sizes)
        assert received.dtype == dtype and received.flags.c_contiguous
        np.testing.assert_array_equal(received, expected_rows(everyones, rows, group.rank))
        np.testing.assert_array_equal(mine, everyones[group.rank])  # the argument is left alone
        assert not np.shares_memory(received, mine)
        # The same exchange backwards brings every row back.
        np.testing.assert_array_equal(all_to_all(received, group, *reversed(sizes)), mine)


def test_all_to_all_in_pieces(group):
    for rows, limit in product(routings(group.size), LIMITS):
        everyones = [data(i, (n, 3), np.int64) for i, n in enumerate(rows.sum(axis=1))]
        mine = everyones[group.rank]
        received = all_to_all(mine, group, rows[group.rank], rows[:, group.rank], limit)
        np.testing.assert_array_equal(received, expected_rows(everyones, rows, group.rank))


def test_all_to_all_of_large_rows_and_a_view(group):
    """More than a message that MPI sends without waiting for its receiver."""
    p = group.size
    everyones = [data(i, (1000, 2 * p), np.float64).T for i in range(p)]
    received = all_to_all(everyones[group.rank], group, [2] * p, [2] * p)
    expected = [x[2 * group.rank : 2 * group.rank + 2] for x in everyones]
    np.testing.assert_array_equal(received, np.concatenate(expected))


def test_all_to_all_refuses_sizes_that_are_not_those_of_the_rows(group):
    p, rank = group.size, group.rank
    with pytest.raises(ValueError, match=f"there are {2 * p + 1} rows, sizes say {2 * p}"):
        all_to_all(np.zeros((2 * p + 1, 4)), group, [2] * p, [2] * p)
    with pytest.raises(ValueError, match=f"rank {rank} sends itself 2 rows, receives 1"):
        all_to_all(np.zeros((2 * p, 4)), group, [2] * p, [1] * p)


def test_all_to_all_in_the_ledger(group):
    rank = group.rank
    payload = wire = 0
    for rows, limit in product(routings(group.size), (5, LIMIT)):
        x = np.zeros((rows[rank].sum(), 7), np.float32)
        all_to_all(x, group, rows[rank], rows[:, rank], limit)
        payload += 4 * 7 * int(rows[rank].sum())
        wire += 4 * 7 * int(rows[rank].sum() - rows[rank, rank])
    entry = group.ledger["all_to_all", "test"]
    assert (entry.calls, entry.payload_bytes, entry.wire_bytes) == (12, payload, wire)
    assert entry.seconds > 0 and len(list(group.ledger)) == 1


def test_isendrecv_round_the_ring(group):
    """Every rank's array, of its own length, passes through all ranks; on one rank, to itself."""
    p = group.size
    for dtype, limit in product(DTYPES, LIMITS):
        everyones = [data(rank, (rank, 2, 3), dtype) for rank in range(p)]
        x = everyones[group.rank]
        for step in range(1, p + 1):
            source = (group.rank - step) % p
            coming = everyones[source]
            to, before = (group.rank + 1) % p, (group.rank - 1) % p
            received = isendrecv(x, group, to, coming.shape, before, limit=limit).wait()
            assert received is not None
            assert received.dtype == dtype and received.shape == coming.shape
            np.testing.assert_array_equal(received, coming)
            x = received


def test_isendrecv_of_large_arrays_hides_behind_other_work(group):
    """Exchanges of many megabytes in both directions at once, collectives between their two calls,
    and a view whose base changes: all of it arrives as it was when it was sent."""
    p = group.size
    after, before = (group.rank + 1) % p, (group.rank - 1) % p
    base = data(group.rank, (500, 1001), np.float64)
    up = isendrecv(base[:, 1:], group, after, (500, 1000), before)
    down = isendrecv(base[:250].astype(np.int64), group, before, (250, 1001), after)
    base[...] = -1  # what was sent are copies: neither of the two was one run of the base's memory
    assert all_reduce(np.ones(5), group)[0] == p
    assert isinstance(up.progress(), bool)
    np.testing.assert_array_equal(up.wait(), data(before, (500, 1001), np.float64)[:, 1:])
    np.testing.assert_array_equal(down.wait(), data(after, (500, 1001), np.int64)[:250])


def test_isendrecv_progresses_to_the_end(group):
    p = group.size
    x = data(group.rank, (300_000,), np.float32)
    pending = isendrecv(x, group, (group.rank + 1) % p, x.shape, (group.rank - 1) % p)
    while not pending.progress():
        pass
    assert pending.progress()  # and stays there
    np.testing.assert_array_equal(pending.wait(), data((group.rank - 1) % p, x.shape, np.float32))


def test_isendrecv_one_way(group):
    """Down a line: the first rank receives nothing, the last sends nothing."""
    rank, last = group.rank, group.size - 1
    for shape, limit in product(((), (5,), (2, 3), (0, 4)), LIMITS):
        pending = isendrecv(
            data(rank, shape, np.float32) if rank < last else None,
            group,
            rank + 1,
            shape if rank > 0 else None,
            rank - 1,
            np.float32,
            limit,
        )
        received = pending.wait()
        if rank == 0:
            assert received is None
        else:
            assert received is not None
            assert received.dtype == np.float32 and received.shape == shape
            np.testing.assert_array_equal(received, data(rank - 1, shape, np.float32))


def test_isendrecv_needs_a_dtype_from_somewhere(group):
    with pytest.raises(ValueError, match="dtype"):
        isendrecv(None, group, 0, (3,), 0)
    assert isendrecv(None, group, 0, None, 0).wait() is None


def test_the_type_received_may_be_another_than_the_type_sent(group):
    p, rank = group.size, group.rank
    x = np.full(3, rank, np.int64 if rank % 2 else np.float32)
    before = (rank - 1) % p
    dtype = np.int64 if before % 2 else np.float32
    received = isendrecv(x, group, (rank + 1) % p, (3,), before, dtype).wait()
    assert received is not None and received.dtype == dtype
    np.testing.assert_array_equal(received, np.full(3, before))


def test_isendrecv_in_the_ledger(group):
    p, rank = group.size, group.rank
    x = np.zeros((3, 5), np.float32)
    pending = isendrecv(x, group, (rank + 1) % p, (3, 5), (rank - 1) % p, limit=4)
    assert not list(group.ledger)  # entered when it ends
    pending.wait()
    isendrecv(x if rank == 0 else None, group, p - 1, (3, 5) if rank == p - 1 else None, 0,
                 np.float32).wait()  # fmt: skip
    entry = group.ledger["isendrecv", "test"]
    payload = x.nbytes + (x.nbytes if rank == 0 else 0)
    calls = 1 + (rank in (0, p - 1))  # whoever neither sends nor receives enters nothing
    assert (entry.calls, entry.payload_bytes) == (calls, payload)
    assert entry.wire_bytes == (payload if p > 1 else 0)
    assert entry.seconds > 0 and len(list(group.ledger)) == 1


def test_the_arithmetic_between_is_not_counted(group):
    p, rank = group.size, group.rank
    x = np.zeros(4, np.float32)
    pending = isendrecv(x, group, (rank + 1) % p, (4,), (rank - 1) % p)
    while not pending.progress():
        pass
    seconds = pending.seconds
    sleep(0.2)
    pending.wait()
    assert 0 < group.ledger["isendrecv", "test"].seconds - seconds < 0.1
