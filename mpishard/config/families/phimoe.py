"""Phi-3.5-MoE (arXiv 2404.14219): LayerNorm, and two experts for a token, each weighted among those
whose scores come near to its own (SparseMixer: arXiv 2409.12136)."""

from __future__ import annotations

from dataclasses import replace

from mpishard.config.families.family import Family, MoEFamily
from mpishard.config.families.mixtral import MIXTRAL_EXPERTS
from mpishard.config.fields import Fields
from mpishard.config.model_config import StackedNames


def _variant(fields: Fields) -> Family:
    return replace(PHIMOE, head_bias=fields.flag("lm_head_bias", False))


PHIMOE = Family(
    architecture="PhimoeForCausalLM",
    name="phimoe",
    architecture_aliases=("PhiMoEForCausalLM",),
    variant=_variant,
    forms="a bias of the head",
    max_position_embeddings=131072,
    kv_heads=8,
    bos_id=1,
    eos_id=2,
    norm_eps=1e-5,
    sliding="everywhere",
    window=None,
    theta=1e6,
    rope_mscales=True,
    layer_norm=True,
    norm_bias=True,
    moe=MoEFamily(
        ffn="intermediate_size",
        scoring="sparsemixer",
        normalized=False,
        names=replace(MIXTRAL_EXPERTS, stacked=StackedNames(router="mlp.router.weight")),
    ),
    ignored=frozenset({"auto_map", "input_jitter_noise"}),
)
