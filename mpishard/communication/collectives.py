"""The collectives on NumPy arrays, along any axis, in blocks of any sizes, and the exchange
between neighbours that ring attention hides behind its arithmetic.

all_reduce      x -> the sum of all ranks' x
all_gather      block -> all ranks' blocks, joined
reduce_scatter  x -> the sum of all ranks' x -> this rank's block of it
all_to_all      rows for each rank -> rows from each rank
gather          block -> all ranks' blocks, joined, on rank 0
broadcast       x -> rank 0's x
barrier         nothing -> nothing, once all ranks have come
isendrecv       x for one rank -> (arithmetic) -> what another rank sent

Each returns a new array and leaves its argument alone. Data travels through MPI's buffer calls
(``Allreduce``, not ``allreduce``), so that the bytes in the ledger are the bytes of the arrays.
Arrays of no elements, on some ranks or all, are ordinary. Each is a `CollectiveCall` of its group,
which says in words what all ranks of the group must agree upon.

MPI counts elements in a C ``int``. Not every library offers the large-count calls of MPI 4, so an
array of more than `LIMIT` elements goes in several calls of at most `LIMIT` elements; the ledger
still counts one operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from time import perf_counter

import numpy as np
from mpi4py import MPI
from numpy.typing import DTypeLike

from mpishard.communication.group import CollectiveCall, Group, Parcels
from mpishard.config.layout import block_sizes

LIMIT = 2**31 - 1

SUM, MAX, MIN = MPI.SUM, MPI.MAX, MPI.MIN

OPERATORS = ((SUM, "sum"), (MAX, "maximum"), (MIN, "minimum"))


def all_reduce(x: np.ndarray, group: Group, op: MPI.Op = SUM, limit: int = LIMIT) -> np.ndarray:
    """The sum (or `op`) of every rank's `x`, on every rank. MPI_Allreduce."""
    with CollectiveCall("all_reduce", group, lambda: f"{_amount(x)} ({_operator(op)})") as call:
        whole = np.asarray(x, order="C")
        total = np.empty_like(whole)
        pieces = zip(_flat_pieces(whole, limit), _flat_pieces(total, limit), strict=True)
        for source, target in pieces:
            group.comm.Allreduce(source, target, op)
    p = group.size
    _enter(call, x.nbytes, 2 * (p - 1) / p * x.nbytes)
    return total


def all_gather(
    x: np.ndarray,
    group: Group,
    axis: int = 0,
    sizes: Sequence[int] | None = None,
    limit: int = LIMIT,
) -> np.ndarray:
    """Every rank's `x`, joined along `axis` in the order of the ranks, on every rank.
    MPI_Allgatherv.

    `sizes` are the lengths of all ranks' blocks along `axis`; without them all are as long as
    this rank's.
    """
    counts = _counts(sizes, x.shape[axis], group)

    def gather_rows(mine: np.ndarray, joined: np.ndarray, lengths: list[int]) -> None:
        group.comm.Allgatherv(mine, [joined, lengths])

    with CollectiveCall("all_gather", group, lambda: _blocks_of(counts, x, axis)) as call:
        rows = _front(x, axis)
        whole = np.empty((sum(counts), *rows.shape[1:]), x.dtype)
        _join_pieces(gather_rows, rows, whole, counts, limit)
    _enter(call, x.nbytes, (group.size - 1) * x.nbytes)
    return _back(whole, axis)


def reduce_scatter(
    x: np.ndarray,
    group: Group,
    axis: int = 0,
    sizes: Sequence[int] | None = None,
    limit: int = LIMIT,
) -> np.ndarray:
    """The sum of every rank's `x`, of which this rank keeps its block along `axis`.
    MPI_Reduce_scatter.

    `sizes` are the lengths of the blocks; without them the axis is divided as evenly as
    `mpishard.config.layout.block` does.
    """
    counts = block_sizes(x.shape[axis], group.size) if sizes is None else list(sizes)
    _check_sum(counts, x.shape[axis])
    with CollectiveCall("reduce_scatter", group, lambda: _blocks_of(counts, x, axis)) as call:
        rows = _front(x, axis)
        shard = np.empty((counts[group.rank], *rows.shape[1:]), x.dtype)
        if x.size <= limit:
            width = math.prod(rows.shape[1:])
            group.comm.Reduce_scatter(rows, shard, [count * width for count in counts], SUM)
        else:
            _reduce_scatter_pieces(group, rows, shard, counts, limit)
    _enter(call, x.nbytes, x.nbytes - shard.nbytes)
    return _back(shard, axis)


