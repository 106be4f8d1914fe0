"""Granite MoE with a shared expert (IBM)."""

from __future__ import annotations

from dataclasses import replace

from mpishard.config.families.granitemoe import GRANITEMOE
from mpishard.config.stored_names import StoredNames

assert GRANITEMOE.moe is not None

GRANITEMOESHARED = replace(
    GRANITEMOE,
    architecture="GraniteMoeSharedForCausalLM",
    name="granitemoeshared",
    moe=replace(
        GRANITEMOE.moe,
        shared="shared_intermediate_size",
        shared_default=0,
        names=replace(GRANITEMOE.moe.names, shared="shared_mlp"),
    ),
    stored_names=StoredNames(
        shared_gate_up="shared_mlp.input_linear",
        modules={"shared_mlp.down_proj": "shared_mlp.output_linear"},
    ),
)
