"""OLMo 2 (arXiv 2501.00656): norms after the sub-layers instead of before them, and one over all
heads of q and of k together."""

from __future__ import annotations

from mpishard.config.families.family import Family
from mpishard.config.model_config import LayerNormNames

NORMS_AFTER = LayerNormNames(
    attention=None,
    attention_post="post_attention_layernorm",
    ffn=None,
    ffn_post="post_feedforward_layernorm",
)

OLMO2 = Family(
    architecture="Olmo2ForCausalLM",
    name="olmo2",
    max_position_embeddings=2048,
    eos_id=50279,
    norm_eps=1e-5,
    full_width_qk_norm=True,
    norms=NORMS_AFTER,
)
