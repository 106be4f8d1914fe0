"""Hunyuan-A13B (Tencent): Hunyuan with experts and one that every token goes to."""

from __future__ import annotations

from dataclasses import replace

from mpishard.config.families.family import MoEFamily
from mpishard.config.families.hunyuan_v1_dense import HUNYUAN_V1_DENSE
from mpishard.config.model_config import ExpertNames, PerExpertNames, StackedNames

HUNYUAN_V1_MOE = replace(
    HUNYUAN_V1_DENSE,
    architecture="HunYuanMoEV1ForCausalLM",
    name="hunyuan_v1_moe",
    aliases=("hunyuan",),
    uniform=frozenset({"moe_topk", "num_experts", "moe_intermediate_size", "num_shared_expert"}),
    moe=MoEFamily(
        ffn="intermediate_size",
        normalized=True,
        shared="intermediate_size",
        names=ExpertNames(
            separate=PerExpertNames(router="mlp.gate.wg.weight"),
            stacked=StackedNames(router="mlp.gate.wg.weight"),
            shared="mlp.shared_mlp",
        ),
    ),
    fixed=HUNYUAN_V1_DENSE.fixed
    | {
        "norm_topk_prob": True,
        "num_shared_expert": 1,
        "routed_scaling_factor": 1.0,
        "use_mixed_mlp_moe": True,
    },
    same={"moe_intermediate_size": "intermediate_size"},
)
