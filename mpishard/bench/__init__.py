"""How fast a model runs in its layout, in how much memory, and how fast this machine would let it.

Speeds and rooflines are measured in the same process and in turn, on all ranks at the same time:

prefill    B prompts of random tokens in one step, up to the choice of each one's next token
product    after each: flops of ``x @ w.T`` per second, with weights of the model's own shapes
decode     steps of one token for each of B sequences, up to the choice of the next one (greedy)
bandwidth  after each: bytes of large matrices that matrix-vector products read per second

The first roofline beside each speed is that of the weights (`mpishard.bench.roofline`), which is
all of it where contexts are short. The second counts attention as well. Norms, softmax and
communication make up the distance.
"""

from mpishard.bench.measurement import measure
from mpishard.bench.report import table

__all__ = ["measure", "table"]
