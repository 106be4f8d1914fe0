"""MPT (MosaicML 2023): ALiBi in place of positions, and no bias anywhere."""

from __future__ import annotations

from dataclasses import replace

from mpishard.config.families.family import Family
from mpishard.config.fields import Fields
from mpishard.config.stored_names import StoredNames

# What transformers computes whatever the field says; another value asks for another model.
_FIXED = {
    "attn_type": "multihead_attention",
    "alibi": True,
    "prefix_lm": False,
    "qk_ln": False,
    "attn_uses_sequence_id": False,
}
_IGNORED = frozenset({"attn_impl", "attn_pdrop", "alibi_bias_max", "model_type"})


def _variant(fields: Fields) -> Family:
    attention = fields.section("attn_config")
    if attention is None:
        return MPT
    for name, value in _FIXED.items():
        attention.fixed(name, value, "mpt")
    variant = replace(
        MPT,
        clip_qkv=attention.optional_number("clip_qkv") or None,
        attention_scale=attention.optional_number("softmax_scale"),
    )
    attention.reject_unknown("mpt", _IGNORED)
    return variant


MPT = Family(
    architecture="MptForCausalLM",
    name="mpt",
    architecture_aliases=("MPTForCausalLM",),  # in its first files, with code of their own
    spellings={
        "hidden_size": ("d_model", "hidden_size"),
        "num_hidden_layers": ("n_layers", "num_hidden_layers"),
        "num_attention_heads": ("n_heads", "num_attention_heads"),
        "max_position_embeddings": ("max_seq_len",),
        "rms_norm_eps": ("layer_norm_epsilon",),
    },
    variant=_variant,
    forms="queries, keys and values cut off, another scale of scores",
    max_position_embeddings=2048,
    norm_eps=1e-5,
    tied=True,
    heads_fill_hidden=True,
    qkv_bias=False,
    positions="alibi",
    gated_mlp=False,
    ffn_multiple=4,
    activation="gelu",
    layer_norm=True,
    stored_names=StoredNames(
        prefixes=("transformer.",),
        layers="blocks",
        modules={
            "model.embed_tokens": "wte",
            "model.norm": "norm_f",
            "input_layernorm": "norm_1",
            "post_attention_layernorm": "norm_2",
            "self_attn.o_proj": "attn.out_proj",
            "mlp.up_proj": "ffn.up_proj",
            "mlp.down_proj": "ffn.down_proj",
        },
        qkv="attn.Wqkv",
    ),
    # How it was trained, and which kernels are used. Positions are never learned, whatever
    # learned_pos_emb says.
    ignored=frozenset(
        """
        auto_map emb_pdrop embedding_fraction init_config init_device learned_pos_emb norm_type
        tokenizer_name verbose
        """.split()
    ),
    fixed={"expansion_ratio": 4, "no_bias": True, "logit_scale": None},
)
