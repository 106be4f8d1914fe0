"""The C library's allocator, told to keep what the process frees.

A step makes and frees arrays of some megabytes by the hundred. glibc hands such memory back to the
system when it is freed, and every page of it that is asked for again comes as a fault and full of
zeros: a tenth of a prompt's time on a model of 207 million parameters.
"""

from __future__ import annotations

import ctypes
import sys

# Arrays above are mapped one by one, and their pages given back: the most that glibc 2.34 and older
# can be asked for.
MAPPED_ABOVE = 32 * 2**20
# Free bytes at the end of the heap that are kept.
KEPT = 256 * 2**20

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """From now on this process keeps up to `KEPT` bytes that it frees, for arrays of up to
    `MAPPED_ABOVE`. Does nothing where the C library is not glibc."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MAPPED_ABOVE)
        mallopt(_M_TRIM_THRESHOLD, KEPT)
