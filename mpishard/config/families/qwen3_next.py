"""Qwen3-Next: gated delta nets (arXiv 2412.06464) in three of four layers, gated attention with a
partial rotation in the others, and a shared expert with a gate beside the routed ones."""

from __future__ import annotations

from mpishard.config.families.family import Family, MoEFamily
from mpishard.config.model_config import ExpertNames
from mpishard.config.stored_names import StoredNames

QWEN3_NEXT = Family(
    architecture="Qwen3NextForCausalLM",
    name="qwen3_next",
    max_position_embeddings=32768,
    kv_heads=2,
    head_dim=256,
    qk_norm=True,
    norm_offset=1.0,
    output_gate=True,
    linear_attention=True,
    partial_rotary_factor=0.25,
    stored_names=StoredNames(unused=("mtp.",)),
    moe=MoEFamily(
        dense="by step",
        normalized_default=True,
        shared="shared_expert_intermediate_size",
        names=ExpertNames(shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate.weight"),
    ),
)
