"""Qwen1.5-MoE and Qwen2-MoE (arXiv 2407.10671): a shared expert with a gate of its own."""

from __future__ import annotations

from mpishard.config.families.family import Family, MoEFamily
from mpishard.config.model_config import ExpertNames

QWEN2_MOE = Family(
    architecture="Qwen2MoeForCausalLM",
    name="qwen2_moe",
    max_position_embeddings=32768,
    kv_heads=16,
    qkv_bias_field="qkv_bias",
    qkv_bias_default=True,
    o_bias=False,
    sliding="alternating before a layer",
    moe=MoEFamily(
        dense="by step",
        shared="shared_expert_intermediate_size",
        names=ExpertNames(shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate.weight"),
    ),
)
