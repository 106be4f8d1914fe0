"""Tiny random models of every family and option, and real checkpoints made of them.

Within a model the sizes differ from each other and few divide, so that a mistaken axis, a swapped
head or a missing bias shows. Weights come from NumPy's frozen `RandomState` stream, as multiples of
1/256 that float32, bfloat16 and float16 all hold exactly: every file format and every machine has
the same model, and the golden values need no weights beside them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file
from stored import stored
from tiny_encoder_models import ENCODER_VARIANTS, encoder_weights
from tiny_layer_norm_models import LAYER_NORM_SEEDS, LAYER_NORM_VARIANTS

from mpishard.config.model_config import MLAConfig, ModelConfig
from mpishard.config.reader import read_model_config
from mpishard.config.stored_names import StoredNames
from mpishard.config.weight_specs import per_expert_names, weight_specs

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
PROMPT_LENGTHS = (11, 21)
_ABSENT = object()


def _llama(heads: int, kv_heads: object, hidden: int, ffn: int, vocab: int, **fields: Any) -> dict:
    """A ``config.json`` of the sizes H, G, D, F and V; `fields` are added or replace."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-2,  # large, so that a wrong one shows
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "use_cache": True,
    }
    return {name: value for name, value in (config | fields).items() if value is not _ABSENT}


def _mistral(*sizes: Any, **fields: Any) -> dict:
    return _llama(
        *sizes, **{"architectures": ["MistralForCausalLM"], "model_type": "mistral"} | fields
    )


