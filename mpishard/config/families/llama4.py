"""Llama 4 (Meta, 2025), text: attention within chunks in layers with rope, no rope and queries that
grow with their position in the others, and experts whose inputs are scaled."""

from __future__ import annotations

from mpishard.config.families.family import Family, MoEFamily
from mpishard.config.model_config import ExpertNames, StackedNames
from mpishard.config.stored_names import StoredNames

LLAMA4 = Family(
    architecture="Llama4ForCausalLM",
    name="llama4_text",
    max_position_embeddings=131072,
    kv_heads=8,
    head_dim=128,
    bos_id=1,
    eos_id=2,
    norm_eps=1e-5,
    qk_l2_norm=True,
    theta=500000.0,
    rope_interleaved_pairs=True,
    rope_layers="no_rope_layers",
    nth=4,
    chunk=8192,
    temperature=True,
    ffn_field="intermediate_size_mlp",
    ffn=16384,
    moe=MoEFamily(
        ffn="intermediate_size",
        dense="interleaved",
        scoring="sigmoid",
        normalized=False,
        scale_inputs=True,
        shared="intermediate_size",
        names=ExpertNames(
            separate=None,
            stacked=StackedNames(
                router="feed_forward.router.weight",
                gate_up="feed_forward.experts.gate_up_proj",
                down="feed_forward.experts.down_proj",
                transposed=True,
            ),
            shared="feed_forward.shared_expert",
        ),
    ),
    stored_names=StoredNames(
        modules={f"mlp.{part}_proj": f"feed_forward.{part}_proj" for part in ("gate", "up", "down")}
    ),
)
