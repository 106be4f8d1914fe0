"""Seed-OSS (ByteDance): biases on q, k and v, and a field of its own for that on o."""

from __future__ import annotations

from mpishard.config.families.family import Family

SEED_OSS = Family(
    architecture="SeedOssForCausalLM",
    name="seed_oss",
    max_position_embeddings=524288,
    kv_heads=8,
    head_dim=128,
    bos_id=0,
    eos_id=2,
    qkv_bias_default=True,
    o_bias=False,
    o_bias_field="attention_out_bias",
    mlp_bias=None,
    ignored=frozenset({"residual_dropout"}),
)
