"""DeepSeek-V3, R1 and Kimi-K2 (arXiv 2412.19437, 2507.20534): sigmoid scores with a bias that
balances the choice of experts."""

from __future__ import annotations

from mpishard.config.families.family import Family, MoEFamily
from mpishard.config.model_config import ExpertNames

DEEPSEEK_V3_EXPERTS = ExpertNames(
    e_score_correction_bias="mlp.gate.e_score_correction_bias",
    shared="mlp.shared_experts",
)

DEEPSEEK_V3 = Family(
    architecture="DeepseekV3ForCausalLM",
    name="deepseek_v3",
    max_position_embeddings=4096,
    bos_id=0,
    eos_id=1,
    mla=True,
    rope_interleaved_pairs=None,
    moe=MoEFamily(
        dense="the first",
        first_dense=3,
        scoring="sigmoid",
        normalized_default=True,
        choice="noaux_tc",
        scaling=2.5,
        shared="n_shared_experts",
        shared_count=1,
        names=DEEPSEEK_V3_EXPERTS,
    ),
    aliases=("kimi_k2",),
    # The layers that predict several tokens come after the last decoder layer; they are not loaded.
    ignored=frozenset({"num_nextn_predict_layers", "num_mtp_layers", "auto_map"}),
)
