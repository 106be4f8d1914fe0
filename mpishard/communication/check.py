"""The check of collectives: before each one the ranks of its group compare what they are about to
do, so that a mistake is named where it is made, instead of hanging or mixing up their data.

`check_collective` is a collective of its own on the same communicator. Every other one of the group
is preceded by it, so that a rank in one collective and a rank in another meet here and find out.
What is compared: the operation, what all ranks must agree upon (elements, type, lengths of blocks),
how many collectives of the group there were, and the line that calls; then, of operations in which
each pair of ranks has its own, that what one sends is what the other expects.

The line is what tells a rank that has left out one collective and now makes the next of the same
kind and size. This package makes every collective from one line on all ranks of a group; so must
whoever calls `mpishard.communication.collectives` under this check.

A rank that ends, or goes on in another group, never comes here; then this waits like any
collective, which is for the watchdog to notice (`mpishard.runtime.watchdog`). After
torch.distributed's ``TORCH_DISTRIBUTED_DEBUG=DETAIL``, which compares shapes in the same place."""

from __future__ import annotations

import json
import sys
from collections import Counter
from hashlib import blake2b
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from mpishard.communication.group import CollectiveCall, Group
from mpishard.errors import CollectiveMismatch

DIGEST_BYTES = 16
LONGEST = 200  # characters of a description that are printed

PACKAGE = Path(__file__).parents[1]


def check_collective(call: CollectiveCall) -> None:
    """Raises Mismatch, on all ranks of the group, unless all are about to make the same call."""
    group = call.group
    facts = [next(group.checked) + 1, str(call), source_line(caller(sys._getframe()))]
    digest = blake2b(json.dumps(facts).encode(), digest_size=DIGEST_BYTES).digest()
    digests = bytearray(DIGEST_BYTES * group.size)
    group.comm.Allgather(digest, digests)
    if digests != digest * group.size:
        raise CollectiveMismatch(_difference(_gather_json(facts, group), group))
    if call.peer_counts is not None:
        everyones = _gather_json([sorted(side.items()) for side in call.peer_counts()], group)
        if problem := _misfit(everyones, group):
            raise CollectiveMismatch(f"{call.operation}, on all ranks at {facts[2]}: {problem}")


def caller(frame: FrameType) -> FrameType:
    """The frame outside of this folder, at or above `frame`, that called into it."""
    while frame.f_globals.get("__name__", "").startswith(__package__) and frame.f_back:
        frame = frame.f_back
    return frame


def source_line(frame: FrameType, line: int | None = None) -> str:
    """The file of a frame, short where it is of this package, and the line it has come to."""
    path = Path(frame.f_code.co_filename)
    if path.is_relative_to(PACKAGE):
        path = path.relative_to(PACKAGE.parent)
    return f"{path}:{line or frame.f_lineno}"


def _difference(everyones: list[list[Any]], group: Group) -> str:
    """How the first rank that differs from the most common facts does so."""
    keys = [json.dumps(facts) for facts in everyones]
    usual, _ = Counter(keys).most_common(1)[0]
    one = keys.index(usual)
    other = next(rank for rank, key in enumerate(keys) if key != usual)
    both = [_sentence(everyones[rank], group.to_world_rank(rank)) for rank in (one, other)]
    return f"the ranks of {group.name} do not make the same collective: {', but '.join(both)}"


def _sentence(facts: list[Any], rank: int) -> str:
    number, what, where = facts
    return f"rank {rank} makes {_shortened(what)} (number {number} of the group, at {where})"


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _misfit(everyones: list[Any], group: Group) -> str | None:
    """The first pair of ranks of which the second does not expect what the first sends."""
    nothing = (0, "")
    sent, expected = [
        [
            {rank: (size, dtype) for rank, (size, dtype) in sides[side] if size}
            for sides in everyones
        ]
        for side in (0, 1)
    ]
    for one, other in product(range(group.size), repeat=2):
        sends, expects = sent[one].get(other, nothing), expected[other].get(one, nothing)
        if sends != expects:
            return (
                f"rank {group.to_world_rank(one)} sends {_parcel(sends)} "
                f"to rank {group.to_world_rank(other)}, "
                f"which expects {_parcel(expects)}"
            )
    return None


def _parcel(parcel: tuple[int, str]) -> str:
    size, dtype = parcel
    return f"{size} {dtype}" if size else "nothing"


def _gather_json(value: Any, group: Group) -> list[Any]:
    """Every rank's value, in the order of the ranks."""
    mine = json.dumps(value).encode()
    lengths = np.empty(group.size, np.int64)
    group.comm.Allgather(np.array(len(mine), np.int64), lengths)
    everyones = bytearray(int(lengths.sum()))
    group.comm.Allgatherv(mine, [everyones, lengths.tolist()])
    stops = np.cumsum(lengths).tolist()
    starts = [0, *stops[:-1]]
    return [json.loads(everyones[a:b]) for a, b in zip(starts, stops, strict=True)]
