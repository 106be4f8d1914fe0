"""OLMo (arXiv 2402.00838): llama with LayerNorm that has neither weight nor bias."""

from __future__ import annotations

from dataclasses import replace

from mpishard.config.families.family import Family
from mpishard.config.fields import Fields


def _variant(fields: Fields) -> Family:
    return replace(OLMO, clip_qkv=fields.optional_number("clip_qkv"))


OLMO = Family(
    architecture="OlmoForCausalLM",
    name="olmo",
    spellings={"rms_norm_eps": ()},  # there is no such field
    variant=_variant,
    forms="queries, keys and values cut off",
    max_position_embeddings=2048,
    eos_id=50279,
    norm_eps=1e-5,
    layer_norm=True,
    norm_weight=False,
)
