"""How the weights are cut into sets, of which each rank holds one: arithmetic alone, no MPI.

Dense weights are cut by tensor parallelism, experts by expert parallelism, each over all ranks of a
replica or over part of them. Ranks that would hold the same of both share a set, and a file:

=====  =====================  ============================  =======================
ranks  ``tp=4, ep=2``         ``tp=2, ep=4``                ``tp=1, ep=1``, 2 ranks
=====  =====================  ============================  =======================
0      tp 0, experts 0, left  tp 0, the first quarter       all experts, left
1      tp 1, experts 0, right tp 1, the second quarter      all experts, right
2      tp 2, experts 1, left  tp 0, the third quarter
3      tp 3, experts 1, right tp 1, the last quarter
=====  =====================  ============================  =======================

where left and right are halves of the width of each expert, here of two.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import lcm

from mpishard.config.expert_placement import ExpertPlacement


@dataclass(frozen=True)
class WeightSharding:
    """The weights in `ranks` sets that differ, the fewest that `tp` and `ep` divide unless given;
    more where context-parallel ranks, too, divide the width of experts.

    Set `index` has the dense weights of tensor-parallel rank ``index % tp``. As to the experts, the
    sets form `ep` groups of neighbours: a group has a block of the experts, and its members divide
    the width of each. With a `placement` a group has the experts that this says, in place of a
    block; shards are always cut in blocks.
    """

    tp: int = 1
    ep: int = 1
    ranks: int = 0
    placement: ExpertPlacement | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.ranks:
            object.__setattr__(self, "ranks", lcm(self.tp, self.ep))  # it is frozen to others

    @property
    def etp(self) -> int:
        """How many sets divide the width of an expert."""
        return max(1, self.ranks // self.ep)

    def tp_rank(self, index: int) -> int:
        """Which part of the dense weights set `index` has."""
        return index % self.tp

    def ep_rank(self, index: int) -> int:
        """Which block of the experts set `index` has."""
        return index // self.etp

    def etp_rank(self, index: int) -> int:
        """Which part of each of these experts set `index` has."""
        return index % self.etp

    def replicas(self, layer: int, expert: int) -> int:
        """How many groups have an expert of a layer."""
        return 1 if self.placement is None else self.placement.replicas(layer, expert)

    def __str__(self) -> str:
        experts = f" --ep {self.ep}" if self.ep > 1 else ""
        context = f" --cp {self.ranks // self.tp}" if self.ranks != lcm(self.tp, self.ep) else ""
        return f"--tp {self.tp}{context}{experts}"
