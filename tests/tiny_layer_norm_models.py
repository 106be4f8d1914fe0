"""Tiny models of the families with LayerNorm: see `tiny_models`, which adds them to its own.

Names of fields are those of each family's published files. No prompt is as short as a window, and
clips, biases and scales are such that they change much."""

from __future__ import annotations

from typing import Any


def _model(architecture: str, family: str, **fields: Any) -> dict[str, Any]:
    common = {
        "architectures": [architecture],
        "model_type": family,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": True,
    }
    return common | fields


def _gpt(architecture: str, family: str, heads: int, D: int, V: int, **fields: Any) -> dict:
    """A model whose sizes have the names of GPT-2."""
    sizes = {
        "n_head": heads,
        "n_embd": D,
        "vocab_size": V,
        "n_layer": 2,
        "n_positions": 64,
        "layer_norm_epsilon": 1e-2,
    }
    return _model(architecture, family, **sizes | fields)


def _plain(
    architecture: str, family: str, heads: int, D: int, F: int | None, V: int, **fields: Any
) -> dict:
    """A model whose sizes have the names of llama."""
    sizes = {
        "num_attention_heads": heads,
        "hidden_size": D,
        "intermediate_size": F,
        "vocab_size": V,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
    }
    if F is None:
        del sizes["intermediate_size"]
    return _model(architecture, family, **sizes | fields)


def _falcon(heads: int, D: int, V: int, **fields: Any) -> dict:
    sizes = {
        "num_attention_heads": heads,
        "hidden_size": D,
        "vocab_size": V,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
        "layer_norm_epsilon": 1e-2,
    }
    return _model("FalconForCausalLM", "falcon", **sizes | fields)


