"""ERNIE 4.5 (Baidu, 2025): neighbours are rotated, and one field decides about all biases."""

from __future__ import annotations

from mpishard.config.families.family import Family

ERNIE4_5 = Family(
    architecture="Ernie4_5ForCausalLM",
    name="ernie4_5",
    max_position_embeddings=131072,
    kv_heads=2,
    head_dim=128,
    bos_id=1,
    eos_id=2,
    norm_eps=1e-5,
    tied=True,
    qkv_bias_field="use_bias",
    theta=500000.0,
    rope_interleaved_pairs=True,
    mlp_bias=None,
    mlp_bias_field="use_bias",
    fixed={"compression_ratio": 1.0, "use_rmsnorm": True},
    ignored=frozenset({"auto_map"}),
)
