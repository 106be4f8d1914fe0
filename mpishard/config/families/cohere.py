"""Command R (Cohere 2024): attention and feed-forward network side by side after one norm without
bias, a rotation of neighbours, and scaled logits."""

from __future__ import annotations

from dataclasses import replace

from mpishard.config.families.family import Family
from mpishard.config.fields import Fields
from mpishard.config.model_config import LayerNormNames


def _variant(fields: Fields) -> Family:
    return replace(COHERE, per_head_norm=fields.flag("use_qk_norm", False))


COHERE = Family(
    architecture="CohereForCausalLM",
    name="cohere",
    spellings={"rms_norm_eps": ("layer_norm_eps",)},
    variant=_variant,
    forms="norms with weights for each head",
    max_position_embeddings=8192,
    bos_id=5,
    eos_id=255001,
    norm_eps=1e-5,
    tied=True,
    theta=500000.0,
    rope_interleaved_pairs=True,
    layer_norm=True,
    norms=LayerNormNames(ffn=None),
    parallel_residual=True,
    logit_scale=0.0625,
)
