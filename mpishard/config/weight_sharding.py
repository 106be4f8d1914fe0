"""How the weights are sharded: arithmetic alone, no MPI.

Tensor parallelism shards the dense weights, expert parallelism the experts; each of them over all
ranks of a replica or over some. Ranks that would hold the same part of both share a shard, which is
a file:

=====  =====================  ============================  =======================
shard  ``tp=4, ep=2``         ``tp=2, ep=4``                ``tp=1, ep=1``, 2 ranks
=====  =====================  ============================  =======================
0      tp 0, experts 0, left  tp 0, the first quarter       all experts, left
1      tp 1, experts 0, right tp 1, the second quarter      all experts, right
2      tp 2, experts 1, left  tp 0, the third quarter
3      tp 3, experts 1, right tp 1, the last quarter
=====  =====================  ============================  =======================

where "left" and "right" are halves of the width of each expert. The table is for two experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import lcm

from mpishard.config.expert_placement import ExpertPlacement


@dataclass(frozen=True)
class WeightSharding:
    """The weights in `ranks` different shards. The default is the least number that both `tp` and
    `ep` divide; there are more if context-parallel ranks, too, shard the width of experts.

    Shard `index` has the dense weights of tensor-parallel rank ``index % tp``. For the experts, the
    shards form `ep` groups of consecutive shards. A group has a block of the experts, and its
    shards have parts of the width of each. Under a `placement` a group has the experts that this
    lists instead; files always hold blocks.
    """

    tp: int = 1
    ep: int = 1
    ranks: int = 0
    placement: ExpertPlacement | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.ranks:
            object.__setattr__(self, "ranks", lcm(self.tp, self.ep))  # frozen only for others

    @property
    def etp(self) -> int:
        """Expert tensor parallelism: the number of shards that share the width of an expert."""
        return max(1, self.ranks // self.ep)

    def tp_rank(self, index: int) -> int:
        """The part of the dense weights that is in shard `index`."""
        return index % self.tp

    def ep_rank(self, index: int) -> int:
        """The block of experts that is in shard `index`."""
        return index // self.etp

    def etp_rank(self, index: int) -> int:
        """The part of the width of these experts that is in shard `index`."""
        return index % self.etp

    def replicas(self, layer: int, expert: int) -> int:
        """The number of groups that hold an expert of a layer."""
        return 1 if self.placement is None else self.placement.replicas(layer, expert)

    def __str__(self) -> str:
        experts = f" --ep {self.ep}" if self.ep > 1 else ""
        context = f" --cp {self.ranks // self.tp}" if self.ranks != lcm(self.tp, self.ep) else ""
        return f"--tp {self.tp}{context}{experts}"
