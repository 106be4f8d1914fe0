"""Gemma 2 (arXiv 2408.00118): norms before and after each sub-layer, soft-capped scores and logits,
and a sliding window in every second layer."""

from __future__ import annotations

from mpishard.config.families.family import Family
from mpishard.config.model_config import LayerNormNames

GEMMA_NORMS = LayerNormNames(
    attention_post="post_attention_layernorm",
    ffn="pre_feedforward_layernorm",
    ffn_post="post_feedforward_layernorm",
)

GEMMA2 = Family(
    architecture="Gemma2ForCausalLM",
    name="gemma2",
    max_position_embeddings=8192,
    kv_heads=4,
    head_dim=256,
    bos_id=2,
    eos_id=1,
    tied=True,
    sliding="alternating",
    needs_window=True,
    activation_field="hidden_activation",
    activation="gelu_pytorch_tanh",
    norm_offset=1.0,
    norms=GEMMA_NORMS,
    scaled_embedding=True,
    caps={"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    query_pre_attn_scalar=256,
    # transformers computes the same whatever hidden_act says.
    ignored=frozenset({"hidden_act", "cache_implementation"}),
)
