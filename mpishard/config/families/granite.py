"""Granite 3 (IBM): factors of the embeddings, the residual stream, the scores and the logits."""

from __future__ import annotations

from mpishard.config.families.family import Family

GRANITE = Family(
    architecture="GraniteForCausalLM",
    name="granite",
    max_position_embeddings=2048,
    bos_id=1,
    eos_id=2,
    mlp_bias=None,
    multipliers=True,
)
