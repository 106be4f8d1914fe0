"""GLM-4.5 and 4.6 (arXiv 2508.06471): DeepSeek-V3's experts, and half of each head rotated."""

from __future__ import annotations

from mpishard.config.families.deepseek_v3 import DEEPSEEK_V3_EXPERTS
from mpishard.config.families.family import Family, MoEFamily

GLM4_MOE = Family(
    architecture="Glm4MoeForCausalLM",
    name="glm4_moe",
    max_position_embeddings=131072,
    kv_heads=8,
    norm_eps=1e-5,
    o_bias=False,
    qk_norm=None,
    partial_rotary_factor=0.5,
    moe=MoEFamily(
        dense="the first",
        first_dense=1,
        scoring="sigmoid",
        normalized_default=True,
        choice="noaux_tc",
        groups=(1, 1),
        scaling=1.0,
        shared="n_shared_experts",
        shared_count=1,
        names=DEEPSEEK_V3_EXPERTS,
    ),
    ignored=frozenset({"num_nextn_predict_layers", "num_mtp_layers"}),
)
