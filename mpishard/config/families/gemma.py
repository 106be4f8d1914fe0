"""Gemma 1 (arXiv 2403.08295): scaled embeddings, and norms that multiply by 1 + weight."""

from __future__ import annotations

from mpishard.config.families.family import Family

GEMMA = Family(
    architecture="GemmaForCausalLM",
    name="gemma",
    max_position_embeddings=8192,
    kv_heads=16,
    head_dim=256,
    bos_id=2,
    eos_id=1,
    tied=True,
    activation="gelu_pytorch_tanh",
    activation_meanings={"gelu": "gelu_pytorch_tanh"},  # as transformers corrects old files
    norm_offset=1.0,
    scaled_embedding=True,
    # The name of an activation in old files, which transformers does not read any more.
    ignored=frozenset({"hidden_activation"}),
)
