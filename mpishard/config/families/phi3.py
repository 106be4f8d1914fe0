"""Phi-3, Phi-3.5 and Phi-4 (arXiv 2404.14219, 2412.08905, 2503.01743): q, k and v in one tensor and
gate and up in another; LongRoPE, and in Phi-4-mini a part of each head rotated."""

from __future__ import annotations

from mpishard.config.families.family import Family
from mpishard.config.stored_names import StoredNames

PHI3 = Family(
    architecture="Phi3ForCausalLM",
    name="phi3",
    max_position_embeddings=4096,
    bos_id=1,
    eos_id=32000,
    norm_eps=1e-5,
    qkv_bias=False,
    o_bias=False,
    sliding="everywhere",
    window=None,
    rope_types={"su": "longrope", "yarn": "longrope"},  # as transformers reads old files
    original_positions=4096,
    partial_rotary_factor=1.0,
    stored_names=StoredNames(qkv="self_attn.qkv_proj", gate_up="mlp.gate_up_proj"),
    fixed={"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False},
    ignored=frozenset({"auto_map"}),
)
