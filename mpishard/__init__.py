"""mpishard: every parallelism of LLM inference, in NumPy over MPI.

The key to the names of arrays, everywhere in the package. An array's name ends in its dimensions:

====  ==============================  ====  ===================================
W     tokens of the step, packed      D     model width (residual stream)
N     those of them that this rank    H     query heads
      of context parallelism has      G     key/value heads
M     tokens whose logits are wanted  K     width of a head
S     positions of one sequence       J     K / 2, the pairs of a head
      in this step                    F     feed-forward width
T     positions of one sequence       V     vocabulary
      in the cache                    C     candidates for the next token
P     (token, head) pairs             R     ranks of a group
E     experts of a layer              A     experts of a token
Z     slots with an expert in each    L     layers
1     an axis of length 1
====  ==============================  ====  ===================================

Upper case is the whole dimension, lower case this rank's shard of it, and two rules follow:

1. A product that sums a lower-case letter away is a partial sum, and is called ``partial_…`` until
   a collective completes it.
2. Only a collective turns a lower-case letter into an upper-case one.

In Python: `load`, and the `Model` that it returns, whose `generate`, `batch` and `logits` do what
the commands of the same names do; `Watchdog` ends a job that hangs, and says where.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = [
    *("Completion", "Model", "Sampling", "LogitsOutput", "UserError", "Watchdog", "Wishes", "load"),
]

# Imported when asked for: the command line sets the number of threads before NumPy is loaded.
_HOMES = {
    "Completion": "mpishard.api",
    "Model": "mpishard.api",
    "Sampling": "mpishard.engine.sampling",
    "LogitsOutput": "mpishard.api",
    "UserError": "mpishard.errors",
    "Watchdog": "mpishard.runtime.watchdog",
    "Wishes": "mpishard.batch.requests",
    "load": "mpishard.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mpishard' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
