"""Reading config.json: every option, both spellings, and each refusal by its sentence."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import MOE_VARIANTS, VARIANTS, raw_config, tiny_config

from mpishard.config.families.wrappers import WRAPPERS
from mpishard.config.known_fields import COMMON_FIELDS, KNOWN_FIELDS
from mpishard.config.model_config import (
    ExpertNames,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    PerExpertNames,
    Rope,
    StackedNames,
)
from mpishard.config.reader import read_model_config
from mpishard.errors import UserError

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
}
MOE_FAMILIES = {
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
LATENT = {"kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
# The least that an MoE model must say beside what every model must.
LEAST: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 16, "num_experts_per_tok": 3},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 40},
    "qwen3_moe": EXPERTS,
    "olmoe": {"num_experts": 16, "num_experts_per_tok": 3},
    "gpt_oss": {"num_local_experts": 16, "num_experts_per_tok": 3},
    "deepseek_v2": {"n_routed_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
    | LATENT,
    "deepseek_v3": {"n_routed_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
    | LATENT,
}
SOURCE = "model/config.json"
REMOVE = "if it does not change the mathematics, give --ignore-config"
ABSENT = object()


def document(family: str = "llama", /, **changes: Any) -> dict[str, Any]:
    """The least that a configuration must say, with `changes`."""
    least = {
        "architectures": [(FAMILIES | MOE_FAMILIES)[family]],
        "model_type": family,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 32,
        "vocab_size": 100,
    } | LEAST.get(family, {})
    raw = {name: value for name, value in (least | changes).items() if value is not ABSENT}
    return json.loads(json.dumps(raw))


def read(family: str = "llama", generation: Any = None, /, **changes: Any) -> ModelConfig:
    return read_model_config(document(family, **changes), generation, SOURCE)


# -- defaults, which are those of the configuration classes of transformers 5


def test_defaults_of_llama():
    raw = document()
    assert read_model_config(raw, None, SOURCE) == ModelConfig(
        family="llama",
        hidden=64,
        layers=3,
        heads=32,
        kv_heads=32,
        head_dim=2,
        ffn=96,
        vocab=100,
        norm_eps=1e-6,
        activation="silu",
        tied=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        ropes=(Rope(kind="default", theta=10000.0, original_positions=2048),) * 3,
        windows=(None, None, None),
        chunks=(None, None, None),
        max_position_embeddings=2048,
        eos_ids=(2,),
        bos_id=1,
        raw=raw,
    )


def test_defaults_of_mistral():
    config = read("mistral")
    assert (config.family, config.kv_heads, config.head_dim) == ("mistral", 8, 2)
    assert config.windows == (4096, 4096, 4096)
    assert config.max_position_embeddings == 131072
    assert (config.eos_ids, config.bos_id) == ((2,), 1)
    assert not (config.qkv_bias or config.o_bias or config.mlp_bias or config.qk_norm)


def test_defaults_of_qwen2():
    config = read("qwen2")
    assert (config.family, config.kv_heads, config.head_dim) == ("qwen2", 32, 2)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, False, False)
    assert config.windows == (None, None, None)
    assert config.max_position_embeddings == 32768
    assert (config.eos_ids, config.bos_id, config.qk_norm) == ((), None, False)


def test_defaults_of_qwen3():
    config = read("qwen3")
    assert (config.family, config.kv_heads, config.head_dim) == ("qwen3", 32, 128)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (False, False, False)
    assert (config.qk_norm, config.max_position_embeddings) == (True, 32768)


def test_defaults_of_gemma2():
    config = read("gemma2")
    assert (config.family, config.kv_heads, config.head_dim) == ("gemma2", 4, 256)
    assert (config.activation, config.tied, config.norm_offset) == ("gelu_pytorch_tanh", True, 1.0)
    assert config.windows == (4096, None, 4096)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    assert (config.attention_scale, config.embedding_scale) == (256**-0.5, 8.0)
    assert (config.norms.ffn_post, config.max_position_embeddings) == (
        "post_feedforward_layernorm",
        8192,
    )
    assert (config.eos_ids, config.bos_id) == ((1,), 2)


def test_what_gemma2_may_change():
    config = read("gemma2", attn_logit_softcapping=None, final_logit_softcapping=5)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (None, 5.0)
    assert read("gemma2", query_pre_attn_scalar=144).attention_scale == 1 / 12
    assert read("gemma2", hidden_activation="relu", hidden_act="silu").activation == "relu"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"sliding_window": None}, "sliding_window = null must be a positive whole number"),
        ({"attn_logit_softcapping": 0}, "attn_logit_softcapping = 0 must be a positive number"),
        ({"query_pre_attn_scalar": 0.5}, "query_pre_attn_scalar = 0.5 must be a positive whole"),
        ({"hidden_activation": "elu"}, 'hidden_activation = "elu" is not implemented'),
        ({"use_bidirectional_attention": True}, "asks for attention to later tokens"),
    ],
)
def test_what_gemma2_may_not_change(changes, problem):
    assert problem in refusal("gemma2", **changes)


def moe_of(family: str, /, **changes: Any) -> MoEConfig:
    moe = read(family, **changes).moe
    assert moe is not None
    return moe


def latent(family: str, /, **changes: Any) -> MLAConfig:
    mla = read(family, **changes).mla
    assert mla is not None
    return mla


EVERYWHERE = (True, True, True)


def test_dense_families_have_no_moe():
    for family in FAMILIES:
        config = read(family)
        assert (config.moe, config.mla) == (None, None)
        assert not (config.sinks or config.full_width_qk_norm)


def test_defaults_of_mixtral():
    config = read("mixtral")
    assert (config.family, config.kv_heads, config.head_dim) == ("mixtral", 8, 2)
    assert (config.norm_eps, config.rope.theta, config.max_position_embeddings) == (
        1e-5,
        1e6,
        131072,
    )
    assert config.windows == (None, None, None)
    assert (config.eos_ids, config.bos_id) == ((2,), 1)
    assert not (config.qkv_bias or config.o_bias or config.mlp_bias or config.qk_norm)
    part = "block_sparse_moe.experts.{}."
    names = PerExpertNames(
        "block_sparse_moe.gate.weight", f"{part}w1.weight", f"{part}w3.weight", f"{part}w2.weight"
    )
    assert config.moe == MoEConfig(16, 3, 96, EVERYWHERE, "softmax", True, ExpertNames(names))


def test_defaults_of_qwen2_moe():
    config = read("qwen2_moe")
    assert (config.kv_heads, config.head_dim, config.norm_eps) == (16, 2, 1e-6)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, False, False)
    assert (config.windows, config.max_position_embeddings) == ((None, None, None), 32768)
    assert (config.eos_ids, config.bos_id) == ((), None)
    names = ExpertNames(shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate.weight")
    assert config.moe == MoEConfig(
        16,
        3,
        24,
        EVERYWHERE,
        "softmax",
        False,
        names,
        shared_expert_intermediate_size=40,
        shared_gate=True,
    )


def test_defaults_of_qwen3_moe():
    config = read("qwen3_moe")
    assert (config.kv_heads, config.head_dim, config.norm_eps) == (4, 2, 1e-6)
    assert (config.qkv_bias, config.o_bias, config.qk_norm) == (False, False, True)
    assert (config.windows, config.max_position_embeddings) == ((None, None, None), 32768)
    assert config.moe == MoEConfig(16, 3, 24, EVERYWHERE, "softmax", False, ExpertNames())


def test_defaults_of_olmoe():
    config = read("olmoe")
    assert (config.kv_heads, config.head_dim, config.norm_eps) == (32, 2, 1e-5)
    assert (config.qkv_bias, config.o_bias) == (False, False)
    assert (config.qk_norm, config.full_width_qk_norm) == (False, True)
    assert (config.eos_ids, config.bos_id, config.max_position_embeddings) == ((50279,), None, 4096)
    assert config.moe == MoEConfig(16, 3, 96, EVERYWHERE, "softmax", False, ExpertNames())


def test_defaults_of_gpt_oss():
    config = read("gpt_oss")
    assert (config.kv_heads, config.head_dim, config.norm_eps) == (8, 64, 1e-5)
    assert (config.qkv_bias, config.o_bias, config.sinks) == (True, True, True)
    assert config.windows == (128, None, 128)
    assert config.rope == Rope("yarn", 150000.0, 32.0, 4096, truncate=False)
    assert (config.eos_ids, config.bos_id, config.max_position_embeddings) == ((), None, 131072)
    moe = config.moe
    assert moe is not None
    assert (moe.num_experts, moe.top_k, moe.moe_intermediate_size, moe.layers) == (
        16,
        3,
        96,
        EVERYWHERE,
    )
    assert (moe.scoring, moe.norm_topk_prob, moe.routed_scaling_factor) == ("softmax", True, 1.0)
    assert (moe.router_bias, moe.expert_bias, moe.alpha, moe.limit) == (True, True, 1.702, 7.0)
    assert moe.names == ExpertNames(
        None,
        StackedNames(
            "mlp.router.weight",
            router_bias="mlp.router.bias",
            gate_up_bias="mlp.experts.gate_up_proj_bias",
            down_bias="mlp.experts.down_proj_bias",
            transposed=True,
            alternating=True,
        ),
    )


def test_defaults_of_deepseek_v2():
    config = read("deepseek_v2")
    assert (config.kv_heads, config.head_dim, config.norm_eps) == (1, 20, 1e-6)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (False, False, False)
    assert (config.eos_ids, config.bos_id, config.max_position_embeddings) == ((2,), 1, 2048)
    assert config.mla == MLAConfig(1536, 20, 12, 8, 10, bias=False, interleaved=True)
    names = ExpertNames(shared="mlp.shared_experts")
    assert config.moe == MoEConfig(
        16, 3, 24, EVERYWHERE, "softmax", False, names, shared_expert_intermediate_size=48
    )


def test_defaults_of_deepseek_v3():
    config = read("deepseek_v3", num_hidden_layers=5)
    assert (config.kv_heads, config.head_dim, config.norm_eps) == (1, 20, 1e-6)
    assert (config.eos_ids, config.bos_id, config.max_position_embeddings) == ((1,), 0, 4096)
    assert config.mla == MLAConfig(1536, 20, 12, 8, 10, bias=False, interleaved=True)
    assert config.moe == MoEConfig(
        num_experts=16,
        top_k=3,
        moe_intermediate_size=24,
        layers=(False, False, False, True, True),
        scoring="sigmoid",
        norm_topk_prob=True,
        names=ExpertNames(
            e_score_correction_bias="mlp.gate.e_score_correction_bias", shared="mlp.shared_experts"
        ),
        routed_scaling_factor=2.5,
        e_score_correction_bias=True,
        n_group=8,
        topk_group=4,
        group_score="top-2 sum",
        shared_expert_intermediate_size=24,
    )


# -- options


def test_head_width():
    assert read(head_dim=None).head_dim == 2
    assert read(head_dim=10).head_dim == 10
    assert read("qwen2", head_dim=10).head_dim == 10
    assert read("qwen3", head_dim=None).head_dim == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_key_value_heads(family):
    assert read(family, num_key_value_heads=4).kv_heads == 4
    assert read(family, num_key_value_heads=None).kv_heads == 32


def test_biases():
    config = read(attention_bias=True)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, False)
    config = read(mlp_bias=True)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (False, False, True)
    config = read("qwen3", attention_bias=True)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, False)


@pytest.mark.parametrize(
    "name, means",
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu_pytorch_tanh", "gelu_pytorch_tanh"),
        ("gelu_new", "gelu_pytorch_tanh"),
        ("relu", "relu"),
    ],
)
def test_activations(name, means):
    assert read(hidden_act=name).activation == means


def test_simple_fields():
    config = read(tie_word_embeddings=True, rms_norm_eps=1e-5, max_position_embeddings=77)
    assert (config.tied, config.norm_eps, config.max_position_embeddings) == (True, 1e-5, 77)


@pytest.mark.parametrize("dtype", ["torch_dtype", "dtype"])
def test_the_dtype_of_the_weights_is_not_the_configurations_business(dtype):
    assert read(**{dtype: "bfloat16"}) == read()


def test_windows_of_mistral():
    assert read("mistral", sliding_window=7).windows == (7, 7, 7)
    assert read("mistral", sliding_window=None).windows == (None, None, None)
    sliding = ["sliding_attention"] * 3
    assert read("mistral", sliding_window=7, layer_types=sliding).windows == (7, 7, 7)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_windows_by_layer(family):
    used = {"use_sliding_window": True, "sliding_window": 7}
    assert read(family, **used).windows == (None, None, None)  # from layer 28
    assert read(family, **used, max_window_layers=1).windows == (None, 7, 7)
    assert read(family, **used, max_window_layers=0).windows == (7, 7, 7)
    mixed = ["sliding_attention", "full_attention", "sliding_attention"]
    assert read(family, **used, layer_types=mixed, max_window_layers=1).windows == (7, None, 7)
    default = read(family, use_sliding_window=True, max_window_layers=2)
    assert default.windows == (None, None, 4096)
    unused = read(family, use_sliding_window=False, sliding_window=7, max_window_layers=0)
    assert unused.windows == (None, None, None)


def test_end_of_sequence_ids():
    assert read(eos_token_id=5).eos_ids == (5,)
    assert read(eos_token_id=[5, 6]).eos_ids == (5, 6)
    assert read(eos_token_id=None).eos_ids == ()
    assert read("llama", {"eos_token_id": [7, 8]}, eos_token_id=5).eos_ids == (7, 8)
    assert read("llama", {"eos_token_id": None}, eos_token_id=5).eos_ids == (5,)
    assert read("llama", {"do_sample": True}, eos_token_id=5).eos_ids == (5,)


def test_begin_of_sequence_id():
    assert read(bos_token_id=5).bos_id == 5
    assert read(bos_token_id=None).bos_id is None
    assert read("llama", {"bos_token_id": 7}, bos_token_id=5).bos_id == 7


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_number_of_experts_in_every_spelling(family):
    given = {"num_experts", "num_local_experts", "n_routed_experts"}
    for name in given:
        spelled = dict.fromkeys(given, ABSENT) | {name: 8}
        changes = {"n_group": 2, "topk_group": 1} if family == "deepseek_v3" else {}
        assert moe_of(family, **spelled, **changes).num_experts == 8
    assert moe_of(family, num_experts=16, num_local_experts=16).num_experts == 16


def test_the_published_name_of_top_k_of_gpt_oss():
    assert moe_of("gpt_oss", experts_per_token=3).top_k == 3
    assert moe_of("gpt_oss", experts_per_token=3, num_experts_per_tok=ABSENT).top_k == 3


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"])
def test_normalized_weights(family):
    assert moe_of(family, norm_topk_prob=True).norm_topk_prob
    assert not moe_of(family, norm_topk_prob=False).norm_topk_prob


def test_deepseek_v2_does_not_normalize_whatever_its_file_says():
    assert read("deepseek_v2", norm_topk_prob=True) == read("deepseek_v2")


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_dense_layers_by_step_and_by_name(family):
    def layers(**changes):
        return moe_of(family, num_hidden_layers=4, **changes).layers

    assert layers(decoder_sparse_step=2) == (False, True, False, True)
    assert layers(decoder_sparse_step=3) == (False, False, True, False)
    assert layers(mlp_only_layers=[0, 2]) == (False, True, False, True)
    assert layers(decoder_sparse_step=2, mlp_only_layers=[3]) == (False, True, False, False)
    assert layers(mlp_only_layers=None) == (True, True, True, True)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_the_first_layers_of_deepseek_are_dense(family):
    layers = moe_of(family, first_k_dense_replace=1, moe_layer_freq=1).layers
    assert layers == (False, True, True)
    assert moe_of(family, first_k_dense_replace=0).layers == (True, True, True)


def test_shared_experts_of_deepseek():
    assert moe_of("deepseek_v3", n_shared_experts=3).shared_expert_intermediate_size == 72
    assert moe_of("deepseek_v3", n_shared_experts=None).shared_expert_intermediate_size == 0


def test_groups_of_deepseek_v2():
    groups = {"n_group": 4, "topk_group": 2}
    greedy = moe_of("deepseek_v2", topk_method="greedy", **groups)
    assert (greedy.n_group, greedy.topk_group) == (1, 1)
    assert moe_of("deepseek_v2", n_group=None, topk_group=None) == greedy
    limited = moe_of("deepseek_v2", topk_method="group_limited_greedy", **groups)
    assert (limited.n_group, limited.topk_group, limited.group_score) == (4, 2, "max")
    assert moe_of("deepseek_v2", routed_scaling_factor=16.0).routed_scaling_factor == 16.0


def test_groups_of_deepseek_v3():
    moe = moe_of("deepseek_v3", n_group=4, topk_group=2, topk_method="noaux_tc")
    assert (moe.n_group, moe.topk_group, moe.group_score) == (4, 2, "top-2 sum")


def test_latent_attention():
    direct = latent("deepseek_v2", q_lora_rank=None, head_dim=8, qk_head_dim=20)
    assert (direct.q_lora_rank, direct.bias) == (None, False)
    assert latent("deepseek_v3", q_lora_rank=14, rope_interleave=False).interleaved is False
    config = read("deepseek_v3", attention_bias=True)
    assert (config.mla and config.mla.bias, config.o_bias, config.qkv_bias) == (True, True, False)
    config = read("deepseek_v2", mlp_bias=True)
    assert (config.mlp_bias, config.o_bias) == (True, False)


def test_biases_of_moe_models():
    config = read("qwen2_moe", qkv_bias=False)
    assert (config.qkv_bias, config.o_bias) == (False, False)
    for family in ("qwen3_moe", "olmoe", "gpt_oss"):
        config = read(family, attention_bias=True)
        assert (config.qkv_bias, config.o_bias) == (True, True)
        config = read(family, attention_bias=False)
        assert (config.qkv_bias, config.o_bias) == (False, False)


def test_windows_of_moe_models():
    assert read("mixtral", sliding_window=7).windows == (7, 7, 7)
    assert read("qwen3_moe", sliding_window=7).windows == (None, None, None)
    used = {"use_sliding_window": True, "sliding_window": 7}
    assert read("qwen3_moe", **used, max_window_layers=1).windows == (7, 7, 7)
    assert read("qwen2_moe", sliding_window=0).windows == (None, None, None)
    assert read("qwen2_moe", **used).windows == (7, None, 7)
    assert read("qwen2_moe", **used, max_window_layers=1).windows == (7, None, None)
    mixed = ["full_attention", "sliding_attention", "sliding_attention"]
    for family in ("qwen2_moe", "gpt_oss"):
        changes = used if family == "qwen2_moe" else {"sliding_window": 7}
        assert read(family, **changes, layer_types=mixed).windows == (None, 7, 7)


def test_the_activation_of_gpt_oss():
    moe = moe_of("gpt_oss", swiglu_alpha=1.5, swiglu_limit=3)
    assert (moe.alpha, moe.limit) == (1.5, 3.0)


def test_the_rope_of_gpt_oss_is_stretched_unless_the_file_says_otherwise():
    assert read("gpt_oss", rope_theta=500.0).rope.kind == "yarn"
    assert read("gpt_oss", rope_parameters={"rope_type": "default"}).rope.kind == "default"


# -- rope: what each kind reads, in both spellings

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4,
    "beta_slow": 0.5,
    "attention_factor": 1.5,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
    "truncate": False,
}
ROPES = [
    ("default", {}, Rope("default", 500.0, original_positions=64), 64),
    ("linear", {"factor": 2.5}, Rope("linear", 500.0, 2.5, 64), 160),
    ("dynamic", {"factor": 2}, Rope("dynamic", 500.0, 2.0, 64), 128),
    ("llama3", LLAMA3, Rope("llama3", 500.0, 8.0, 16, 1.0, 4.0), 64),
    (
        "yarn",
        YARN,
        Rope(
            "yarn",
            500.0,
            8.0,
            16,
            beta_fast=4.0,
            beta_slow=0.5,
            attention_factor=1.5,
            mscale=0.7,
            mscale_all_dim=0.9,
            truncate=False,
        ),
        128,
    ),
]


@pytest.mark.parametrize("family", FAMILIES | MOE_FAMILIES)
@pytest.mark.parametrize("kind, fields, rope, positions", ROPES, ids=[row[0] for row in ROPES])
def test_ropes_in_every_spelling(kind, fields, rope, positions, family):
    base = {"max_position_embeddings": 64, "head_dim": 8, "hidden_size": 256}
    spellings = [
        {"rope_theta": 500.0, "rope_scaling": fields | {"type": kind}},
        {"rope_theta": 500, "rope_scaling": fields | {"rope_type": kind}},
        {"rope_theta": 500.0, "rope_scaling": fields | {"rope_type": kind, "type": kind}},
        {"rope_parameters": fields | {"rope_type": kind, "rope_theta": 500.0}},
        {"rope_scaling": None, "rope_parameters": fields | {"type": kind, "rope_theta": 500.0}},
        {"rope_theta": 500.0, "rope_parameters": fields | {"rope_type": kind, "rope_theta": 500}},
        {
            "rope_theta": 500.0,
            "rope_scaling": fields | {"type": kind},
            "rope_parameters": fields | {"rope_type": kind, "rope_theta": 500.0},
        },
    ]
    configs = {read(family, **base, **spelling) for spelling in spellings}
    assert len(configs) == 1
    config = configs.pop()
    assert config.rope == rope
    assert config.max_position_embeddings == positions


@pytest.mark.parametrize("empty", [ABSENT, None, {}])
def test_no_rope_scaling(empty):
    config = read(rope_theta=500.0, rope_scaling=empty, rope_parameters=empty)
    assert config.rope == Rope("default", 500.0, original_positions=2048)


def test_original_length_of_rope():
    fields = {"rope_type": "yarn", "factor": 4.0}
    base = {"max_position_embeddings": 64, "head_dim": 8}
    assert read(**base, rope_scaling=fields).rope.original_positions == 64
    inside = fields | {"original_max_position_embeddings": 16}
    assert read(**base, rope_scaling=inside).rope.original_positions == 16
    # As in transformers, the one outside overrules the one inside …
    config = read(**base, rope_scaling=inside, original_max_position_embeddings=32)
    assert config.rope.original_positions == 32
    # … and dynamic rope looks at neither.
    dynamic = inside | {"rope_type": "dynamic"}
    config = read(**base, rope_scaling=dynamic, original_max_position_embeddings=32)
    assert config.rope.original_positions == 64


def test_yarn_without_a_factor_takes_the_ratio_of_the_lengths():
    fields = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16}
    config = read(max_position_embeddings=64, rope_scaling=fields)
    assert (config.rope.factor, config.max_position_embeddings) == (4.0, 64)


def test_defaults_of_yarn():
    fields = {"type": "yarn", "factor": 2.0, "beta_fast": None, "mscale": 0, "finetuned": True}
    rope = read(rope_scaling=fields).rope
    assert (rope.beta_fast, rope.beta_slow, rope.truncate) == (32.0, 1.0, True)
    assert (rope.attention_factor, rope.mscale, rope.mscale_all_dim) == (None, None, None)


# -- real configurations, as the Hub has them


def test_llama_3_2():
    config = read_model_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.45.0.dev0",
            "use_cache": True,
            "vocab_size": 128256,
        },
        {"bos_token_id": 128000, "do_sample": True, "eos_token_id": [128001, 128008, 128009]},
        SOURCE,
    )
    assert (config.heads, config.kv_heads, config.head_dim, config.tied) == (32, 8, 64, True)
    assert config.rope == Rope("llama3", 500000.0, 32.0, 8192, 1.0, 4.0)
    assert config.max_position_embeddings == 131072
    assert config.eos_ids == (128001, 128008, 128009)


def test_qwen2_5_with_yarn():
    config = read_model_config(
        {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "hidden_act": "silu",
            "hidden_size": 3584,
            "initializer_range": 0.02,
            "intermediate_size": 18944,
            "max_position_embeddings": 32768,
            "max_window_layers": 28,
            "model_type": "qwen2",
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "rope_scaling": {
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "type": "yarn",
            },
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.43.1",
            "use_cache": True,
            "use_mrope": False,
            "use_sliding_window": False,
            "vocab_size": 152064,
        },
        {"eos_token_id": [151645, 151643], "pad_token_id": 151643, "top_k": 20},
        SOURCE,
    )
    assert config.max_position_embeddings == 131072
    assert set(config.windows) == {None}
    assert config.eos_ids == (151645, 151643)


def test_mistral_as_transformers_5_writes_it():
    config = read_model_config(
        {
            "architectures": ["MistralForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "dtype": "bfloat16",
            "eos_token_id": 2,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 5120,
            "initializer_range": 0.02,
            "intermediate_size": 32768,
            "max_position_embeddings": 131072,
            "model_type": "mistral",
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "pad_token_id": 11,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {"rope_theta": 1000000000.0, "rope_type": "default"},
            "sliding_window": None,
            "tie_word_embeddings": False,
            "transformers_version": "5.10.2",
            "unsloth_version": "2025.12.5",
            "use_cache": False,
            "vocab_size": 131072,
        },
        None,
        SOURCE,
    )
    assert config.head_dim == 128
    assert config.rope.theta == 1e9


# The files of published MoE models, without bookkeeping that says nothing.


def test_mixtral_8x7b():
    config = read_model_config(
        {
            "architectures": ["MixtralForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mixtral",
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "output_router_logits": False,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.36.0.dev0",
            "use_cache": True,
            "vocab_size": 32000,
        },
        None,
        SOURCE,
    )
    assert config.moe is not None
    assert (config.moe.num_experts, config.moe.top_k, config.moe.moe_intermediate_size) == (
        8,
        2,
        14336,
    )


def test_qwen3_30b():
    config = read_model_config(
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "decoder_sparse_step": 1,
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "output_router_logits": False,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.51.0",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        None,
        SOURCE,
    )
    assert config.moe is not None
    assert (config.moe.num_experts, config.moe.top_k, config.moe.moe_intermediate_size) == (
        128,
        8,
        768,
    )
    assert (config.moe.norm_topk_prob, config.head_dim) == (True, 128)


def test_gpt_oss_20b():
    types = ["sliding_attention", "full_attention"] * 12
    config = read_model_config(
        {
            "architectures": ["GptOssForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "eos_token_id": 200002,
            "experts_per_token": 4,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2880,
            "initial_context_length": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 2880,
            "layer_types": types,
            "max_position_embeddings": 131072,
            "model_type": "gpt_oss",
            "num_attention_heads": 64,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_key_value_heads": 8,
            "num_local_experts": 32,
            "output_router_logits": False,
            "pad_token_id": 199999,
            "quantization_config": {
                "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
                "quant_method": "mxfp4",
            },
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "truncate": False,
            },
            "rope_theta": 150000,
            "router_aux_loss_coef": 0.9,
            "sliding_window": 128,
            "swiglu_limit": 7.0,
            "tie_word_embeddings": False,
            "transformers_version": "4.55.0.dev0",
            "use_cache": True,
            "vocab_size": 201088,
        },
        None,
        SOURCE,
    )
    assert config.windows == (128, None) * 12
    assert config.max_position_embeddings == 131072


def test_deepseek_v2_lite():
    config = read_model_config(
        {
            "architectures": ["DeepseekV2ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM"},
            "aux_loss_alpha": 0.001,
            "bos_token_id": 100000,
            "eos_token_id": 100001,
            "first_k_dense_replace": 1,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 10944,
            "kv_lora_rank": 512,
            "max_position_embeddings": 163840,
            "model_type": "deepseek_v2",
            "moe_intermediate_size": 1408,
            "moe_layer_freq": 1,
            "n_group": 1,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 27,
            "num_key_value_heads": 16,
            "pretraining_tp": 1,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 40,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
                "original_max_position_embeddings": 4096,
                "type": "yarn",
            },
            "rope_theta": 10000,
            "routed_scaling_factor": 1.0,
            "scoring_func": "softmax",
            "seq_aux": True,
            "tie_word_embeddings": False,
            "topk_group": 1,
            "topk_method": "greedy",
            "torch_dtype": "bfloat16",
            "transformers_version": "4.33.1",
            "use_cache": True,
            "v_head_dim": 128,
            "vocab_size": 102400,
        },
        None,
        SOURCE,
    )
    assert config.moe is not None
    assert config.moe.layers == (False,) + (True,) * 26
    assert (
        config.moe.num_experts,
        config.moe.shared_expert_intermediate_size,
        config.moe.n_group,
    ) == (64, 2816, 1)
    assert config.mla == MLAConfig(None, 512, 128, 64, 128, bias=False, interleaved=True)
    assert config.max_position_embeddings == 163840


@pytest.mark.parametrize("variant", [*VARIANTS, *MOE_VARIANTS])
def test_tiny_models_are_read(variant):
    config = tiny_config(variant)
    assert config.raw == raw_config(variant)
    assert len(config.windows) == config.layers


# -- fields without effect


@pytest.mark.parametrize(
    "field, value",
    [
        ("pretraining_tp", 2),
        ("attention_dropout", 0.1),
        ("_name_or_path", "somebody/something"),
        ("image_token_id", 7),
        ("quantization_config", None),
        ("never_heard_of", None),
        ("never_heard_of", False),
        ("never_heard_of", 0.0),
        ("never_heard_of", ""),
        ("never_heard_of", []),
        ("never_heard_of", {}),
        ("internal_version", "1.0"),
        ("attention_head_dim", 2),
        ("document_attention", True),
        ("partial_rotary_factor", 1.0),
        ("residual_multiplier", 1.0),
        ("num_local_experts", 0),
        ("use_sliding_window", False),
        ("layer_types", ["full_attention"] * 3),
        ("sliding_window", None),
    ],
)
def test_ignored(field, value):
    assert read(**{field: value}) == read()


def test_what_published_files_of_qwen3_say_of_no_use():
    more = {"qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True}
    assert read("qwen3_moe", **more) == read("qwen3_moe")
    assert "use_qk_norm = false is not implemented: true is" in refusal("qwen3", use_qk_norm=False)


@pytest.mark.parametrize("field", ["rotary_dim", "num_kv_heads", "parallel_attn"])
def test_a_field_that_transformers_knows_for_the_family_passes_with_no_value(field, monkeypatch):
    assert read(**{field: False}) == read()
    known = KNOWN_FIELDS | {"llama": KNOWN_FIELDS["llama"] | {field}}
    monkeypatch.setattr("mpishard.config.fields.KNOWN_FIELDS", known)
    nothings: tuple[Any, ...] = (None, False, 0, "", [])
    for nothing in nothings:
        assert f"{field} = {json.dumps(nothing)} is not a field that" in refusal(**{field: nothing})


@pytest.mark.parametrize("family", FAMILIES | MOE_FAMILIES)
def test_fields_that_transformers_knows_for_a_family_are_read_or_named(family):
    """No null is refused, as it would be in a field that no reader asks for and no table has."""
    known = dict.fromkeys(COMMON_FIELDS | KNOWN_FIELDS[family])
    needed = {"sliding_window": 4096} if family == "gemma2" else {}
    read(family, **(known | document(family) | needed))


# -- fields that the user answers for


def answered(names: list[str], /, **changes: Any) -> ModelConfig:
    return read_model_config(document(**changes), None, SOURCE, names)


def test_the_user_answers_for_fields():
    config = answered(
        ["frobnicate", "partial_rotary_factor", "rope_scaling.odd"],
        frobnicate=3,
        partial_rotary_factor=0.5,
        rope_scaling={"type": "linear", "factor": 2.0, "odd": [1]},
    )
    assert config == read(rope_scaling={"type": "linear", "factor": 2.0})
    assert config.ignored_fields == ("frobnicate", "partial_rotary_factor", "rope_scaling.odd")
    with pytest.raises(UserError, match="odd_too = 1 is not a field that is known for llama"):
        answered(["frobnicate"], frobnicate=3, odd_too=1)


@pytest.mark.parametrize(
    "name, changes, problem",
    [
        ("frobnicate", {}, "is not a field of the file"),
        ("rope_scaling.odd", {"rope_scaling": {"type": "default"}}, "is not a field of the file"),
        ("odd", {"rope_scaling": {"type": "default", "odd": 0}}, "is not a field of the file"),
        ("hidden_size", {}, "is implemented, or changes nothing"),
        ("hidden_act", {"hidden_act": "silu"}, "is implemented, or changes nothing"),
        ("use_cache", {"use_cache": True}, "is implemented, or changes nothing"),
        ("frobnicate", {"frobnicate": 0}, "is implemented, or changes nothing"),
    ],
)
def test_an_answer_without_effect_is_refused(name, changes, problem):
    with pytest.raises(UserError) as caught:
        answered([name], **changes)
    assert str(caught.value) == (
        f"{SOURCE}: --ignore-config {name} has no effect, because it {problem}: leave it out"
    )


# -- multimodal files


def wrapped(text: dict[str, Any] | None = None, /, **outer: Any) -> dict[str, Any]:
    """The file of Mistral 3 around a mistral model."""
    text = document("mistral", architectures=ABSENT) if text is None else text
    least = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": text,
        "vision_config": {"hidden_size": 12, "model_type": "pixtral"},
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
        "image_token_index": 10,
    }
    return {name: value for name, value in (least | outer).items() if value is not ABSENT}


def unwrapped(text: dict[str, Any] | None = None, /, **outer: Any) -> ModelConfig:
    return read_model_config(wrapped(text, **outer), None, SOURCE)


def test_the_text_half_of_a_multimodal_file():
    raw = wrapped()
    config = read_model_config(raw, None, SOURCE)
    assert config == replace(read("mistral", tie_word_embeddings=True), wrapper="mistral3")
    assert config.raw == raw
    assert unwrapped(architectures=ABSENT) == unwrapped(model_type=ABSENT) == config
    assert unwrapped(tie_word_embeddings=False) == replace(config, tied=False)
    text = document("mistral", tie_word_embeddings=False)
    assert unwrapped(text) == replace(config, tied=False)
    assert unwrapped(text, tie_word_embeddings=True) == config


def test_fields_beside_the_text_half():
    config = unwrapped(eos_token_id=[1, 6], bos_token_id=4)
    assert (config.eos_ids, config.bos_id) == ((1, 6), 4)
    text = document("mistral", eos_token_id=9)
    assert unwrapped(text, eos_token_id=[1, 6]).eos_ids == (9,)


@pytest.mark.parametrize("within", [True, False])
def test_modules_of_a_quantized_text_half_in_all_spellings(within):
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
            }
        },
        "ignore": [
            *("language_model.lm_head", "re:vision_tower.*"),
            *("language_model.model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"),
            "re:model.language_model.layers.2.*",
        ],
    }
    text = document("mistral")
    outer: dict[str, Any] = {}
    (text if within else outer)["quantization_config"] = quantization
    config = unwrapped(text, **outer)
    assert config.quantization is not None
    for module in ("lm_head", *(f"model.layers.{layer}.mlp.up_proj" for layer in range(3))):
        assert config.quantization.scheme(module) is None
    for layer in range(2):
        assert config.quantization.scheme(f"model.layers.{layer}.mlp.down_proj")


def test_sizes_that_a_text_config_omits_are_those_of_its_class():
    config = unwrapped({"model_type": "mistral", "hidden_size": 1024})
    sizes = (config.hidden, config.ffn, config.layers, config.heads, config.vocab)
    assert sizes == (1024, 14336, 32, 32, 32000)


def qwen_vl(name: str, text: dict[str, Any], /, **outer: Any) -> ModelConfig:
    architecture = {
        "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
        "qwen3_vl": "Qwen3VLForConditionalGeneration",
        "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    }[name]
    raw = {"architectures": [architecture], "model_type": name, "vision_config": {"depth": 2}}
    return read_model_config(raw | outer | text, None, SOURCE)


MROPE = {"mrope_section": [2, 1, 1], "mrope_interleaved": True}


@pytest.mark.parametrize("family, name", [("qwen3", "qwen3_vl"), ("qwen3_moe", "qwen3_vl_moe")])
def test_qwen3_vl(family, name):
    text = document(family, model_type=f"{name}_text", architectures=ABSENT)
    least = {"rope_theta": 500000.0, "max_position_embeddings": 128000}
    if name == "qwen3_vl_moe":
        least |= {"norm_topk_prob": True, "num_key_value_heads": 16, "head_dim": 128}
    right = replace(read(family, tie_word_embeddings=True, **least), wrapper=name)
    if right.moe:
        stacked = replace(right.moe.names.stacked, transposed=True)
        right = replace(
            right, moe=replace(right.moe, names=replace(right.moe.names, stacked=stacked))
        )
    for rope in ({"rope_type": "default"} | MROPE, {"rope_theta": 500000.0} | MROPE, MROPE, None):
        for field in ("rope_scaling", "rope_parameters"):
            assert qwen_vl(name, {"text_config": text | {field: rope}}) == right
    if name == "qwen3_vl_moe":
        with pytest.raises(UserError, match="text_config.norm_topk_prob = false is not implem"):
            qwen_vl(name, {"text_config": text | {"norm_topk_prob": False}})


def test_qwen2_5_vl_with_its_text_half_within_and_beside():
    rope = {"type": "mrope", "mrope_section": [2, 1, 1]}
    text = document("qwen2", rope_scaling=rope, num_key_value_heads=4, architectures=ABSENT)
    least = {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    right = replace(read("qwen2", num_key_value_heads=4, **least), wrapper="qwen2_5_vl")
    nested = {"text_config": text | {"model_type": "qwen2_5_vl_text"}}
    assert qwen_vl("qwen2_5_vl", nested) == right
    assert qwen_vl("qwen2_5_vl", text | {"model_type": "qwen2_5_vl"}) == right


def test_the_text_half_of_kimi():
    text = document("deepseek_v3", model_type="kimi_k2")
    raw = {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "auto_map": {"AutoModel": "modeling_kimi_k25.KimiK25ForConditionalGeneration"},
        "use_unified_vision_chunk": True,
        "text_config": text,
    }
    right = read("deepseek_v3", tie_word_embeddings=True)
    assert read_model_config(raw, None, SOURCE) == replace(right, wrapper="kimi_k25")


def test_the_page_on_checkpoints_lists_all_wrappers():
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    for wrapper in WRAPPERS:
        assert re.search(rf"^\|.*\b{wrapper.name}\b.*\|", page, re.MULTILINE), wrapper.name
        for family in wrapper.families.values():
            assert re.search(rf"^\|.*\b{wrapper.name}\b.*\| .*\b{family}\b", page, re.MULTILINE)


@pytest.mark.parametrize(
    "raw, problem",
    [
        (wrapped(text_config=ABSENT), "text_config is missing: it must hold the fields of the lan"),
        (wrapped(text_config=None), "text_config = null is missing: it must hold the fields"),
        (wrapped(text_config={}), "text_config = {} is missing: it must hold the fields"),
        (wrapped(text_config=[1]), "text_config = [1] must be an object"),
        (wrapped(text_config="mistral"), 'text_config = "mistral" must be an object'),
        (
            wrapped(document("mistral", model_type="llama")),
            'text_config.model_type = "llama" is not implemented in mistral3; the README lists',
        ),
        (wrapped(document("mistral", model_type=["x"])), 'text_config.model_type = ["x"] is not'),
        (
            wrapped(document("mistral", hidden_size="64")),
            'text_config.hidden_size = "64" must be a positive whole number',
        ),
        (
            wrapped(document("mistral", odd=1)),
            f"text_config.odd = 1 is not a field that is known for mistral: {REMOVE} "
            "text_config.odd",
        ),
        (
            wrapped(document("mistral", rope_scaling={"type": "linear", "factor": 2.0, "odd": 1})),
            "text_config.rope_scaling.odd = 1 is not a field that is known for rope type linear",
        ),
        (wrapped(odd=1), f"odd = 1 is not a field that is known for mistral3: {REMOVE} odd"),
        (wrapped(is_causal=False), "is_causal = false asks for attention to later tokens"),
        (wrapped(model_type="llava"), 'model_type = "llava" must be "mistral3", as architectures'),
        (wrapped(model_type=3), "model_type = 3 must be a string"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_multimodal_files_that_are_refused(raw, problem):
    with pytest.raises(UserError) as caught:
        read_model_config(raw, None, SOURCE)
    assert str(caught.value).startswith(f"{SOURCE}: {problem}")


# -- refusals


def refusal(family: str = "llama", generation: Any = None, /, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(family, generation, **changes)
    return str(caught.value)


@pytest.mark.parametrize("architectures", [[], None, ABSENT])
def test_model_type_names_the_family_where_there_are_no_architectures(architectures):
    assert read(architectures=architectures) == read()
    assert read("mistral", architectures=architectures) == read("mistral")
    sentence = refusal(architectures=architectures, model_type="no_such_model")
    assert sentence.startswith(f'{SOURCE}: model_type = "no_such_model" is not implemented')
    sentence = refusal(architectures=architectures, model_type=ABSENT)
    assert "is missing, and so is model_type: one must name the family" in sentence


@pytest.mark.parametrize(
    "architectures, problem",
    [
        (["NoSuchForCausalLM"], "is not implemented; the README lists those that are"),
        ([[]], "must be a list of one name"),
        ("LlamaForCausalLM", "must be a list of one name"),
        (["LlamaForCausalLM", "LlamaModel"], "must be a list of one name"),
    ],
)
def test_unknown_architecture(architectures, problem):
    sentence = refusal(architectures=architectures)
    value = json.dumps(architectures)
    assert sentence == f"{SOURCE}: architectures = {value} {problem}"


def test_other_spellings_of_model_type():
    assert read("deepseek_v3", model_type="kimi_k2") == read("deepseek_v3")
    assert read("deepseek_v3", model_type="kimi_k2", architectures=None) == read("deepseek_v3")


def test_not_an_object():
    with pytest.raises(UserError, match=r"model/config.json must hold a JSON object, not \[1\]"):
        read_model_config([1], None, SOURCE)  # type: ignore[arg-type]


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    (
        "llama",
        {"model_type": "mistral"},
        'model_type = "mistral" must be "llama", as architectures is LlamaForCausalLM',
    ),
    # Missing, of the wrong type, out of range.
    *[
        ("llama", {name: ABSENT}, f"{name} is missing: it must be a positive whole number")
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
        )
    ],
    ("llama", {"hidden_size": None}, "hidden_size = null is missing"),
    ("llama", {"hidden_size": "64"}, 'hidden_size = "64" must be a positive whole number'),
    ("llama", {"hidden_size": 64.0}, "hidden_size = 64.0 must be a positive whole number"),
    ("llama", {"hidden_size": -64}, "hidden_size = -64 must be a positive whole number"),
    ("llama", {"vocab_size": True}, "vocab_size = true must be a positive whole number"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers = 0 must be a positive whole number"),
    ("llama", {"rms_norm_eps": "1e-5"}, 'rms_norm_eps = "1e-5" must be a number that is not'),
    ("llama", {"rms_norm_eps": -1e-5}, "rms_norm_eps = -1e-05 must be a number that is not"),
    ("llama", {"rms_norm_eps": 0}, "rms_norm_eps = 0 must be a positive number"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps = NaN must be a number that is not"),
    ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps = 1000"),
    ("llama", {"mlp_bias": 1}, "mlp_bias = 1 must be true or false"),
    ("llama", {"tie_word_embeddings": "no"}, 'tie_word_embeddings = "no" must be true or false'),
    ("llama", {"hidden_act": 3}, "hidden_act = 3 must be a string"),
    ("llama", {"eos_token_id": "</s>"}, 'eos_token_id = ["</s>"] must be token ids'),
    ("llama", {"bos_token_id": [1]}, "bos_token_id = [1] must be a token id"),
    # Values that do not go together.
    (
        "llama",
        {"num_attention_heads": 12, "head_dim": None},
        "hidden_size = 64 must be a multiple of num_attention_heads = 12, or head_dim",
    ),
    ("llama", {"head_dim": 5}, "head_dim = 5 must be even"),
    (
        "llama",
        {"num_key_value_heads": 5},
        "num_attention_heads = 32 must be a multiple of num_key_value_heads = 5",
    ),
    (
        "mistral",
        {"num_attention_heads": 4},
        "num_attention_heads = 4 must be a multiple of num_key_value_heads = 8, mistral's default",
    ),
    # Activations, biases, windows.
    (
        "llama",
        {"hidden_act": "mish"},
        'hidden_act = "mish" is not implemented: silu, swish, gelu_pytorch_tanh, gelu_new, '
        "gelu_fast, gelu, relu, relu2",
    ),
    ("mistral", {"attention_bias": True}, "attention_bias = true contradicts the family"),
    ("qwen2", {"attention_bias": False}, "attention_bias = false contradicts the family"),
    ("qwen3", {"mlp_bias": True}, "mlp_bias = true contradicts the family"),
    ("llama", {"sliding_window": 8}, "sliding_window = 8 is not a field that is known for llama"),
    ("llama", {"use_sliding_window": True}, "use_sliding_window = true contradicts llama"),
    ("mistral", {"sliding_window": 0}, "sliding_window = 0 must be a positive whole number"),
    ("mistral", {"use_sliding_window": False}, "use_sliding_window = false contradicts mistral"),
    (
        "mistral",
        {"layer_types": ["full_attention"] * 3},
        "contradicts mistral, whose layers are all alike",
    ),
    ("qwen3", {"max_window_layers": -1}, "max_window_layers = -1 must be a whole number that is"),
    (
        "qwen3",
        {"layer_types": ["chunked_attention"] * 3},
        "must be a list of full_attention and sliding_attention",
    ),
    ("qwen3", {"layer_types": "full_attention"}, 'layer_types = "full_attention" must be a list'),
    ("qwen3", {"layer_types": ["full_attention"]}, "must have one entry for each of the 3 layers"),
    (
        "qwen3",
        {"layer_types": ["sliding_attention"] * 3, "sliding_window": 4},
        "has sliding_attention, but no sliding window is in use",
    ),
    # Rope.
    (
        "llama",
        {"rope_scaling": {"rope_type": "proportional", "factor": 2.0}},
        'rope_scaling.rope_type = "proportional" is not implemented: '
        "default, linear, dynamic, llama3, yarn, longrope are",
    ),
    ("llama", {"rope_scaling": {"type": "su"}}, 'rope_scaling.type = "su" is not implemented'),
    ("llama", {"rope_scaling": "linear"}, 'rope_scaling = "linear" must be an object'),
    (
        "llama",
        {"rope_scaling": {"type": "linear"}},
        "rope_scaling.factor is missing: it must be a positive number",
    ),
    (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": "2"}},
        'rope_parameters.factor = "2" must be a number',
    ),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "must be at least 1, not 0.5"),
    (
        "llama",
        {"rope_scaling": LLAMA3 | {"rope_type": "llama3", "low_freq_factor": 4.5}},
        "rope_scaling.high_freq_factor = 4.0 must be at least low_freq_factor = 4.5",
    ),
    (
        "llama",
        {"attention_head_dim": 4},
        "attention_head_dim = 4 is not implemented: 2 is",
    ),
    (
        "llama",
        {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
        "rope_scaling.low_freq_factor is missing",
    ),
    ("llama", {"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing"),
    (
        "llama",
        {"rope_scaling": YARN | {"type": "yarn", "truncate": 1}},
        "rope_scaling.truncate = 1 must be true or false",
    ),
    (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}},
        f"rope_scaling.beta_fast = 3 is not a field that is known for rope type linear: {REMOVE}",
    ),
    (
        "qwen2",
        {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}},
        "rope_scaling.mrope_section = [1, 2] asks for multimodal rope",
    ),
    (
        "llama",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor = 0.5 asks for a rotation of part of each head",
    ),
    (
        "qwen3",
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "rope_parameters.full_attention",
    ),
    (
        "llama",
        {"rope_theta": 100.0, "rope_parameters": {"rope_type": "default", "rope_theta": 200.0}},
        "rope_parameters.rope_theta = 200.0 contradicts rope_theta = 100 outside",
    ),
    (
        "llama",
        {
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "linear", "factor": 3.0},
        },
        "contradicts rope_parameters: keep the right one",
    ),
    ("llama", {"rope_theta": 1}, "rope_theta = 1 must be above 1"),
    (
        "llama",
        {"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "head_dim = 2 must be at least 4 for dynamic rope, not 2",
    ),
    # What is not implemented, by name.
    *[
        ("llama", {name: value}, f"asks for {what}, not implemented: {REMOVE}")
        for name, value, what in [
            ("auto_map", {"AutoModel": "modeling.Model"}, "code of its own"),
            ("partial_rotary_factor", 0.5, "a rotation of part of each head"),
            ("final_logit_softcapping", 30.0, "soft-capped logits"),
            ("attn_logit_softcapping", 50.0, "soft-capped attention scores"),
            ("residual_multiplier", 0.22, "scaled residuals"),
            ("embedding_multiplier", 12, "scaled embeddings"),
            ("attention_multiplier", 0.1, "another scale of the attention scores"),
            ("logits_scaling", 8, "scaled logits"),
            ("attention_chunk_size", 8192, "chunked attention"),
            ("num_local_experts", 8, "a mixture of experts"),
            ("is_causal", False, "attention to later tokens"),
        ]
    ],
    (
        "llama",
        {"frobnicate": 3},
        f"frobnicate = 3 is not a field that is known for llama: {REMOVE}",
    ),
    # Mixtures of experts.
    *[
        (family, {name: ABSENT}, f"{name} is missing: it must be a positive whole number")
        for family in MOE_FAMILIES
        for name in LEAST[family]
        if name not in ("num_local_experts", "n_routed_experts")
    ],
    ("olmoe", {"num_experts": ABSENT}, "num_experts is missing: it must be a positive whole"),
    (
        "qwen3_moe",
        {"num_local_experts": 8},
        "num_local_experts = 8 contradicts num_experts = 16",
    ),
    ("qwen3_moe", {"num_experts_per_tok": 17}, "num_experts_per_tok = 17 must be at most the 16"),
    ("gpt_oss", {"experts_per_token": 4}, "experts_per_token = 4 contradicts num_experts_per_tok"),
    (
        "mixtral",
        {"norm_topk_prob": True},
        f"norm_topk_prob = true is not a field that is known for mixtral: {REMOVE}",
    ),
    ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step = 0 must be a positive whole"),
    ("qwen2_moe", {"mlp_only_layers": [0.5]}, "mlp_only_layers = [0.5] must be a list of the"),
    ("qwen3_moe", {"layer_types": ["sliding_attention"] * 3}, "has sliding_attention, but no"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0 asks for clipped queries, keys and values"),
    ("olmoe", {"head_dim": 4}, "head_dim = 4 contradicts olmoe, whose heads fill hidden_size"),
    ("gpt_oss", {"hidden_act": "relu"}, 'hidden_act = "relu" contradicts gpt_oss, where it is'),
    ("gpt_oss", {"swiglu_limit": 0}, "swiglu_limit = 0 must be a positive number"),
    (
        "gpt_oss",
        {"quantization_config": {"quant_method": "awq"}},
        'quantization_config.quant_method = "awq" must be one of mxfp4: take the model',
    ),
    (
        "mixtral",
        {"quantization_config": {"quant_method": "mxfp4"}},
        'quantization_config.quant_method = "mxfp4" must be one of fp8, fbgemm_fp8, ',
    ),
    ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq = 2 is not implemented: 1 is"),
    (
        "deepseek_v2",
        {"topk_method": "noaux_tc"},
        'topk_method = "noaux_tc" is not implemented: "greedy" and "group_limited_greedy" are',
    ),
    ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "n_group is missing"),
    (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 1},
        "num_experts_per_tok = 3 must be at most the 2 experts in 1 of 8 groups",
    ),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, 'scoring_func = "sigmoid" is not implemented'),
    ("deepseek_v2", {"head_dim": 12}, "head_dim = 12 contradicts qk_rope_head_dim = 8"),
    ("deepseek_v2", {"qk_rope_head_dim": 7}, "qk_rope_head_dim = 7 must be even for rope's pairs"),
    ("deepseek_v2", {"qk_head_dim": 21}, "qk_head_dim = 21 is not implemented: 20 is"),
    (
        "deepseek_v2",
        {"num_key_value_heads": 8},
        "num_key_value_heads = 8 must be num_attention_heads = 32",
    ),
    ("deepseek_v3", {"topk_method": "greedy"}, 'topk_method = "greedy" is not implemented'),
    ("deepseek_v3", {"n_group": 5}, "n_group = 5 must divide the 16 experts"),
    ("deepseek_v3", {"n_group": 16}, "n_group = 16 must leave two of the 16 experts to a group"),
    ("deepseek_v3", {"topk_group": 9}, "topk_group = 9 must be at most n_group = 8"),
    ("deepseek_v3", {"first_k_dense_replace": -1}, "first_k_dense_replace = -1 must be a whole"),
    ("deepseek_v3", {"rope_interleave": "no"}, 'rope_interleave = "no" must be true or false'),
    ("deepseek_v3", {"mlp_bias": True}, "mlp_bias = true contradicts the family"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000 must be at most 10000"),
    ("llama", {"hidden_size": 2**31}, "hidden_size = 2147483648 must be at most 2147483647"),
    ("qwen2", {"max_window_layers": 10**30}, "must be a whole number that is not negative"),
    (
        "mixtral",
        {"num_local_experts": 10**6},
        "num_local_experts = 1000000 must be at most 200000 in all 3 layers together",
    ),
    (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 1e308}},
        "factor = 1e+308 of the rope makes",
    ),
    (
        "llama",
        {
            "rope_scaling": {
                "type": "yarn",
                "factor": 1e300,
                "original_max_position_embeddings": 64,
            }
        },
        "positions, of which there can be at most 2147483647",
    ),
    ("llama", {"a\nb": 1}, "a\\nb = 1 is not a field that is known for llama"),
    ("llama", {500 * "x": 1}, f"{100 * 'x'}… = 1 is not a field"),
    ("qwen2", {"mtp": [1]}, f"mtp = [1] is not a field that is known for qwen2: {REMOVE}"),
]


@pytest.mark.parametrize("family, changes, words", REFUSALS, ids=[row[2] for row in REFUSALS])
def test_refusals(family, changes, words):
    sentence = refusal(family, **changes)
    assert sentence.startswith(f"{SOURCE}: ")
    assert words in sentence
    assert "\n" not in sentence
    assert len(sentence) < 300


def test_a_bad_generation_config_is_named():
    sentence = refusal("llama", {"eos_token_id": "</s>"})
    assert sentence.startswith(f"generation_config.json beside {SOURCE}: eos_token_id")
    sentence = refusal("llama", [2])
    assert sentence == f"generation_config.json beside {SOURCE} must hold a JSON object, not [2]"
