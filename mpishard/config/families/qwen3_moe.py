"""Qwen3-MoE (arXiv 2505.09388)."""

from __future__ import annotations

from mpishard.config.families.family import Family, MoEFamily

QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    name="qwen3_moe",
    max_position_embeddings=32768,
    kv_heads=4,
    qk_norm=True,
    sliding="everywhere by a switch",
    moe=MoEFamily(dense="by step"),
)
