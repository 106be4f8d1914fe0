"""gpt-oss (arXiv 2508.10925): attention sinks, a sliding window in every second layer, and experts
with biases and a clamped activation, whose weights may be MXFP4."""

from __future__ import annotations

from mpishard.config.families.family import Family, MoEFamily
from mpishard.config.model_config import ExpertNames, StackedNames

GPT_OSS = Family(
    architecture="GptOssForCausalLM",
    name="gpt_oss",
    max_position_embeddings=131072,
    kv_heads=8,
    head_dim=64,
    norm_eps=1e-5,
    qkv_bias_default=True,
    sinks=True,
    sliding="alternating",
    window=128,
    theta=150000.0,
    rope={
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
    moe=MoEFamily(
        ffn="intermediate_size",
        normalized=True,
        biases=True,
        clamped=True,
        names=ExpertNames(
            separate=None,
            stacked=StackedNames(
                router="mlp.router.weight",
                router_bias="mlp.router.bias",
                gate_up_bias="mlp.experts.gate_up_proj_bias",
                down_bias="mlp.experts.down_proj_bias",
                transposed=True,
                alternating=True,
            ),
        ),
    ),
    quantization="mxfp4",
    ignored=frozenset({"initial_context_length"}),
)
