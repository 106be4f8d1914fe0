"""Mistral 7B (arXiv 2310.06825): a sliding window in every layer."""

from __future__ import annotations

from mpishard.config.families.family import Family

MISTRAL = Family(
    architecture="MistralForCausalLM",
    name="mistral",
    max_position_embeddings=131072,
    kv_heads=8,
    qkv_bias=False,
    o_bias=False,
    sliding="everywhere",
    bos_id=1,
    eos_id=2,
)