def _qwen2(*sizes: Any, **fields: Any) -> dict:
    return _llama(*sizes, **{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"} | fields)


def _mixture(family: str, *sizes: Any, **fields: Any) -> dict:
    """The same for a mixture of experts; F is the width of the dense layers, if there are any."""
    architectures = {
        "mixtral": "MixtralForCausalLM",
        "qwen2_moe": "Qwen2MoeForCausalLM",
        "qwen3_moe": "Qwen3MoeForCausalLM",
        "olmoe": "OlmoeForCausalLM",
        "gpt_oss": "GptOssForCausalLM",
        "deepseek_v2": "DeepseekV2ForCausalLM",
        "deepseek_v3": "DeepseekV3ForCausalLM",
    }
    named = {"architectures": [architectures[family]], "model_type": family}
    return _llama(*sizes, **named | fields)


def _qwen3(*sizes: Any, **fields: Any) -> dict:
    return _llama(*sizes, **{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"} | fields)


def _gemma2(*sizes: Any, **fields: Any) -> dict:
    named: dict[str, Any] = {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_act": _ABSENT,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": _ABSENT,  # then they are tied
    }
    return _llama(*sizes, **named | fields)


_FAMILIES = {
    "gemma": "GemmaForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "dots1": "Dots1ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "minimax_m2": "MiniMaxM2ForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "glm": "GlmForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "arcee": "ArceeForCausalLM",
    "hunyuan_v1_dense": "HunYuanDenseV1ForCausalLM",
    "hunyuan_v1_moe": "HunYuanMoEV1ForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "granitemoeshared": "GraniteMoeSharedForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "phimoe": "PhimoeForCausalLM",
    "mimo": "MiMoForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
}


def _family(family: str, *sizes: Any, **fields: Any) -> dict:
    named = {"architectures": [_FAMILIES[family]], "model_type": family, "pad_token_id": None}
    return _llama(*sizes, **named | fields)


# "old" is the spelling of transformers 4, rope_scaling beside rope_theta, "new" the spelling of
# transformers 5, rope_parameters. Prompts are longer than every original length and every window.
# Thetas are small, so that every pair of a head turns visibly within them, and yarn's ramps begin
# and end between pairs.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama-mha": _llama(8, _ABSENT, 48, 37, 61, rope_theta=300.0),
    "llama-gqa": _llama(
        *(8, 4, 32, 45, 67),
        head_dim=10,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    ),
    "llama-mqa": _llama(8, 1, 56, 53, 59, head_dim=8, hidden_act="relu"),
    "llama-uneven": _llama(12, 3, 24, 41, 71, head_dim=4, num_hidden_layers=3, rope_theta=100.0),
    "llama-bias": _llama(
        *(6, 3, 42, 43, 73),
        head_dim=8,
        attention_bias=True,
        mlp_bias=True,
        hidden_act="gelu_pytorch_tanh",
    ),
    "llama-linear-old": _llama(
        *(4, 2, 28, 39, 63),
        head_dim=8,
        rope_theta=200.0,
        rope_scaling={"type": "linear", "factor": 3.0},
    ),
    "qwen2-linear-new": _qwen2(
        *(4, 4, 26, 51, 65),
        head_dim=6,
        rope_parameters={"rope_type": "linear", "rope_theta": 200.0, "factor": 3.0},
    ),
    "llama-dynamic-old": _llama(
        *(8, 2, 40, 47, 69),
        head_dim=6,
        max_position_embeddings=8,
        rope_theta=200.0,
        rope_scaling={"type": "dynamic", "factor": 4.0},
    ),
    "mistral-dynamic-new": _mistral(
        *(6, 2, 33, 57, 75),
        head_dim=8,
        sliding_window=9,
        max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 200.0, "factor": 2.0},
    ),
    "llama-llama3-old": _llama(
        *(4, 1, 44, 35, 77),
        head_dim=12,
        rope_theta=50.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 0.5,
            "high_freq_factor": 2.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "qwen3-llama3-new": _qwen3(
        *(4, 2, 29, 33, 79),
        head_dim=10,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 20.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 20,
        },
    ),
    "llama-yarn-old": _llama(
        *(6, 3, 30, 49, 81),
        head_dim=12,
        rope_theta=7.0,
        rope_scaling={
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 1.0,
            "beta_slow": 0.25,
        },
    ),
    "qwen2-yarn-new": _qwen2(
        *(4, 2, 34, 55, 83),
        head_dim=10,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 5.0,
            "factor": 3.0,
            "original_max_position_embeddings": 18,
            "mscale": 2.0,
            "mscale_all_dim": 0.5,
            "truncate": False,
        },
    ),
    "mistral-yarn-new": _mistral(
        *(8, 4, 45, 59, 85),
        head_dim=14,
        sliding_window=None,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 7.4,
            "factor": None,  # then the ratio of max_position_embeddings to the original length
            "original_max_position_embeddings": 16,
            "beta_fast": 1.5,
            "beta_slow": 0.5,
            "attention_factor": 1.3,
        },
    ),
    "mistral-window": _mistral(12, 3, 38, 49, 87, head_dim=6, sliding_window=5, rope_theta=100.0),
    "mistral-full": _mistral(16, _ABSENT, 35, 61, 89, head_dim=4, sliding_window=None),
    "qwen2-tied": _qwen2(6, 2, 36, 63, 91, tie_word_embeddings=True, use_sliding_window=False),
    "qwen2-window": _qwen2(
        *(8, 4, 27, 65, 93),
        head_dim=8,
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
    ),
    "qwen3-tied": _qwen3(
        *(8, 8, 31, 67, 95),
        head_dim=6,
        tie_word_embeddings=True,
        rope_theta=1000.0,
    ),
    "qwen3-mixed": _qwen3(
        *(6, 3, 37, 69, 97),
        head_dim=8,
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 150.0},
    ),
    "qwen3-bias": _qwen3(8, 1, 39, 71, 99, head_dim=10, attention_bias=True),
    # Gemma 2 as its published files are: the alternation of windows and the tie are left to the
    # defaults. Caps are so low that they bend most scores and logits.
    "gemma2-capped": _gemma2(
        *(8, 4, 16, 43, 101),
        num_hidden_layers=4,
        head_dim=10,
        hidden_act="gelu_pytorch_tanh",
        query_pre_attn_scalar=7,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=2.5,
        sliding_window=5,
        cache_implementation="hybrid",
        pad_token_id=0,
        rope_theta=200.0,
    ),
    "gemma2-plain": _gemma2(
        *(10, 5, 50, 47, 103),
        head_dim=6,
        attention_bias=True,
        query_pre_attn_scalar=11,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        sliding_window=7,
        layer_types=["full_attention", "sliding_attention"],
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 150.0},
    ),
    "gemma-plain": _family(
        *("gemma", 6, 2, 26, 45, 81),
        head_dim=8,
        hidden_act="gelu",  # as in its published files, which mean the form with tanh
        attention_bias=True,
        rope_theta=200.0,
    ),
    "gemma3-old": _family(
        *("gemma3_text", 4, 2, 20, 43, 79),
        num_hidden_layers=5,
        head_dim=10,
        hidden_act=_ABSENT,
        hidden_activation="gelu_pytorch_tanh",
        tie_word_embeddings=_ABSENT,  # then they are tied
        query_pre_attn_scalar=7,
        final_logit_softcapping=2.5,
        sliding_window=5,
        sliding_window_pattern=3,
        rope_theta=300.0,
        rope_scaling={"rope_type": "linear", "factor": 3.0},
        rope_local_base_freq=20.0,
    ),
    "olmo2-plain": _family(
        *("olmo2", 6, 3, 34, 41, 77),
        head_dim=8,
        attention_bias=True,
        rope_theta=200.0,
    ),
    "olmo3-yarn": _family(
        *("olmo3", 8, 4, 30, 37, 75),
        num_hidden_layers=3,
        head_dim=10,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 7.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 1.0,
                "beta_slow": 0.25,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
        },
    ),
    "granite-plain": _family(
        *("granite", 6, 2, 31, 47, 73),
        head_dim=8,
        attention_bias=True,
        mlp_bias=True,
        embedding_multiplier=1.5,
        residual_multiplier=0.6,
        attention_multiplier=0.2,
        logits_scaling=1.7,
        rope_theta=200.0,
    ),
    "smollm3-nope": _family(
        *("smollm3", 8, 4, 36, 39, 71),
        num_hidden_layers=4,
        head_dim=6,
        no_rope_layers=[1, 0, 1, 0],
        use_sliding_window=True,
        sliding_window=5,
        rope_theta=200.0,
    ),
    "seed_oss-bias": _family(
        *("seed_oss", 6, 3, 32, 51, 69),
        head_dim=10,
        attention_bias=False,
        attention_out_bias=True,
        mlp_bias=True,
        rope_theta=200.0,
    ),
    "ministral3-scaled": _family(
        *("ministral3", 4, 2, 27, 53, 67),
        head_dim=12,
        sliding_window=12,
        rope_parameters={
            "rope_type": "yarn",
            "type": "yarn",
            "rope_theta": 7.0,
            "factor": 4.0,
            "original_max_position_embeddings": 5,
            "beta_slow": 0.25,
            "llama_4_scaling_beta": 0.3,
        },
    ),
    "exaone4-hybrid": _family(
        *("exaone4", 6, 2, 29, 55, 65),
        num_hidden_layers=3,
        head_dim=10,
        sliding_window=6,
        sliding_window_pattern=2,
        rope_theta=200.0,
    ),
    # The first prompt is at the trained length, so that its continuation grows out of it.
    "phi3-longrope": _family(
        *("phi3", 6, 2, 48, 41, 63),
        original_max_position_embeddings=11,
        partial_rotary_factor=0.75,
        sliding_window=9,
        rope_theta=7.0,
        rope_scaling={
            "type": "longrope",
            "short_factor": [1.0, 1.2, 1.5],
            "long_factor": [1.5, 2.5, 8.0],
        },
    ),
    "glm-partial": _family(
        *("glm", 6, 2, 34, 43, 61),
        head_dim=12,
        attention_bias=True,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 50.0,
            "partial_rotary_factor": 0.5,
        },
    ),
    "glm4-partial": _family(
        *("glm4", 8, 4, 28, 45, 67),
        head_dim=10,
        attention_bias=False,
        partial_rotary_factor=0.4,
        rope_theta=50.0,
    ),
    "arcee-relu2": _family(
        *("arcee", 6, 3, 36, 47, 69),
        head_dim=8,
        hidden_act="relu2",
        attention_bias=True,
        mlp_bias=True,
        rope_theta=200.0,
    ),
    "hunyuan_v1_dense-alpha": _family(
        *("hunyuan_v1_dense", 4, 2, 38, 49, 71),
        head_dim=10,
        attention_bias=True,
        rope_theta=20.0,
        rope_scaling={
            "type": "dynamic",
            "alpha": 9.0,
            "factor": 1.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    ),
    "ernie4_5-bias": _family(
        *("ernie4_5", 6, 3, 44, 55, 77),
        head_dim=8,
        use_bias=True,
        tie_word_embeddings=_ABSENT,  # then they are tied
        rope_theta=50.0,
    ),
    "mimo-plain": _family(
        *("mimo", 6, 3, 40, 51, 73),
        head_dim=8,
        attention_bias=True,
        num_nextn_predict_layers=1,
        rope_theta=200.0,
    ),
    "internlm2-dynamic": _family(
        *("internlm2", 8, 2, 48, 53, 75),
        bias=True,
        max_position_embeddings=13,
        rope_theta=200.0,
        rope_scaling={"type": "dynamic", "factor": 3.0},
    ),
}