def all_to_all(
    x: np.ndarray,
    group: Group,
    send_sizes: Sequence[int],
    receive_sizes: Sequence[int],
    limit: int = LIMIT,
) -> np.ndarray:
    """The rows that all ranks have for this one, in the order of the ranks they come from.
    MPI_Isend and MPI_Irecv, in place of MPI_Alltoallv.

    The rows of `x` (axis 0) lie in the order of the ranks they are for: ``send_sizes[i]`` of them
    go to rank ``i``, ``receive_sizes[i]`` come from it. Raises ValueError if the rows of `x`, or
    what this rank sends to and receives from itself, are not as many as the sizes say.
    """
    rank, p = group.rank, group.size
    _check_sum(send_sizes, len(x))
    if send_sizes[rank] != receive_sizes[rank]:
        raise ValueError(
            f"rank {rank} sends itself {send_sizes[rank]} rows, receives {receive_sizes[rank]}"
        )
    whole = np.empty((sum(receive_sizes), *x.shape[1:]), x.dtype)

    def peer_counts() -> tuple[Parcels, Parcels]:
        width = math.prod(x.shape[1:])
        return _parcels(send_sizes, width, x.dtype), _parcels(receive_sizes, width, x.dtype)

    # MPICH's Alltoallv copies large rows through small cells of shared memory, where messages from
    # rank to rank go in one copy: 16 MB on 2 ranks take 3.6 ms against 2.2 ms, and 82 ms against
    # 2.3 ms where waiting ranks sleep (MPIR_CVAR_ENABLE_HEAVY_YIELD). For 4 KB the two are equal,
    # so messages it always is: a threshold would need sizes that all ranks know.
    with CollectiveCall(
        "all_to_all", group, lambda: f"rows of {_width(x, 0)} {x.dtype}", peer_counts
    ) as call:
        sent = _blocks(np.ascontiguousarray(x), send_sizes)
        received = _blocks(whole, receive_sizes)
        others = [(rank + step) % p for step in range(1, p)]
        requests = []
        for i in reversed(others):
            requests += _receive(received[i], i, group, limit)
        for i in others:
            requests += _send(sent[i], i, group, limit)
        received[rank][...] = sent[rank]
        MPI.Request.Waitall(requests)
    _enter(call, x.nbytes, x.nbytes - sent[rank].nbytes)
    return whole


def gather(
    x: np.ndarray,
    group: Group,
    axis: int = 0,
    sizes: Sequence[int] | None = None,
    limit: int = LIMIT,
) -> np.ndarray | None:
    """Every rank's `x`, joined along `axis` in the order of the ranks, on rank 0 of the group;
    None elsewhere. MPI_Gatherv. `sizes` as for `all_gather`."""
    counts = _counts(sizes, x.shape[axis], group)
    is_root = group.rank == 0

    def gather_rows(mine: np.ndarray, joined: np.ndarray, lengths: list[int]) -> None:
        group.comm.Gatherv(mine, [joined, lengths] if is_root else None)

    with CollectiveCall("gather", group, lambda: _blocks_of(counts, x, axis)) as call:
        rows = _front(x, axis)
        whole = np.empty((sum(counts) if is_root else 0, *rows.shape[1:]), x.dtype)
        _join_pieces(gather_rows, rows, whole, counts, limit)
    _enter(call, x.nbytes, 0 if is_root else x.nbytes)
    return _back(whole, axis) if is_root else None


def broadcast(x: np.ndarray, group: Group, limit: int = LIMIT) -> np.ndarray:
    """Rank 0's `x`, on every rank; elsewhere `x` gives the shape and type. MPI_Bcast."""
    with CollectiveCall("broadcast", group, lambda: _amount(x)) as call:
        copy = np.array(x, order="C")
        for piece in _flat_pieces(copy, limit):
            group.comm.Bcast(piece, root=0)
    p = group.size
    _enter(call, x.nbytes, (p - 1) / p * x.nbytes)
    return copy


def barrier(group: Group) -> None:
    """Returns when all ranks of the group have called it. MPI_Barrier. It carries nothing, and the
    ledger does not count it."""
    with CollectiveCall("barrier", group):
        group.comm.Barrier()


