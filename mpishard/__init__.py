"""mpishard: every parallelism of LLM inference, in NumPy over MPI.

The key to the names of arrays, everywhere in the package. An array's name ends in its dimensions:

=  ===============================================  =  =============================================
W  tokens of a step on all ranks of ``cp``          D  model width, of the residual stream
N  tokens of a step on this ``cp`` rank             H  query heads
M  tokens whose logits are wanted                   G  key/value heads
S  positions of one sequence in this step           K  width of a key, and of its queries
T  positions of one sequence in a block of keys     Y  width of a value, as attention sees it
P  (token, query head) pairs                        J  RoPE pairs of a head
V  vocabulary                                       F  feed-forward width
C  candidates for the next token                    E  experts of a layer
A  experts of a token                               Z  physical experts of a layer
B  (token, expert) pairs                            R  ranks of a group
I  inputs of a weight                               O  outputs of a weight
U  width of an MLA key without RoPE                 Q  width of MLA's latent of queries
L  layers                                           X  any other, which a comment names
=  ===============================================  =  =============================================

and a digit is an axis of that length. Upper case is the whole dimension, lower case this rank's
shard of it. Two rules follow:

1. A product that sums a lower-case letter away is a partial sum, and is called ``partial_…`` until
   a collective completes it.
2. Only a collective turns a lower-case letter into an upper-case one.

What is whole depends on where one stands. A ``cp`` rank has its own N tokens of each step: to the
``tp`` ranks that share them, N is whole and n a shard. Only `mpishard.parallel.context` and
`mpishard.parallel.flash_decoding` look across ``cp`` ranks, and there the whole is W.

In Python: `load`, and the `Model` that it returns, whose `generate`, `batch` and `logits` do what
the commands of the same names do; `Watchdog` ends a job that hangs, and says where.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = [
    *("Completion", "Model", "LogitsOutput", "SamplingParams", "UserError", "Watchdog", "load"),
]

# Imported when asked for: the command line sets the number of threads before NumPy is loaded.
_HOMES = {
    "Completion": "mpishard.completions",
    "Model": "mpishard.api",
    "LogitsOutput": "mpishard.scoring",
    "SamplingParams": "mpishard.engine.sampling_params",
    "UserError": "mpishard.errors",
    "Watchdog": "mpishard.runtime.watchdog",
    "load": "mpishard.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mpishard' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
