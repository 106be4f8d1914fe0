"""StarCoder and SantaCoder (arXiv 2305.06161): GPT-2 with one key/value head."""

from __future__ import annotations

from dataclasses import replace

from mpishard.config.families.family import Family
from mpishard.config.families.gpt2 import GPT_IGNORED, GPT_MODULES, GPT_SPELLINGS
from mpishard.config.fields import Fields
from mpishard.config.stored_names import StoredNames


def _variant(fields: Fields) -> Family:
    return replace(
        GPT_BIGCODE,
        kv_heads=1 if fields.flag("multi_query", True) else None,
        attention_scale=None if fields.flag("scale_attn_weights", True) else 1.0,
    )


GPT_BIGCODE = Family(
    architecture="GPTBigCodeForCausalLM",
    name="gpt_bigcode",
    spellings=GPT_SPELLINGS,
    variant=_variant,
    forms="one key/value head, or as many as query heads; scores not scaled",
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
    activation="gelu_pytorch_tanh",
    layer_norm=True,
    norm_bias=True,
    stored_names=StoredNames(
        prefixes=("transformer.",),
        layers="h",
        modules=GPT_MODULES,
        qkv="attn.c_attn",
        qkv_by_kv_head=True,
        buffers=(".attn.bias", ".attn.masked_bias"),
    ),
    # Which kernels are used, and what was once allocated in advance.
    ignored=GPT_IGNORED
    | frozenset(
        """
        attention_softmax_in_fp32 scale_attention_softmax_in_fp32 inference_runner max_batch_size
        pad_key_length pre_allocate_kv_cache validate_runner_input
        """.split()
    ),
)
