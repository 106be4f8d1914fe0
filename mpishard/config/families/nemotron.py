"""Nemotron-4 and Minitron (arXiv 2402.16819): llama with LayerNorm whose weights are stored less 1,
a plain feed-forward network with squared ReLU, and a rotation of part of each head."""

from __future__ import annotations

from mpishard.config.families.family import Family

NEMOTRON = Family(
    architecture="NemotronForCausalLM",
    name="nemotron",
    spellings={
        "rms_norm_eps": ("norm_eps",),
        "partial_rotary_factor": ("partial_rotary_factor", "rope_percent", "rope_percentage"),
    },
    max_position_embeddings=4096,
    bos_id=2,
    eos_id=3,
    norm_eps=1e-5,
    partial_rotary_factor=0.5,
    mlp_bias=None,
    gated_mlp=False,
    activation="relu2",
    layer_norm=True,
    norm_bias=True,
    norm_offset=1.0,
)
