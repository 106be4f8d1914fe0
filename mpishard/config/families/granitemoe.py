"""Granite 3 MoE (IBM): Granite with experts, stored together, gate over up."""

from __future__ import annotations

from mpishard.config.families.family import Family, MoEFamily
from mpishard.config.model_config import ExpertNames, StackedNames

GRANITEMOE = Family(
    architecture="GraniteMoeForCausalLM",
    name="granitemoe",
    max_position_embeddings=2048,
    bos_id=1,
    eos_id=2,
    multipliers=True,
    moe=MoEFamily(
        ffn="intermediate_size",
        normalized=True,
        names=ExpertNames(
            separate=None,
            stacked=StackedNames(
                router="block_sparse_moe.router.layer.weight",
                gate_up="block_sparse_moe.input_linear.weight",
                down="block_sparse_moe.output_linear.weight",
            ),
        ),
    ),
)
