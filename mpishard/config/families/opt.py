"""OPT (arXiv 2205.01068): learned positions, of which the first two rows are not used."""

from __future__ import annotations

from dataclasses import replace

from mpishard.config.families.family import Family
from mpishard.config.fields import Fields
from mpishard.config.stored_names import StoredNames


def _variant(fields: Fields) -> Family:
    fields.only("do_layer_norm_before", True)
    fields.only("_remove_final_layer_norm", False)
    fields.only("word_embed_proj_dim", fields.integer("hidden_size"))
    has_affine = fields.flag("layer_norm_elementwise_affine", True)
    return replace(OPT, norm_weight=has_affine, norm_bias=has_affine)


OPT = Family(
    architecture="OPTForCausalLM",
    name="opt",
    spellings={"intermediate_size": ("ffn_dim",), "hidden_act": ("activation_function",)},
    variant=_variant,
    forms="norms without weight and bias, if a field says so",
    max_position_embeddings=2048,
    bos_id=2,
    eos_id=2,
    norm_eps=1e-5,
    tied=True,
    heads_fill_hidden=True,
    qkv_bias_field="enable_bias",
    qkv_bias_default=True,
    positions="learned",
    position_offset=2,
    mlp_bias=None,
    mlp_bias_field="enable_bias",
    mlp_bias_default=True,
    gated_mlp=False,
    activation="relu",
    layer_norm=True,
    norm_bias=True,
    stored_names=StoredNames(
        prefixes=("model.decoder.", "decoder."),
        modules={
            "model.norm": "final_layer_norm",
            "input_layernorm": "self_attn_layer_norm",
            "post_attention_layernorm": "final_layer_norm",
            "self_attn.o_proj": "self_attn.out_proj",
            "mlp.up_proj": "fc1",
            "mlp.down_proj": "fc2",
        },
    ),
    ignored=frozenset({"dropout", "layerdrop", "init_std", "activation_dropout"}),
)
