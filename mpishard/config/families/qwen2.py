"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): biases on q, k and v."""

from __future__ import annotations

from mpishard.config.families.family import Family

QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    name="qwen2",
    max_position_embeddings=32768,
    kv_heads=32,
    qkv_bias=True,
    o_bias=False,
    sliding="from a layer",
)
