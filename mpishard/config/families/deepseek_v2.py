"""DeepSeek-V2 (arXiv 2405.04434): multi-head latent attention, and shared experts beside the routed
ones."""

from __future__ import annotations

from mpishard.config.families.family import Family, MoEFamily
from mpishard.config.model_config import ExpertNames

DEEPSEEK_V2 = Family(
    architecture="DeepseekV2ForCausalLM",
    name="deepseek_v2",
    max_position_embeddings=2048,
    bos_id=1,
    eos_id=2,
    mla=True,
    rope_interleaved_pairs=True,
    mlp_bias=None,
    moe=MoEFamily(
        dense="the first",
        normalized=False,
        choice="topk_method",
        scaling=1.0,
        shared="n_shared_experts",
        shared_count=2,
        names=ExpertNames(shared="mlp.shared_experts"),
    ),
    # transformers computes the same whatever norm_topk_prob says, and has the code of auto_map.
    ignored=frozenset({"norm_topk_prob", "auto_map"}),
)
