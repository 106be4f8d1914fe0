"""SmolLM3 (Hugging Face): no rotary embedding in every fourth layer (NoPE: arXiv 2305.19466)."""

from __future__ import annotations

from mpishard.config.families.family import Family

SMOLLM3 = Family(
    architecture="SmolLM3ForCausalLM",
    name="smollm3",
    max_position_embeddings=32768,
    kv_heads=4,
    bos_id=128000,
    eos_id=128001,
    tied=True,
    mlp_bias=None,
    sliding="without rope by a switch",
    window=None,
    theta=2e6,
    rope_layers="no_rope_layers",
    nth=4,
)
