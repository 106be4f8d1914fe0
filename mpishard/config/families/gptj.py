"""GPT-J (Wang and Komatsuzaki 2021): attention and feed-forward network side by side after one
norm, and a rotation of neighbours in part of each head."""

from __future__ import annotations

from dataclasses import replace

from mpishard.config.families.family import Family
from mpishard.config.families.gpt2 import GPT_IGNORED, GPT_SPELLINGS
from mpishard.config.fields import Fields
from mpishard.config.model_config import LayerNormNames
from mpishard.config.stored_names import StoredNames


def _variant(fields: Fields) -> Family:
    head_dim = fields.integer("hidden_size") // fields.integer("num_attention_heads")
    rotary_dim = fields.optional_integer("rotary_dim", absent=64) or head_dim
    return replace(GPTJ, partial_rotary_factor=rotary_dim / head_dim)


GPTJ = Family(
    architecture="GPTJForCausalLM",
    name="gptj",
    spellings=GPT_SPELLINGS,
    variant=_variant,
    forms="rope on a part of each head",
    max_position_embeddings=2048,
    bos_id=50256,
    eos_id=50256,
    norm_eps=1e-5,
    heads_fill_hidden=True,
    qkv_bias=False,
    rope_interleaved_pairs=True,
    mlp_bias=True,
    gated_mlp=False,
    ffn_multiple=4,
    activation="gelu_new",
    layer_norm=True,
    norm_bias=True,
    norms=LayerNormNames(ffn=None),
    parallel_residual=True,
    head_bias=True,
    stored_names=StoredNames(
        prefixes=("transformer.",),
        layers="h",
        modules={
            "model.embed_tokens": "wte",
            "model.norm": "ln_f",
            "input_layernorm": "ln_1",
            "self_attn.q_proj": "attn.q_proj",
            "self_attn.k_proj": "attn.k_proj",
            "self_attn.v_proj": "attn.v_proj",
            "self_attn.o_proj": "attn.out_proj",
            "mlp.up_proj": "mlp.fc_in",
            "mlp.down_proj": "mlp.fc_out",
        },
        buffers=(".attn.bias", ".attn.masked_bias"),
    ),
    ignored=GPT_IGNORED,
    fixed={"scale_attn_weights": True},
)
