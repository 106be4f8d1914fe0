"""How fast a model runs in its layout, in how much memory, and how fast this machine would let it.

Speeds and limits are measured in the same process and in turn, on all ranks at the same time:

prompt       B prompts of random tokens in one step, to the choice of each one's next token
product      after each: flops of ``x @ w.T`` in a second, with weights of the model's own shapes
generation   steps that feed one token to each of B sequences, to the choice of the next (greedy)
bandwidth    after each: bytes of large matrices that matrix-vector products read in a second

The first limit printed beside each speed is that of the weights (`mpishard.bench.counts`): it is
the whole of it where contexts are short. The second counts attention as well. Norms, softmax and
communication make the distance to it.
"""

from mpishard.bench.report import table
from mpishard.bench.rounds import measure

__all__ = ["measure", "table"]