LAYER_NORM_VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2-layers": _gpt(
        *("GPT2LMHeadModel", "gpt2", 6, 30, 67),
        n_layer=3,
        n_inner=43,
        activation_function="gelu_new",
        scale_attn_by_inverse_layer_idx=True,
        reorder_and_upcast_attn=True,
    ),
    "gpt2-unscaled": _gpt(
        *("GPT2LMHeadModel", "gpt2", 4, 28, 61),
        n_inner=None,
        activation_function="relu",
        scale_attn_weights=False,
        tie_word_embeddings=False,
    ),
    "gpt_bigcode-mqa": _gpt(
        *("GPTBigCodeForCausalLM", "gpt_bigcode", 6, 42, 63),
        n_inner=37,
        activation_function="gelu",
        multi_query=True,
    ),
    "gpt_bigcode-mha": _gpt(
        *("GPTBigCodeForCausalLM", "gpt_bigcode", 4, 20, 59),
        n_inner=41,
        activation_function="gelu_pytorch_tanh",
        multi_query=False,
        scale_attn_weights=False,
    ),
    "opt-plain": _plain(
        *("OPTForCausalLM", "opt", 6, 42, None, 71),
        ffn_dim=39,
        word_embed_proj_dim=42,
        do_layer_norm_before=True,
        activation_function="relu",
        pad_token_id=1,
        dropout=0.1,
    ),
    "opt-bare": _plain(
        *("OPTForCausalLM", "opt", 4, 20, None, 73),
        ffn_dim=47,
        enable_bias=False,
        layer_norm_elementwise_affine=False,
        activation_function="gelu",
        tie_word_embeddings=False,
        pad_token_id=1,
    ),
    "bloom-six": _model(
        *("BloomForCausalLM", "bloom"),
        n_head=6,
        hidden_size=30,
        n_layer=2,
        vocab_size=69,
        layer_norm_epsilon=1e-2,
        pretraining_tp=2,
        seq_length=64,
        tie_word_embeddings=False,  # a tiny one that is tied repeats itself
    ),
    "mpt-clipped": _model(
        *("MptForCausalLM", "mpt"),
        n_heads=5,
        d_model=35,
        n_layers=2,
        vocab_size=75,
        max_seq_len=64,
        layer_norm_epsilon=1e-2,
        learned_pos_emb=True,
        no_bias=True,
        attn_config={"alibi": True, "clip_qkv": 0.7, "softmax_scale": 0.9, "attn_impl": "torch"},
    ),
    "falcon-mqa": _falcon(
        6,
        48,
        65,
        multi_query=True,
        parallel_attn=True,
        bias=False,
        ffn_hidden_size=53,
        num_kv_heads=6,
    ),
    "falcon-new": _falcon(
        6,
        36,
        77,
        new_decoder_architecture=True,
        num_kv_heads=3,
        bias=True,
        ffn_hidden_size=45,
        tie_word_embeddings=False,
    ),
    "falcon-alibi": _falcon(
        *(12, 48, 79),  # slopes that are no powers of two
        alibi=True,
        multi_query=False,
        parallel_attn=False,
        bias=True,
        ffn_hidden_size=37,
    ),
    "falcon-grouped-alibi": _falcon(
        6,
        36,
        57,
        alibi=True,
        new_decoder_architecture=True,
        num_kv_heads=2,
        num_ln_in_parallel_attn=1,
        bias=True,
        tie_word_embeddings=False,
        ffn_hidden_size=33,
    ),
    "starcoder2-window": _plain(
        *("Starcoder2ForCausalLM", "starcoder2", 6, 36, 49, 81),
        num_key_value_heads=3,
        hidden_act="gelu_pytorch_tanh",
        norm_epsilon=1e-2,
        use_bias=True,
        sliding_window=5,
        rope_theta=200.0,
        mlp_type="default",
    ),
    "olmo-clipped": _plain(
        *("OlmoForCausalLM", "olmo", 6, 36, 43, 83),
        num_key_value_heads=2,
        hidden_act="silu",
        attention_bias=True,
        clip_qkv=0.8,
        rope_theta=200.0,
    ),
    "gpt_neox-parallel": _plain(
        *("GPTNeoXForCausalLM", "gpt_neox", 6, 48, 41, 85),
        hidden_act="gelu",
        layer_norm_eps=1e-2,
        use_parallel_residual=True,
        rotary_pct=0.75,
        rotary_emb_base=200,
    ),
    "gpt_neox-serial": _plain(
        *("GPTNeoXForCausalLM", "gpt_neox", 4, 32, 39, 55),
        hidden_act="gelu_new",
        layer_norm_eps=1e-2,
        use_parallel_residual=False,
        attention_bias=False,
        rope_parameters={
            "rope_type": "linear",
            "factor": 2.0,
            "rope_theta": 150.0,
            "partial_rotary_factor": 0.5,
        },
    ),
    "gptj-partial": _gpt(
        *("GPTJForCausalLM", "gptj", 4, 40, 53),
        n_inner=45,
        rotary_dim=6,
        activation_function="gelu_new",
        tie_word_embeddings=False,
    ),
    "phi-normed": _plain(
        *("PhiForCausalLM", "phi", 6, 60, 51, 87),
        num_key_value_heads=3,
        hidden_act="gelu_new",
        layer_norm_eps=1e-2,
        qk_layernorm=True,
        partial_rotary_factor=0.4,
        rope_theta=200.0,
    ),
    "stablelm-parallel": _plain(
        *("StableLmForCausalLM", "stablelm", 6, 48, 47, 89),
        num_key_value_heads=3,
        hidden_act="silu",
        layer_norm_eps=1e-2,
        use_parallel_residual=True,
        use_qkv_bias=True,
        qk_layernorm=True,
        partial_rotary_factor=0.5,
        rope_theta=200.0,
    ),
    "stablelm-serial": _plain(
        *("StableLmForCausalLM", "stablelm", 4, 32, 45, 91),
        num_key_value_heads=4,
        hidden_act="silu",
        layer_norm_eps=1e-2,
        partial_rotary_factor=0.5,
        rope_theta=150.0,
    ),
    "cohere-normed": _plain(
        *("CohereForCausalLM", "cohere", 6, 36, 43, 93),
        num_key_value_heads=2,
        hidden_act="silu",
        layer_norm_eps=1e-2,
        attention_bias=True,
        use_qk_norm=True,
        logit_scale=0.3,
        rope_theta=200.0,
    ),
    "cohere2-windows": _plain(
        *("Cohere2ForCausalLM", "cohere2", 8, 48, 37, 95),
        num_key_value_heads=4,
        num_hidden_layers=3,
        hidden_act="silu",
        layer_norm_eps=1e-2,
        sliding_window=6,
        sliding_window_pattern=2,
        logit_scale=0.4,
        rope_theta=150.0,
    ),
    "nemotron-relu2": _plain(
        *("NemotronForCausalLM", "nemotron", 6, 34, 49, 97),
        num_key_value_heads=2,
        head_dim=12,
        hidden_act="relu2",
        norm_eps=1e-2,
        attention_bias=True,
        mlp_bias=True,
        partial_rotary_factor=0.5,
        rope_theta=200.0,
    ),
}

# As `tiny_models` has them for its own.
LAYER_NORM_SEEDS: dict[str, int] = {
    "gpt2-layers": 36,
    "gpt2-unscaled": 1,
    "gpt_bigcode-mqa": 13,
    "gpt_bigcode-mha": 14,
    "opt-plain": 1,
    "bloom-six": 1,
    "mpt-clipped": 1,
    "falcon-mqa": 3,
    "falcon-new": 1,
    "falcon-alibi": 30,
    "falcon-grouped-alibi": 22,
    "starcoder2-window": 8,
    "gpt_neox-parallel": 3,
    "gpt_neox-serial": 22,
    "gptj-partial": 2,
    "phi-normed": 7,
    "stablelm-serial": 8,
    "cohere-normed": 7,
    "nemotron-relu2": 3,
}
