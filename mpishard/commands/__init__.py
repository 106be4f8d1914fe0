"""The commands, one module each: `add_arguments` says what may be typed, `run` does it.

Results go to standard output or the output file, everything else to standard error, from one rank
only. These modules load NumPy; the command line imports them once the number of threads is set.
"""

from __future__ import annotations

from types import ModuleType

from mpishard.commands import batch, bench, eplb, generate, inspect, logits, shard

COMMANDS: dict[str, ModuleType] = {
    "shard": shard,
    "inspect": inspect,
    "generate": generate,
    "batch": batch,
    "logits": logits,
    "bench": bench,
    "eplb": eplb,
}
