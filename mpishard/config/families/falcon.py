"""Falcon (arXiv 2311.16867), in three forms: the 1B models, one block after the other with ALiBi;
the 7B model, side by side after one norm, with one key/value head; and the 40B and 180B models,
side by side after two norms, with several key/value heads."""

from __future__ import annotations

from dataclasses import replace

from mpishard.config.families.family import Family
from mpishard.config.fields import Fields
from mpishard.config.model_config import LayerNormNames
from mpishard.config.stored_names import StoredNames

_MODULES = {
    "model.embed_tokens": "word_embeddings",
    "model.norm": "ln_f",
    "self_attn.o_proj": "self_attention.dense",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}
_TWO_NORMS = {"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"}


def _variant(fields: Fields) -> Family:
    is_new = fields.flag("new_decoder_architecture", False)
    is_parallel = fields.flag("parallel_attn", True)
    if is_new and not is_parallel:
        fields.refuse("parallel_attn", "contradicts new_decoder_architecture = true")
    kv_heads = fields.optional_integer("num_kv_heads")
    if not is_new:
        kv_heads = 1 if fields.flag("multi_query", True) else None
    fields.asked |= {"multi_query", "num_ln_in_parallel_attn"}
    norms = LayerNormNames()
    modules = _MODULES
    if is_parallel:
        count = fields.integer("num_ln_in_parallel_attn", 2 if is_new else 1)
        if count > (2 if is_new else 1):
            fields.refuse("num_ln_in_parallel_attn", "must be 1, or 2 for the new architecture")
        norms = LayerNormNames() if count == 2 else LayerNormNames(ffn=None)
        modules = _MODULES | _TWO_NORMS if count == 2 else _MODULES
    return replace(
        FALCON,
        kv_heads=kv_heads,
        parallel_residual=is_parallel,
        norms=norms,
        positions="alibi in bfloat16" if fields.flag("alibi", False) else "rope",
        stored_names=replace(FALCON.stored_names, modules=modules),
    )


FALCON = Family(
    architecture="FalconForCausalLM",
    name="falcon",
    spellings={
        "hidden_size": ("hidden_size", "n_embed"),
        "num_hidden_layers": ("num_hidden_layers", "n_layer"),
        "num_attention_heads": ("num_attention_heads", "n_head"),
        "intermediate_size": ("ffn_hidden_size",),
        "hidden_act": ("activation",),
        "rms_norm_eps": ("layer_norm_epsilon",),
    },
    variant=_variant,
    forms=(
        "a parallel residual with one norm or two, or none; one key/value head, several, or as "
        "many as query heads; ALiBi"
    ),
    max_position_embeddings=2048,
    bos_id=11,
    eos_id=11,
    norm_eps=1e-5,
    tied=True,
    heads_fill_hidden=True,
    qkv_bias_field="bias",
    mlp_bias=None,
    mlp_bias_field="bias",
    gated_mlp=False,
    ffn_multiple=4,
    activation="gelu",
    layer_norm=True,
    norm_bias=True,
    stored_names=StoredNames(
        prefixes=("transformer.",),
        layers="h",
        modules=_MODULES,
        qkv="self_attention.query_key_value",
        qkv_by_kv_head=True,
    ),
    ignored=frozenset({"auto_map", "ff_factor"}),
    fixed={"apply_residual_connection_post_layernorm": False},
)
