"""GLM-4-0414 (Zhipu AI): GLM with norms after each sub-layer as well."""

from __future__ import annotations

from dataclasses import replace

from mpishard.config.families.glm import GLM
from mpishard.config.model_config import LayerNormNames

GLM4 = replace(
    GLM,
    architecture="Glm4ForCausalLM",
    name="glm4",
    norms=LayerNormNames(attention_post="post_self_attn_layernorm", ffn_post="post_mlp_layernorm"),
)
