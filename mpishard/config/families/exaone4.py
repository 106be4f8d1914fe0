"""EXAONE 4 (arXiv 2507.11407): norms after the sub-layers and of q and k; with a sliding window,
which three of four layers have, the other layers have no rotary embedding."""

from __future__ import annotations

from mpishard.config.families.family import Family
from mpishard.config.families.olmo2 import NORMS_AFTER

EXAONE4 = Family(
    architecture="Exaone4ForCausalLM",
    name="exaone4",
    max_position_embeddings=2048,
    kv_heads=32,
    bos_id=0,
    eos_id=2,
    norm_eps=1e-5,
    qkv_bias=False,
    o_bias=False,
    qk_norm=True,
    sliding="all but every nth",
    nth=4,
    nth_field="sliding_window_pattern",
    rope_layers="sliding",
    norms=NORMS_AFTER,
)