@dataclass
class PendingExchange:
    """An exchange that `isendrecv` has begun and `wait` completes."""

    call: CollectiveCall
    to: int
    sent: np.ndarray | None  # MPI reads it until `wait` returns
    received: np.ndarray | None  # and writes this
    requests: list[MPI.Request]
    seconds: float

    def progress(self) -> bool:
        """Whether the exchange is complete. MPI_Testall.

        Most MPI libraries move large messages only while the program is inside a call of theirs.
        This one, between blocks of arithmetic, lets them; with nothing to move it costs below 1 us.
        """
        started = perf_counter()
        is_complete = MPI.Request.Testall(self.requests)
        self.seconds += perf_counter() - started
        return is_complete

    def wait(self) -> np.ndarray | None:
        """What was received, None if nothing was to come. MPI_Waitall. To be called once, always:
        until then MPI has the two arrays in use."""
        with self.call:
            MPI.Request.Waitall(self.requests)
        self.seconds += self.call.seconds
        if self.sent is not None or self.received is not None:
            group = self.call.group
            payload = 0 if self.sent is None else self.sent.nbytes
            wire = 0 if self.to == group.rank else payload
            group.ledger.add("isendrecv", group.name, payload, wire, self.seconds)
        return self.received


def isendrecv(
    x: np.ndarray | None,
    group: Group,
    to: int,
    shape: Sequence[int] | None,
    source: int,
    dtype: DTypeLike | None = None,
    limit: int = LIMIT,
) -> PendingExchange:
    """Begins to send `x` to rank `to` and to receive an array of `shape` from rank `source`, which
    is what ``wait()`` of the answer returns. MPI_Isend and MPI_Irecv.

    The arithmetic that hides the exchange stands between the two calls; until the second `x` must
    not be changed. None for `x` sends nothing, None for `shape` receives nothing. `dtype` is that
    of the array received; without it, that of `x`. Raises ValueError if there is neither.
    """
    sent = None if x is None else np.ascontiguousarray(x)
    received = None
    if shape is not None:
        if dtype is None:
            if x is None:
                raise ValueError("isendrecv needs the dtype of what it receives, or x to say it")
            dtype = x.dtype
        received = np.empty(shape, dtype)

    def peer_counts() -> tuple[Parcels, Parcels]:
        return _parcel(sent, to), _parcel(received, source)

    requests = []
    with CollectiveCall("isendrecv", group, peer_counts=peer_counts, parts=2) as call:
        if received is not None:
            requests += _receive(received, source, group, limit)
        if sent is not None:
            requests += _send(sent, to, group, limit)
    return PendingExchange(call, to, sent, received, requests, call.seconds)


def _enter(call: CollectiveCall, payload: int, wire: float) -> None:
    """Enter a call that has just ended in the ledger."""
    group = call.group
    group.ledger.add(call.operation, group.name, payload, wire, call.seconds)


def _amount(x: np.ndarray) -> str:
    return f"{x.size} {x.dtype}"


def _width(x: np.ndarray, axis: int) -> int:
    """The elements of a row of `x`, whose rows, if there are any, lie along `axis`."""
    return math.prod(np.delete(x.shape, axis).tolist())


def _operator(op: MPI.Op) -> str:
    return next((name for known, name in OPERATORS if op == known), "an operator of one's own")


def _blocks_of(counts: list[int], x: np.ndarray, axis: int) -> str:
    """All ranks' blocks, of which `x` is made or which `x` is one of, in words."""
    return f"{'+'.join(map(str, counts))} rows of {_width(x, axis)} {x.dtype}"


def _parcels(sizes: Sequence[int], width: int, dtype: np.dtype) -> Parcels:
    """Rows of `width` elements for or from each rank, as many as `sizes` say."""
    return {i: (int(size) * width, str(dtype)) for i, size in enumerate(sizes)}


def _parcel(x: np.ndarray | None, rank: int) -> Parcels:
    """`x`, if any, for or from one rank."""
    return {} if x is None else {rank: (x.size, str(x.dtype))}


def _flat_pieces(x: np.ndarray, limit: int) -> list[np.ndarray]:
    """`x` itself or, where it has more than `limit` elements, views of its consecutive parts."""
    if x.size <= limit:
        return [x]
    flat = x.reshape(-1)
    return [flat[start : start + limit] for start in range(0, x.size, limit)]


