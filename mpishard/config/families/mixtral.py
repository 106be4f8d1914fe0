"""Mixtral (arXiv 2401.04088): Mistral with eight experts, of which each token goes to two."""

from __future__ import annotations

from mpishard.config.families.family import Family, MoEFamily
from mpishard.config.model_config import ExpertNames, PerExpertNames

MIXTRAL_EXPERTS = ExpertNames(
    separate=PerExpertNames(
        router="block_sparse_moe.gate.weight",
        gate="block_sparse_moe.experts.{}.w1.weight",
        up="block_sparse_moe.experts.{}.w3.weight",
        down="block_sparse_moe.experts.{}.w2.weight",
    )
)

MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    name="mixtral",
    max_position_embeddings=131072,
    kv_heads=8,
    bos_id=1,
    eos_id=2,
    norm_eps=1e-5,
    qkv_bias=False,
    o_bias=False,
    sliding="everywhere",
    window=None,
    theta=1e6,
    moe=MoEFamily(
        ffn="intermediate_size",
        normalized=True,
        names=MIXTRAL_EXPERTS,
    ),
)
