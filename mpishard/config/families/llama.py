"""Llama 1 to 3 (arXiv 2302.13971, 2407.21783)."""

from __future__ import annotations

from mpishard.config.families.family import Family

LLAMA = Family(
    architecture="LlamaForCausalLM",
    name="llama",
    max_position_embeddings=2048,
    mlp_bias=None,
    bos_id=1,
    eos_id=2,
)