VARIANTS |= LAYER_NORM_VARIANTS

# Mixtures of experts. Their numbers, the number that a token goes to and the width of one differ
# too, and few divide.
MOE_VARIANTS: dict[str, dict[str, Any]] = {
    "mixtral-full": _mixture(
        *("mixtral", 8, 4, 32, 19, 61),
        head_dim=None,
        num_local_experts=6,
        num_experts_per_tok=2,
        sliding_window=None,
        rope_theta=300.0,
        router_jitter_noise=0.0,
    ),
    "mixtral-window": _mixture(
        *("mixtral", 6, 3, 34, 21, 67),
        head_dim=10,
        num_local_experts=5,
        num_experts_per_tok=3,
        sliding_window=6,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 200.0},
    ),
    "qwen2_moe-shared": _mixture(
        *("qwen2_moe", 8, 4, 48, 33, 63),
        num_experts=7,
        num_experts_per_tok=3,
        moe_intermediate_size=17,
        shared_expert_intermediate_size=23,
        norm_topk_prob=False,
        use_sliding_window=False,
        rope_theta=300.0,
    ),
    "qwen2_moe-mixed": _mixture(
        *("qwen2_moe", 4, 2, 36, 35, 65),
        num_hidden_layers=4,
        head_dim=10,
        qkv_bias=False,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=15,
        shared_expert_intermediate_size=27,
        norm_topk_prob=True,
        decoder_sparse_step=2,
        mlp_only_layers=[2, 3],
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=2,
        rope_parameters={"rope_type": "linear", "rope_theta": 200.0, "factor": 3.0},
    ),
    "qwen3_moe-plain": _mixture(
        *("qwen3_moe", 6, 2, 31, 37, 69),
        head_dim=8,
        num_experts=9,
        num_experts_per_tok=4,
        moe_intermediate_size=13,
        norm_topk_prob=False,
        attention_bias=True,
        rope_theta=300.0,
    ),
    "qwen3_moe-normed": _mixture(
        *("qwen3_moe", 8, 4, 33, 39, 71),
        num_hidden_layers=3,
        head_dim=6,
        num_local_experts=8,  # as transformers 5 spells it
        num_experts_per_tok=3,
        moe_intermediate_size=11,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        use_sliding_window=True,
        sliding_window=7,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 150.0},
    ),
    "olmoe-plain": _mixture(
        *("olmoe", 6, 3, 48, 16, 73),
        num_experts=10,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        clip_qkv=None,
        rope_theta=300.0,
    ),
    "olmoe-normed": _mixture(
        *("olmoe", 4, _ABSENT, 40, 22, 75),
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 150.0},
    ),
    # Limits so low that they cut off what the tiny experts compute.
    "gpt_oss-yarn": _mixture(
        *("gpt_oss", 8, 4, 35, 18, 77),
        num_hidden_layers=3,
        head_dim=10,
        num_local_experts=6,
        num_experts_per_tok=2,
        experts_per_token=2,
        sliding_window=5,
        swiglu_limit=0.8,
        rope_theta=7.0,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 1.0,
            "beta_slow": 0.25,
            "truncate": False,
        },
    ),
    "gpt_oss-plain": _mixture(
        *("gpt_oss", 6, 2, 37, 14, 79),
        head_dim=8,
        num_local_experts=8,
        num_experts_per_tok=3,
        attention_bias=False,
        sliding_window=7,
        layer_types=["full_attention", "sliding_attention"],
        swiglu_alpha=1.1,
        swiglu_limit=0.6,
        rope_parameters={"rope_type": "default", "rope_theta": 150.0},
    ),
    "deepseek_v2-lite": _mixture(
        *("deepseek_v2", 4, 4, 40, 29, 81),
        num_hidden_layers=3,
        first_k_dense_replace=1,
        n_routed_experts=8,
        n_shared_experts=2,
        num_experts_per_tok=3,
        moe_intermediate_size=13,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        q_lora_rank=None,
        kv_lora_rank=12,
        qk_nope_head_dim=6,
        qk_rope_head_dim=10,
        v_head_dim=9,
        rope_theta=5.0,
        rope_scaling={
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 1.0,
            "beta_slow": 0.25,
            "mscale": 0.7,
            "mscale_all_dim": 1.2,
        },
    ),
    "deepseek_v2-full": _mixture(
        *("deepseek_v2", 6, 6, 42, 31, 83),
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=3,
        moe_intermediate_size=15,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,  # without effect
        routed_scaling_factor=1.6,
        attention_bias=True,
        mlp_bias=True,
        q_lora_rank=14,
        kv_lora_rank=10,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=5,
        rope_parameters={"rope_type": "default", "rope_theta": 150.0},
    ),
    "deepseek_v3-groups": _mixture(
        *("deepseek_v3", 8, 8, 48, 33, 85),
        num_hidden_layers=3,
        first_k_dense_replace=1,
        n_routed_experts=12,
        n_shared_experts=1,
        num_experts_per_tok=4,
        moe_intermediate_size=11,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=1,
        q_lora_rank=16,
        kv_lora_rank=12,
        qk_nope_head_dim=6,
        qk_rope_head_dim=10,
        v_head_dim=8,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 5.0,
            "factor": 3.0,
            "original_max_position_embeddings": 18,
            "mscale": 2.0,
            "mscale_all_dim": 0.5,
            "truncate": False,
        },
    ),
    "deepseek_v3-plain": _mixture(
        *("deepseek_v3", 6, 6, 36, 35, 87),
        first_k_dense_replace=0,
        n_routed_experts=7,
        n_shared_experts=2,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        routed_scaling_factor=1.3,
        attention_bias=True,
        tie_word_embeddings=True,
        q_lora_rank=None,
        kv_lora_rank=13,
        qk_nope_head_dim=8,
        qk_rope_head_dim=6,
        v_head_dim=11,
        rope_interleave=False,
        rope_theta=100.0,
    ),
    "dots1-groups": _family(
        *("dots1", 6, 3, 32, 35, 89),
        num_hidden_layers=3,
        head_dim=8,
        attention_bias=True,
        first_k_dense_replace=1,
        n_routed_experts=9,
        n_shared_experts=2,
        num_experts_per_tok=3,
        moe_intermediate_size=11,
        n_group=3,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=1.4,
        sliding_window=6,
        max_window_layers=2,
        rope_theta=200.0,
    ),
    "glm4_moe-partial": _family(
        *("glm4_moe", 8, 4, 30, 29, 91),
        head_dim=12,
        attention_bias=True,
        use_qk_norm=True,
        partial_rotary_factor=0.5,
        first_k_dense_replace=0,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=13,
        n_group=2,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.6,
        rope_theta=100.0,
    ),
    "qwen3_next-mixed": _family(
        *("qwen3_next", 6, 2, 34, 27, 95),
        head_dim=12,
        num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_num_key_heads=3,
        linear_num_value_heads=6,
        linear_key_head_dim=8,
        linear_value_head_dim=5,
        linear_conv_kernel_dim=3,
        num_experts=7,
        num_experts_per_tok=2,
        moe_intermediate_size=13,
        shared_expert_intermediate_size=11,
        mlp_only_layers=[2],
        norm_topk_prob=True,
        attention_bias=True,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.5,
        },
    ),
    "minimax_m2-partial": _family(
        *("minimax_m2", 6, 2, 33, 15, 93),
        head_dim=10,
        rotary_dim=6,
        num_local_experts=7,
        num_experts_per_tok=3,
        scoring_func="sigmoid",
        use_qk_norm=True,
        rope_theta=100.0,
    ),
    "granitemoe-plain": _family(
        *("granitemoe", 6, 3, 31, 14, 71),
        head_dim=10,
        attention_bias=True,
        num_local_experts=7,
        num_experts_per_tok=3,
        embedding_multiplier=1.5,
        residual_multiplier=0.6,
        attention_multiplier=0.2,
        logits_scaling=1.7,
        rope_theta=200.0,
    ),
    "granitemoeshared-plain": _family(
        *("granitemoeshared", 8, 4, 33, 16, 73),
        head_dim=6,
        num_local_experts=6,
        num_experts_per_tok=2,
        shared_intermediate_size=19,
        embedding_multiplier=1.4,
        residual_multiplier=0.7,
        attention_multiplier=0.3,
        logits_scaling=1.6,
        rope_theta=200.0,
    ),
    "hunyuan_v1_moe-alpha": _family(
        *("hunyuan_v1_moe", 4, 2, 35, 17, 75),
        head_dim=8,
        attention_bias=True,
        num_experts=6,
        moe_topk=[2, 2],
        rope_theta=20.0,
        rope_scaling={"type": "dynamic", "alpha": 9.0, "factor": 1.0},
    ),
    "ernie4_5_moe-clamped": _family(
        *("ernie4_5_moe", 4, 2, 40, 25, 79),
        num_hidden_layers=4,
        use_bias=True,
        tie_word_embeddings=False,
        moe_num_experts=7,
        moe_k=2,
        moe_num_shared_experts=2,
        moe_intermediate_size=11,
        moe_layer_start_index=1,
        moe_layer_end_index=2,
        moe_norm_min=0.5,
        rope_theta=50.0,
    ),
    "phimoe-mixer": _family(
        *("phimoe", 6, 2, 48, 13, 81),
        attention_bias=True,
        lm_head_bias=True,
        num_local_experts=6,
        num_experts_per_tok=2,
        router_jitter_noise=0.2,
        sliding_window=9,
        rope_theta=7.0,
        rope_scaling={
            "type": "longrope",
            "short_factor": [1.0, 1.2, 1.5, 2.0],
            "long_factor": [1.5, 2.5, 4.0, 8.0],
            "short_mscale": 1.1,
            "long_mscale": 1.3,
            "original_max_position_embeddings": 12,
        },
    ),
    "llama4-chunks": _family(
        *("llama4_text", 6, 3, 37, 18, 77),
        num_hidden_layers=4,
        head_dim=10,
        intermediate_size_mlp=23,
        attention_bias=True,
        num_local_experts=5,
        num_experts_per_tok=2,
        interleave_moe_layer_step=2,
        no_rope_layers=[1, 0, 1, 1],
        attention_chunk_size=6,
        floor_scale=4,
        attn_scale=0.4,
        rope_theta=20.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 0.5,
            "high_freq_factor": 2.0,
            "original_max_position_embeddings": 16,
        },
    ),
}

