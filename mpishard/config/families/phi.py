"""Phi-1, 1.5 and 2 (arXiv 2309.05463): attention and feed-forward network side by side after one
norm, with a bias everywhere, also on the head."""

from __future__ import annotations

from dataclasses import replace

from mpishard.config.families.family import Family
from mpishard.config.fields import Fields
from mpishard.config.model_config import LayerNormNames
from mpishard.config.stored_names import StoredNames


def _variant(fields: Fields) -> Family:
    return replace(PHI, qk_norm=fields.flag("qk_layernorm", False))


PHI = Family(
    architecture="PhiForCausalLM",
    name="phi",
    spellings={"rms_norm_eps": ("layer_norm_eps",)},
    variant=_variant,
    forms="norms of each head of q and k, if a field says so",
    max_position_embeddings=2048,
    bos_id=1,
    eos_id=2,
    norm_eps=1e-5,
    qkv_bias=True,
    partial_rotary_factor=0.5,
    mlp_bias=True,
    gated_mlp=False,
    activation="gelu_new",
    layer_norm=True,
    norm_bias=True,
    norms=LayerNormNames(ffn=None),
    parallel_residual=True,
    head_bias=True,
    stored_names=StoredNames(
        modules={
            "model.norm": "final_layernorm",
            "self_attn.q_norm": "self_attn.q_layernorm",
            "self_attn.k_norm": "self_attn.k_layernorm",
            "self_attn.o_proj": "self_attn.dense",
            "mlp.up_proj": "mlp.fc1",
            "mlp.down_proj": "mlp.fc2",
        },
    ),
    ignored=frozenset({"auto_map"}),
)
