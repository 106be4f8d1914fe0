"""StableLM (Stability AI 2023 and 2024, arXiv 2402.17834): llama with LayerNorm and a rotation of
part of each head; the 12B model has norms of each head and its blocks side by side."""

from __future__ import annotations

from dataclasses import replace

from mpishard.config.families.family import Family
from mpishard.config.fields import Fields
from mpishard.config.model_config import LayerNormNames
from mpishard.config.stored_names import StoredNames


def _variant(fields: Fields) -> Family:
    is_parallel = fields.flag("use_parallel_residual", False)
    return replace(
        STABLELM,
        parallel_residual=is_parallel,
        norms=LayerNormNames(ffn=None) if is_parallel else LayerNormNames(),
        per_head_norm=fields.flag("qk_layernorm", False),
    )


STABLELM = Family(
    architecture="StableLmForCausalLM",
    name="stablelm",
    spellings={"rms_norm_eps": ("layer_norm_eps",)},
    variant=_variant,
    forms="a parallel residual with one norm, norms with weights for each head",
    max_position_embeddings=4096,
    kv_heads=32,
    bos_id=0,
    eos_id=0,
    norm_eps=1e-5,
    heads_fill_hidden=True,
    qkv_bias_field="use_qkv_bias",
    o_bias=False,
    partial_rotary_factor=0.25,
    layer_norm=True,
    norm_bias=True,
    stored_names=StoredNames(
        each_head={
            "self_attn.q_norm": "self_attn.q_layernorm.norms.{}",
            "self_attn.k_norm": "self_attn.k_layernorm.norms.{}",
        }
    ),
    ignored=frozenset({"auto_map"}),
)