# 0 but where a greedy continuation would repeat itself or come to a near-tie, or
# a router would.
_SEEDS = {
    "llama-gqa": 5,
    "llama-uneven": 17,
    "llama-bias": 1,
    "llama-linear-old": 4,
    "llama-dynamic-old": 1,
    "mistral-dynamic-new": 3,
    "llama-llama3-old": 1,
    "qwen3-llama3-new": 6,
    "llama-yarn-old": 8,
    "qwen2-yarn-new": 9,
    "mistral-yarn-new": 1,
    "mistral-window": 3,
    "mistral-full": 2,
    "qwen2-window": 16,
    "qwen3-tied": 3,
    "qwen3-mixed": 1,
    "qwen3-bias": 1,
    "mixtral-full": 13,
    "mixtral-window": 12,
    "qwen2_moe-shared": 3,
    "qwen2_moe-mixed": 1,
    "qwen3_moe-plain": 8,
    "qwen3_moe-normed": 43,
    "olmoe-plain": 33,
    "gpt_oss-yarn": 5,
    "gpt_oss-plain": 8,
    "deepseek_v2-lite": 1,
    "deepseek_v3-plain": 7,
    "olmo2-plain": 61,
    "olmo3-yarn": 1,
    "granite-plain": 1,
    "smollm3-nope": 2,
    "exaone4-hybrid": 2,
    "glm-partial": 1,
    "hunyuan_v1_moe-alpha": 1,
    "llama4-chunks": 1,
    "ernie4_5-bias": 2,
    "ernie4_5_moe-clamped": 4,
    "internlm2-dynamic": 1,
    "arcee-relu2": 1,
    "hunyuan_v1_dense-alpha": 5,
    "granitemoe-plain": 15,
    "granitemoeshared-plain": 2,
    "dots1-groups": 3,
    "glm4_moe-partial": 3,
    "qwen3_next-mixed": 0,
    "gemma2-capped": 75,
    "gemma2-plain": 9,
}
_SEEDS |= LAYER_NORM_SEEDS


