"""BLOOM (arXiv 2211.05100): ALiBi in place of positions, and a norm of the embedding."""

from __future__ import annotations

from mpishard.config.families.family import Family
from mpishard.config.model_config import MAX_POSITIONS
from mpishard.config.stored_names import StoredNames

BLOOM = Family(
    architecture="BloomForCausalLM",
    name="bloom",
    spellings={
        "hidden_size": ("hidden_size", "n_embed"),
        "num_hidden_layers": ("n_layer", "num_hidden_layers"),
        "num_attention_heads": ("n_head", "num_attention_heads"),
        "rms_norm_eps": ("layer_norm_epsilon",),
    },
    max_position_embeddings=MAX_POSITIONS,
    bos_id=1,
    eos_id=2,
    norm_eps=1e-5,
    tied=True,
    heads_fill_hidden=True,
    qkv_bias=True,
    positions="alibi",
    mlp_bias=True,
    gated_mlp=False,
    ffn_multiple=4,
    activation="gelu_pytorch_tanh",
    layer_norm=True,
    norm_bias=True,
    embedding_norm=True,
    stored_names=StoredNames(
        prefixes=("transformer.", ""),
        layers="h",
        modules={
            "model.embed_tokens": "word_embeddings",
            "model.embed_norm": "word_embeddings_layernorm",
            "model.norm": "ln_f",
            "self_attn.o_proj": "self_attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
        qkv="self_attention.query_key_value",
        qkv_by_kv_head=True,
    ),
    # The length that it was trained on, and how Megatron was run. transformers computes the same
    # whatever n_inner says.
    ignored=frozenset(
        """
        seq_length n_inner offset_alibi slow_but_exact attention_softmax_in_fp32 bias_dropout_fusion
        masked_softmax_fusion skip_bias_add skip_bias_add_qkv
        """.split()
    ),
    fixed={"apply_residual_connection_post_layernorm": False},
)
