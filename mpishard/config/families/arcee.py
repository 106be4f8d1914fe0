"""Arcee (AFM-4.5B): a feed-forward network without a gate, of squared relus."""

from __future__ import annotations

from mpishard.config.families.family import Family

ARCEE = Family(
    architecture="ArceeForCausalLM",
    name="arcee",
    max_position_embeddings=4096,
    bos_id=128000,
    eos_id=128001,
    norm_eps=1e-5,
    mlp_bias=None,
    gated_mlp=False,
    activation="relu2",
)