def _send(block: np.ndarray, to: int, group: Group, limit: int) -> list[MPI.Request]:
    """The sends, begun, of `block` to rank `to`: none at all if it is empty."""
    pieces = _flat_pieces(block, limit) if block.size else []
    return [group.comm.Isend(piece, to) for piece in pieces]


def _receive(block: np.ndarray, source: int, group: Group, limit: int) -> list[MPI.Request]:
    """The receives that match `_send` of a block of the same size."""
    pieces = _flat_pieces(block, limit) if block.size else []
    return [group.comm.Irecv(piece, source) for piece in pieces]


def _blocks(rows: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """Views of `rows`: consecutive blocks of as many rows as `sizes` say."""
    return [rows[start:stop] for start, stop in pairwise(accumulate(sizes, initial=0))]


def _check_sum(sizes: Sequence[int], length: int) -> None:
    if sum(sizes) != length:
        raise ValueError(f"there are {length} rows, sizes say {sum(sizes)}")


def _counts(sizes: Sequence[int] | None, mine: int, group: Group) -> list[int]:
    if sizes is None:
        return [mine] * group.size
    if sizes[group.rank] != mine:
        raise ValueError(f"rank {group.rank} has {mine} rows, sizes say {sizes[group.rank]}")
    return list(sizes)


def _front(x: np.ndarray, axis: int) -> np.ndarray:
    """`x` in C order with `axis` first, so that a rank's block is one run of memory. (``moveaxis``
    reads better and takes 2 us longer, which is what a small collective takes.)"""
    return np.ascontiguousarray(np.rollaxis(x, axis))


def _back(rows: np.ndarray, axis: int) -> np.ndarray:
    return np.ascontiguousarray(np.rollaxis(rows, 0, axis % rows.ndim + 1))


def _pieces(counts: list[int], width: int, limit: int) -> list[tuple[int, int, slice]]:
    """The calls in which blocks of `counts` rows of `width` elements travel so that none carries
    more than `limit` elements: ``(first row, end row, columns)``, rows counted in every block."""
    columns = max(1, min(width, limit // len(counts)))
    rows = max(1, limit // (len(counts) * columns))
    return [
        (row, min(row + rows, max(counts)), slice(column, min(column + columns, width)))
        for row in range(0, max(max(counts), 1), rows)
        for column in range(0, max(width, 1), columns)
    ]


def _join_pieces(
    collective: Callable[[np.ndarray, np.ndarray, list[int]], None],
    rows: np.ndarray,
    whole: np.ndarray,
    counts: list[int],
    limit: int,
) -> None:
    """Run a gathering `collective` on `rows` and put what it joins into its places in `whole`
    (which is empty where the collective returns nothing): in one call if `limit` allows it."""
    width = math.prod(rows.shape[1:])
    if sum(counts) * width <= limit:
        collective(rows, whole, [count * width for count in counts])
        return
    mine = rows.reshape(len(rows), width)
    target = whole.reshape(len(whole), width)
    starts = [0, *accumulate(counts)]
    for start, stop, columns in _pieces(counts, width, limit):
        parts = [min(max(count - start, 0), stop - start) for count in counts]
        send = np.ascontiguousarray(mine[start:stop, columns])
        joined = np.empty((sum(parts), send.shape[1]), rows.dtype)
        collective(send, joined, [n * send.shape[1] for n in parts])
        if not len(target):
            continue
        offset = 0
        for first, n in zip(starts, parts, strict=False):
            target[first + start : first + start + n, columns] = joined[offset : offset + n]
            offset += n


def _reduce_scatter_pieces(
    group: Group, rows: np.ndarray, shard: np.ndarray, counts: list[int], limit: int
) -> None:
    """Put into `shard` this rank's block of the sum of all ranks' `rows`, piece by piece."""
    width = math.prod(rows.shape[1:])
    mine = shard.reshape(len(shard), width)
    blocks = _blocks(rows.reshape(len(rows), width), counts)
    for start, stop, columns in _pieces(counts, width, limit):
        pieces = [block[start:stop, columns] for block in blocks]
        send = np.concatenate(pieces)
        kept = np.empty((len(pieces[group.rank]), send.shape[1]), rows.dtype)
        group.comm.Reduce_scatter(send, kept, [piece.size for piece in pieces], SUM)
        mine[start:stop, columns] = kept
