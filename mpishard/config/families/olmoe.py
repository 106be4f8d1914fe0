"""OLMoE (arXiv 2409.02060): a norm over all heads of q and of k together."""

from __future__ import annotations

from mpishard.config.families.family import Family, MoEFamily

OLMOE = Family(
    architecture="OlmoeForCausalLM",
    name="olmoe",
    max_position_embeddings=4096,
    eos_id=50279,
    norm_eps=1e-5,
    full_width_qk_norm=True,
    heads_fill_hidden=True,
    moe=MoEFamily(ffn="intermediate_size"),
)
