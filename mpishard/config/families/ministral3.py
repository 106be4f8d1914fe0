"""Ministral 3 and Devstral 2 (Mistral AI): queries grow with their position."""

from __future__ import annotations

from mpishard.config.families.family import Family

MINISTRAL3 = Family(
    architecture="Ministral3ForCausalLM",
    name="ministral3",
    max_position_embeddings=262144,
    kv_heads=8,
    head_dim=128,
    norm_eps=1e-5,
    qkv_bias=False,
    o_bias=False,
    sliding="everywhere",
    window=None,
    rope={
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
    query_scale=True,
    bos_id=1,
    eos_id=2,
)
