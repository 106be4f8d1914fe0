"""dots.llm1 (arXiv 2506.05767): Qwen3's attention with DeepSeek-V3's experts."""

from __future__ import annotations

from mpishard.config.families.deepseek_v3 import DEEPSEEK_V3_EXPERTS
from mpishard.config.families.family import Family, MoEFamily

DOTS1 = Family(
    architecture="Dots1ForCausalLM",
    name="dots1",
    max_position_embeddings=2048,
    kv_heads=32,
    qk_norm=True,
    sliding="from a layer without a switch",
    window_layers=62,
    moe=MoEFamily(
        dense="the first",
        scoring="sigmoid",
        choice="noaux_tc",
        groups=(1, 1),
        scaling=1.0,
        shared="n_shared_experts",
        shared_count=1,
        names=DEEPSEEK_V3_EXPERTS,
    ),
    ignored=frozenset({"auto_map"}),
)
