"""Qwen3 (arXiv 2505.09388): a norm over each head of q and k."""

from __future__ import annotations

from mpishard.config.families.family import Family

QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    name="qwen3",
    max_position_embeddings=32768,
    kv_heads=32,
    head_dim=128,
    qk_norm=True,
    sliding="from a layer",
)
