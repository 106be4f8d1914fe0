"""The collectives on NumPy arrays: one MPI call each, along any axis, in blocks of any sizes.

Each returns a new array and leaves its argument alone. Data travels through MPI's buffer calls
(``Allreduce``, not ``allreduce``), so that the bytes in the ledger are the bytes of the arrays.

MPI counts elements in a C ``int``. Not every library offers the large-count calls of MPI 4, so an
array of more than `LIMIT` elements goes in several calls of at most `LIMIT` elements; the ledger
still counts one operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np
from mpi4py import MPI

from mpishard.communication.mesh import Group
from mpishard.description.layout import block_sizes

LIMIT = 2**31 - 1

SUM, MAX, MIN = MPI.SUM, MPI.MAX, MPI.MIN


def all_reduce(x: np.ndarray, group: Group, op: MPI.Op = SUM, limit: int = LIMIT) -> np.ndarray:
    """The sum (or `op`) of every rank's `x`, on every rank. MPI_Allreduce."""
    started = perf_counter()
    whole = np.asarray(x, order="C")
    total = np.empty_like(whole)
    for source, target in zip(_flat_pieces(whole, limit), _flat_pieces(total, limit), strict=True):
        group.comm.Allreduce(source, target, op)
    p = group.size
    _enter("all_reduce", group, x.nbytes, 2 * (p - 1) / p * x.nbytes, started)
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
    started = perf_counter()
    counts = _counts(sizes, x.shape[axis], group)
    rows = _front(x, axis)
    whole = np.empty((sum(counts), *rows.shape[1:]), x.dtype)

    def gather(mine: np.ndarray, counts: list[int]) -> np.ndarray:
        joined = np.empty((sum(counts), mine.shape[1]), x.dtype)
        lengths = [count * mine.shape[1] for count in counts]
        group.comm.Allgatherv(np.ascontiguousarray(mine), [joined, lengths])
        return joined

    _join_pieces(gather, rows, whole, counts, limit)
    _enter("all_gather", group, x.nbytes, (group.size - 1) * x.nbytes, started)
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
    `mpishard.description.layout.block` does.
    """
    started = perf_counter()
    counts = list(sizes) if sizes is not None else block_sizes(x.shape[axis], group.size)
    rows = _front(x, axis)
    width = math.prod(rows.shape[1:])
    starts = np.cumsum([0, *counts[:-1]])
    whole = rows.reshape(len(rows), width)
    mine = np.empty((counts[group.rank], width), x.dtype)
    for start, stop, columns in _pieces(counts, width, limit):
        parts = [min(max(count - start, 0), stop - start) for count in counts]
        pieces = [
            whole[first + start : first + start + n, columns]
            for first, n in zip(starts, parts, strict=True)
        ]
        send = np.concatenate(pieces) if len(pieces) > 1 else np.ascontiguousarray(pieces[0])
        kept = np.empty((parts[group.rank], send.shape[1]), x.dtype)
        group.comm.Reduce_scatter(send, kept, [n * send.shape[1] for n in parts], SUM)
        mine[start : start + len(kept), columns] = kept
    shard = mine.reshape(len(mine), *rows.shape[1:])
    _enter("reduce_scatter", group, x.nbytes, x.nbytes - shard.nbytes, started)
    return _back(shard, axis)


def gather(
    x: np.ndarray,
    group: Group,
    axis: int = 0,
    sizes: Sequence[int] | None = None,
    limit: int = LIMIT,
) -> np.ndarray | None:
    """Every rank's `x`, joined along `axis` in the order of the ranks, on rank 0 of the group;
    None elsewhere. MPI_Gatherv. `sizes` as for `all_gather`."""
    started = perf_counter()
    counts = _counts(sizes, x.shape[axis], group)
    rows = _front(x, axis)
    is_root = group.rank == 0
    whole = np.empty((sum(counts) if is_root else 0, *rows.shape[1:]), x.dtype)

    def gather_rows(mine: np.ndarray, counts: list[int]) -> np.ndarray:
        joined = np.empty((sum(counts) if is_root else 0, mine.shape[1]), x.dtype)
        lengths = [count * mine.shape[1] for count in counts]
        group.comm.Gatherv(np.ascontiguousarray(mine), [joined, lengths] if is_root else None)
        return joined

    _join_pieces(gather_rows, rows, whole, counts, limit)
    _enter("gather", group, x.nbytes, 0 if is_root else x.nbytes, started)
    return _back(whole, axis) if is_root else None


def broadcast(x: np.ndarray, group: Group, limit: int = LIMIT) -> np.ndarray:
    """Rank 0's `x`, on every rank; elsewhere `x` gives the shape and type. MPI_Bcast."""
    started = perf_counter()
    copy = np.array(x, order="C")
    for piece in _flat_pieces(copy, limit):
        group.comm.Bcast(piece, root=0)
    p = group.size
    _enter("broadcast", group, x.nbytes, (p - 1) / p * x.nbytes, started)
    return copy


def _enter(operation: str, group: Group, payload: int, wire: float, started: float) -> None:
    group.ledger.add(operation, group.name, payload, wire, perf_counter() - started)


def _flat_pieces(x: np.ndarray, limit: int) -> list[np.ndarray]:
    """`x` itself or, where it has more than `limit` elements, views of its consecutive parts."""
    if x.size <= limit:
        return [x]
    flat = x.reshape(-1)
    return [flat[start : start + limit] for start in range(0, x.size, limit)]


def _counts(sizes: Sequence[int] | None, mine: int, group: Group) -> list[int]:
    if sizes is None:
        return [mine] * group.size
    if sizes[group.rank] != mine:
        raise ValueError(f"rank {group.rank} has {mine} rows, sizes say {sizes[group.rank]}")
    return list(sizes)


def _front(x: np.ndarray, axis: int) -> np.ndarray:
    """`x` in C order with `axis` first, so that a rank's block is one run of memory."""
    return np.ascontiguousarray(np.moveaxis(x, axis, 0))


def _back(rows: np.ndarray, axis: int) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(rows, 0, axis))


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
    collective: Callable[[np.ndarray, list[int]], np.ndarray],
    rows: np.ndarray,
    whole: np.ndarray,
    counts: list[int],
    limit: int,
) -> None:
    """Run a gathering `collective` piece by piece and put what it joins into its places in
    `whole` (which is empty where the collective returns nothing)."""
    width = math.prod(rows.shape[1:])
    mine = rows.reshape(len(rows), width)
    target = whole.reshape(len(whole), width)
    starts = np.cumsum([0, *counts[:-1]])
    for start, stop, columns in _pieces(counts, width, limit):
        parts = [min(max(count - start, 0), stop - start) for count in counts]
        joined = collective(mine[start:stop, columns], parts)
        if not len(joined):
            continue
        if len(joined) == len(target) and joined.shape[1] == width:
            target[...] = joined
            continue
        offset = 0
        for first, n in zip(starts, parts, strict=True):
            target[first + start : first + start + n, columns] = joined[offset : offset + n]
            offset += n
