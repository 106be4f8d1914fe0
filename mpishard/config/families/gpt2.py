"""GPT-2 (Radford et al. 2019): learned positions, and matrices stored as (inputs, outputs)."""

from __future__ import annotations

from dataclasses import replace

from mpishard.config.families.family import Family
from mpishard.config.fields import Fields
from mpishard.config.stored_names import StoredNames

# The names that OpenAI's code gave to the sizes, as GPT-J, StarCoder and others have them, too.
GPT_SPELLINGS = {
    "hidden_size": ("n_embd", "hidden_size"),
    "num_hidden_layers": ("n_layer", "num_hidden_layers"),
    "num_attention_heads": ("n_head", "num_attention_heads"),
    "max_position_embeddings": ("n_positions", "max_position_embeddings"),
    "intermediate_size": ("n_inner",),
    "hidden_act": ("activation_function",),
    "rms_norm_eps": ("layer_norm_epsilon",),
}

# What GPT-2's other tasks, training and choice of kernels need.
GPT_IGNORED = frozenset(
    """
    n_ctx reorder_and_upcast_attn rotary summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj
    """.split()
)

GPT_MODULES = {
    "model.embed_tokens": "wte",
    "model.embed_positions": "wpe",
    "model.norm": "ln_f",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}


def _variant(fields: Fields) -> Family:
    scaled = fields.flag("scale_attn_weights", True)
    return replace(
        GPT2,
        attention_scale=None if scaled else 1.0,
        inverse_layer_scale=fields.flag("scale_attn_by_inverse_layer_idx", False),
    )


GPT2 = Family(
    architecture="GPT2LMHeadModel",
    name="gpt2",
    spellings=GPT_SPELLINGS,
    variant=_variant,
    forms="scores not scaled, or divided by the number of the layer",
    max_position_embeddings=1024,
    bos_id=50256,
    eos_id=50256,
    norm_eps=1e-5,
    tied=True,
    heads_fill_hidden=True,
    qkv_bias=True,
    positions="learned",
    mlp_bias=True,
    gated_mlp=False,
    ffn_multiple=4,
    activation="gelu_new",
    layer_norm=True,
    norm_bias=True,
    stored_names=StoredNames(
        prefixes=("transformer.", ""),
        layers="h",
        modules=GPT_MODULES,
        qkv="attn.c_attn",
        transposed=True,
        buffers=(".attn.bias", ".attn.masked_bias"),
    ),
    ignored=GPT_IGNORED,
)