def tiny_config(variant: str) -> ModelConfig:
    """The configuration of `variant`."""
    return read_model_config(raw_config(variant), None, f"{variant}/config.json")


def raw_config(variant: str) -> dict[str, Any]:
    """The ``config.json`` of `variant`."""
    return (VARIANTS | MOE_VARIANTS | ENCODER_VARIANTS)[variant]


def tiny_weights(variant: str, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Every weight of `variant`, by its Hugging Face name, in `dtype`."""
    random = np.random.RandomState(_SEEDS.get(variant, 0))
    if VARIANTS.get(variant, {}).get("model_type") == "gemma2":
        shapes = _gemma2_shapes(VARIANTS[variant])
        return {name: _draw_offset(random, name, shapes[name]).astype(dtype) for name in shapes}
    config = tiny_config(variant)
    if config.encoder is not None:
        return encoder_weights(config, _draw, random, dtype)
    if config.moe is None:
        draw = _draw_offset if config.norm_offset else _draw
        return {
            weight.name: draw(random, weight.field, weight.shape).astype(dtype)
            for weight in weight_specs(config)
        }
    wide = ("e_score_correction_bias",)  # as in every checkpoint
    offset = config.norm_offset != 0  # which the norms of linear attention do not have
    return {
        name: (_draw_offset if offset and "linear_attn" not in name else _draw)(
            random, name, shape
        ).astype(np.float32 if name.endswith(wide) else dtype)
        for name, shape in _moe_shapes(config).items()
    }


def separate_weights(variant: str, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """The same, with the experts one by one under the partition table's names, where the family
    only stores them together: gate over up, or both take turns in columns and all is transposed."""
    config, weights = tiny_config(variant), tiny_weights(variant, dtype)
    if config.moe is None or config.moe.names.separate is not None:
        return weights
    names, stacked = per_expert_names(config.moe), config.moe.names.stacked
    F = config.moe.moe_intermediate_size
    for layer in np.flatnonzero(config.moe.layers):
        name = f"model.layers.{layer}."
        gate_up, down = weights.pop(name + stacked.gate_up), weights.pop(name + stacked.down)
        if not stacked.alternating:
            if stacked.transposed:
                gate_up, down = gate_up.swapaxes(1, 2).copy(), down.swapaxes(1, 2).copy()
            for expert in range(config.moe.num_experts):
                weights[name + names.gate.format(expert)] = gate_up[expert, :F]
                weights[name + names.up.format(expert)] = gate_up[expert, F:]
                weights[name + names.down.format(expert)] = down[expert]
            continue
        gate_up_bias = weights.pop(f"{name}{stacked.gate_up_bias}")
        down_bias = weights.pop(f"{name}{stacked.down_bias}")
        for expert in range(config.moe.num_experts):
            for part, matrix, bias in (
                (names.gate, gate_up[expert, :, ::2].T, gate_up_bias[expert, ::2]),
                (names.up, gate_up[expert, :, 1::2].T, gate_up_bias[expert, 1::2]),
                (names.down, down[expert].T, down_bias[expert]),
            ):
                one = name + part.format(expert)
                weights[one] = np.ascontiguousarray(matrix)
                weights[one.removesuffix(".weight") + ".bias"] = bias
    return weights


def stacked_weights(variant: str, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """The same, with the experts stored together."""
    config, weights = tiny_config(variant), tiny_weights(variant, dtype)
    assert config.moe is not None
    separate, stacked = config.moe.names.separate, config.moe.names.stacked
    if separate is None:
        return weights
    for layer in np.flatnonzero(config.moe.layers):
        name = f"model.layers.{layer}."
        parts = {
            part: [
                weights.pop(name + getattr(separate, part).format(expert))
                for expert in range(config.moe.num_experts)
            ]
            for part in ("gate", "up", "down")
        }
        weights[name + stacked.gate_up] = np.concatenate(
            [np.stack(parts["gate"]), np.stack(parts["up"])], axis=1
        )
        weights[name + stacked.down] = np.stack(parts["down"])
        weights[name + stacked.router] = weights.pop(name + separate.router)
        if stacked.e_score_correction_bias:
            bias = weights.pop(f"{name}{config.moe.names.e_score_correction_bias}")
            weights[name + stacked.e_score_correction_bias] = bias
    return weights


def _moe_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every weight of a mixture of experts, one by one where the family
    stores them so."""
    D, V = config.hidden, config.vocab
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for layer in range(config.layers):
        attention = _linear_shapes if config.is_linear(layer) else _attention_shapes
        of_layer = attention(config) | {
            "input_layernorm.weight": (D,),
            "post_attention_layernorm.weight": (D,),
        }
        if config.norm_bias:
            norms = ("input_layernorm", "post_attention_layernorm")
            of_layer |= {f"{norm}.bias": (D,) for norm in norms}
        of_layer |= _experts_shapes(config, layer)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    shapes["model.norm.weight"] = (D,)
    if config.norm_bias:
        shapes["model.norm.bias"] = (D,)
    if not config.tied:
        shapes["lm_head.weight"] = (V, D)
    if config.head_bias:
        shapes["lm_head.bias"] = (V,)
    return shapes


def _gemma2_shapes(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The name and shape of every weight of a Gemma 2 with the ``config.json`` `raw`."""
    D, F, V = raw["hidden_size"], raw["intermediate_size"], raw["vocab_size"]
    q, kv = (raw[f"num_{heads}_heads"] * raw["head_dim"] for heads in ("attention", "key_value"))
    of_layer: dict[str, tuple[int, ...]] = {}
    for part, shape in (("q", (q, D)), ("k", (kv, D)), ("v", (kv, D)), ("o", (D, q))):
        of_layer[f"self_attn.{part}_proj.weight"] = shape
        if raw.get("attention_bias"):
            of_layer[f"self_attn.{part}_proj.bias"] = shape[:1]
    of_layer |= _gated_shapes("mlp", F, D, False)
    for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        of_layer[f"{norm}_layernorm.weight"] = (D,)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for layer in range(raw["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    shapes["model.norm.weight"] = (D,)
    if not raw.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (V, D)
    return shapes


def _attention_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    D, q, kv = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim
    if config.mla is not None:
        return _latent_shapes(config, config.mla)
    shapes: dict[str, tuple[int, ...]] = {}
    for part, rows in (("q", q), ("k", kv), ("v", kv)):
        shapes[f"{part}_proj.weight"] = (rows, D)
        if config.qkv_bias:
            shapes[f"{part}_proj.bias"] = (rows,)
    shapes["o_proj.weight"] = (D, q)
    if config.o_bias:
        shapes["o_proj.bias"] = (D,)
    if config.output_gate:
        shapes["gate_proj.weight"] = (q, D)
        if config.qkv_bias:
            shapes["gate_proj.bias"] = (q,)
    if config.qk_norm:
        shapes |= {f"{part}_norm.weight": (config.head_dim,) for part in "qk"}
    if config.full_width_qk_norm:
        shapes |= {"q_norm.weight": (q,), "k_norm.weight": (kv,)}
    if config.sinks:
        shapes["sinks"] = (config.heads,)
    return {f"self_attn.{name}": shape for name, shape in shapes.items()}


def _linear_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    D, linear = config.hidden, config.linear_attention
    assert linear is not None
    H, Y = linear.heads, linear.value_width
    keys, values = linear.kv_heads * linear.key_width, H * Y
    shapes: dict[str, tuple[int, ...]] = {"A_log": (H,), "dt_bias": (H,), "norm.weight": (Y,)}
    for part, rows in (("q", keys), ("k", keys), ("v", values)):
        shapes[f"{part}_proj.weight"] = (rows, D)
        shapes[f"{part}_conv1d.weight"] = (rows, 1, linear.taps)
    shapes |= {
        f"{part}_proj.weight": (rows, D) for part, rows in (("z", values), ("b", H), ("a", H))
    }
    shapes["out_proj.weight"] = (D, values)
    return {f"linear_attn.{name}": shape for name, shape in shapes.items()}


def _latent_shapes(config: ModelConfig, mla: MLAConfig) -> dict[str, tuple[int, ...]]:
    D, H, query = config.hidden, config.heads, config.heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    if mla.q_lora_rank is None:
        shapes["q_proj.weight"] = (query, D)
    else:
        shapes["q_a_proj.weight"] = (mla.q_lora_rank, D)
        if mla.bias:
            shapes["q_a_proj.bias"] = (mla.q_lora_rank,)
        shapes["q_a_layernorm.weight"] = (mla.q_lora_rank,)
        shapes["q_b_proj.weight"] = (query, mla.q_lora_rank)
    shapes["kv_a_proj_with_mqa.weight"] = (mla.kv_lora_rank + mla.qk_rope_head_dim, D)
    if mla.bias:
        shapes["kv_a_proj_with_mqa.bias"] = (mla.kv_lora_rank + mla.qk_rope_head_dim,)
    shapes["kv_a_layernorm.weight"] = (mla.kv_lora_rank,)
    shapes["kv_b_proj.weight"] = (H * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank)
    shapes["o_proj.weight"] = (D, H * mla.v_head_dim)
    if config.o_bias:
        shapes["o_proj.bias"] = (D,)
    return {f"self_attn.{name}": shape for name, shape in shapes.items()}


def _experts_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    moe, D = config.moe, config.hidden
    assert moe is not None
    if not moe.layers[layer]:
        return _gated_shapes("mlp", config.ffn, D, config.mlp_bias)
    separate, E, F = moe.names.separate, moe.num_experts, moe.moe_intermediate_size
    shapes: dict[str, tuple[int, ...]]
    if separate is None and not moe.names.stacked.alternating:
        stacked = moe.names.stacked
        transposed = stacked.transposed
        shapes = {
            stacked.router: (E, D),
            stacked.gate_up: (E, D, 2 * F) if transposed else (E, 2 * F, D),
            stacked.down: (E, F, D) if transposed else (E, D, F),
        }
        width = moe.shared_expert_intermediate_size
        return shapes | (_gated_shapes(moe.names.shared, width, D, False) if width else {})
    if separate is None:
        return {
            "mlp.router.weight": (E, D),
            "mlp.router.bias": (E,),
            "mlp.experts.gate_up_proj": (E, D, 2 * F),
            "mlp.experts.gate_up_proj_bias": (E, 2 * F),
            "mlp.experts.down_proj": (E, F, D),
            "mlp.experts.down_proj_bias": (E, D),
        }
    shapes = {separate.router: (E, D)}
    if moe.names.e_score_correction_bias:
        shapes[moe.names.e_score_correction_bias] = (E,)
    for expert in range(E):
        shapes |= {
            separate.gate.format(expert): (F, D),
            separate.up.format(expert): (F, D),
            separate.down.format(expert): (D, F),
        }
    if moe.shared_expert_intermediate_size:
        shapes |= _gated_shapes(
            moe.names.shared, moe.shared_expert_intermediate_size, D, config.mlp_bias
        )
    if moe.names.shared_gate:
        shapes[moe.names.shared_gate] = (1, D)
    return shapes


def _gated_shapes(name: str | None, F: int, D: int, bias: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for part, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
        shapes[f"{name}.{part}_proj.weight"] = shape
        if bias:
            shapes[f"{name}.{part}_proj.bias"] = shape[:1]
    return shapes


def tiny_prompts(variant: str) -> list[list[int]]:
    """Prompts of different lengths for `variant`."""
    random = np.random.RandomState(1000 + _SEEDS.get(variant, 0))
    vocab = raw_config(variant)["vocab_size"]
    return [random.randint(0, vocab, length).tolist() for length in PROMPT_LENGTHS]


def write_checkpoint(
    variant: str,
    directory: str | Path,
    dtype: str = "float32",
    shards: int = 1,
    stacked: bool = False,
) -> Path:
    """`directory`, after writing `variant` into it as Hugging Face does, the weights as `dtype` in
    one file or in `shards` files with an index, experts one by one or `stacked`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = raw_config(variant)
    spelling = "dtype" if "rope_parameters" in config else "torch_dtype"
    (directory / "config.json").write_text(json.dumps(config | {spelling: dtype}, indent=2))

    weights = (stacked_weights if stacked else tiny_weights)(variant, DTYPES[dtype])
    if tiny_config(variant).stored_names != StoredNames():
        weights = stored(tiny_config(variant), weights)
    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    files: dict[str, dict[str, np.ndarray]] = {}
    for index, (name, array) in enumerate(weights.items()):
        number = index * shards // len(weights) + 1
        files.setdefault(f"model-{number:05}-of-{shards:05}.safetensors", {})[name] = array
    for file, arrays in files.items():
        save_file(arrays, directory / file, metadata={"format": "pt"})
    index_json = {
        "metadata": {"total_size": sum(array.nbytes for array in weights.values())},
        "weight_map": {name: file for file, arrays in files.items() for name in arrays},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2))
    return directory


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Applies `change` to the JSON object or the tensors in a file."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    else:
        content = load_file(path)
        change(content)
        save_file(content, path)


def _draw(random: np.random.RandomState, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Norms within a third of 1, biases and matrices of a standard deviation of 0.2, all exact in
    8 significant bits. The bias that experts are selected by is lowered, so that most scores are
    below zero and those of the groups left out must be put below them."""
    if name.endswith("e_score_correction_bias"):
        return random.randint(-89, 90, shape) / 256 - 1
    if "norm" in name and not name.endswith("bias"):
        return 1 + random.randint(-42, 43, shape) / 128
    return random.randint(-89, 90, shape) / 256


def _draw_offset(random: np.random.RandomState, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The same, norms as their distance from 1, which is what a Gemma stores."""
    return _draw(random, name, shape) - ("norm" in name and not name.endswith("bias"))
