"""Gemma 3 (arXiv 2503.19786), text: Gemma 2 with norms of q and k instead of soft caps, and rotary
embeddings of their own in the layers with a sliding window, which are five of six."""

from __future__ import annotations

from mpishard.config.families.family import Family
from mpishard.config.families.gemma2 import GEMMA_NORMS

GEMMA3 = Family(
    architecture="Gemma3ForCausalLM",
    name="gemma3_text",
    max_position_embeddings=131072,
    kv_heads=4,
    head_dim=256,
    bos_id=2,
    eos_id=1,
    tied=True,
    qk_norm=True,
    sliding="all but every nth",
    nth=6,
    nth_field="sliding_window_pattern",
    needs_window=True,
    theta=1e6,
    sliding_theta=10000.0,
    sliding_theta_field="rope_local_base_freq",
    activation_field="hidden_activation",
    activation="gelu_pytorch_tanh",
    norm_offset=1.0,
    norms=GEMMA_NORMS,
    scaled_embedding=True,
    caps={"final_logit_softcapping": None},
    query_pre_attn_scalar=256,
    # transformers writes _sliding_window_pattern beside layer_types, and does not read it.
    ignored=frozenset({"hidden_act", "cache_implementation", "_sliding_window_pattern"}),
)
