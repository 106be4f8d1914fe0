"""GLM-4-9B (arXiv 2406.12793): neighbours in the first half of each head are rotated; gate and up
are in one tensor."""

from __future__ import annotations

from mpishard.config.families.family import Family
from mpishard.config.stored_names import StoredNames

GLM = Family(
    architecture="GlmForCausalLM",
    name="glm",
    max_position_embeddings=131072,
    kv_heads=2,
    head_dim=128,
    eos_id=(151329, 151336, 151338),
    norm_eps=1.5625e-07,
    qkv_bias_default=True,
    o_bias=False,
    rope_interleaved_pairs=True,
    partial_rotary_factor=0.5,
    stored_names=StoredNames(gate_up="mlp.gate_up_proj"),
)
