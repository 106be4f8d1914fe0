"""Numbers that leave the range of their type on the way: noted, and told in one sentence at the end
where NumPy would write a warning, with the path of a source file, for each line of code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

KINDS = ("overflow", "invalid value", "divide by zero")


class FloatingPointLog:
    """What has happened on this rank, of `KINDS`."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def __call__(self, kind: str, flag: int) -> None:
        """Called by NumPy when something happens."""
        self.seen.add(next((known for known in KINDS if known.startswith(kind[:6])), kind))


@contextmanager
def noted() -> Iterator[FloatingPointLog]:
    """Within, NumPy notes what happens to numbers, in the log, and warns of nothing."""
    log = FloatingPointLog()
    with np.errstate(over="call", invalid="call", divide="call", call=log):
        yield log


def seen_here() -> np.ndarray:
    """1 for each of `KINDS` that the innermost log of this thread has seen, else 0."""
    log = np.geterrcall()
    seen = log.seen if isinstance(log, FloatingPointLog) else set()
    return np.array([kind in seen for kind in KINDS], np.int64)
