"""OLMo 3 (arXiv 2512.13961): OLMo 2 with a sliding window in three of four layers, whose rotary
embedding is not stretched."""

from __future__ import annotations

from mpishard.config.families.family import Family
from mpishard.config.families.olmo2 import NORMS_AFTER

OLMO3 = Family(
    architecture="Olmo3ForCausalLM",
    name="olmo3",
    max_position_embeddings=2048,
    eos_id=50279,
    norm_eps=1e-5,
    full_width_qk_norm=True,
    sliding="all but every nth",
    nth=4,
    needs_window=True,
    theta=500000.0,
    sliding_theta=500000.0,  # also where an old file has another rope_theta
    norms=NORMS_AFTER,
)
