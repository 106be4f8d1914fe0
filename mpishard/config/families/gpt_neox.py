"""GPT-NeoX and Pythia (arXiv 2204.06745, 2304.01373): attention and feed-forward network side by
side, each with a norm of its own, and a rotation of part of each head."""

from __future__ import annotations

from dataclasses import replace

from mpishard.config.families.family import Family
from mpishard.config.fields import Fields
from mpishard.config.stored_names import StoredNames


def _variant(fields: Fields) -> Family:
    return replace(GPT_NEOX, parallel_residual=fields.flag("use_parallel_residual", True))


GPT_NEOX = Family(
    architecture="GPTNeoXForCausalLM",
    name="gpt_neox",
    spellings={
        "rms_norm_eps": ("layer_norm_eps",),
        "rope_theta": ("rotary_emb_base", "rope_theta"),
        "partial_rotary_factor": ("rotary_pct", "partial_rotary_factor"),
    },
    variant=_variant,
    forms="a parallel residual, with two norms, unless a field says no",
    max_position_embeddings=2048,
    bos_id=0,
    eos_id=2,
    norm_eps=1e-5,
    heads_fill_hidden=True,
    qkv_bias_default=True,
    partial_rotary_factor=0.25,
    mlp_bias=True,
    gated_mlp=False,
    activation="gelu",
    layer_norm=True,
    norm_bias=True,
    stored_names=StoredNames(
        prefixes=("gpt_neox.",),
        modules={
            "model.embed_tokens": "embed_in",
            "model.norm": "final_layer_norm",
            "self_attn.o_proj": "attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
        head="embed_out",
        qkv="attention.query_key_value",
        qkv_by_kv_head=True,
        buffers=(".attention.bias", ".attention.masked_bias"),
    ),
    ignored=frozenset({"num_steps"}),
)
