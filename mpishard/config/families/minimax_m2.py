"""MiniMax-M2 (MiniMax): experts by sigmoid scores, a norm over all heads of q and of k together,
and a part of each head rotated."""

from __future__ import annotations

from dataclasses import replace

from mpishard.config.families.family import Family, MoEFamily
from mpishard.config.families.mixtral import MIXTRAL_EXPERTS
from mpishard.config.model_config import StackedNames

MINIMAX_M2 = Family(
    architecture="MiniMaxM2ForCausalLM",
    name="minimax_m2",
    max_position_embeddings=196608,
    kv_heads=8,
    head_dim=128,
    bos_id=200034,
    eos_id=200020,
    qkv_bias=False,
    o_bias=False,
    full_width_qk_norm=True,
    theta=5e6,
    partial_rotary_factor=1.0,
    rotary_dim=True,
    moe=MoEFamily(
        ffn="intermediate_size",
        scoring="sigmoid",
        normalized=True,
        names=replace(
            MIXTRAL_EXPERTS,
            stacked=StackedNames(e_score_correction_bias="mlp.e_score_correction_bias"),
            e_score_correction_bias="block_sparse_moe.e_score_correction_bias",
        ),
    ),
    fixed={
        "attn_type_list": 1,
        "qk_norm_type": "per_layer",
        "shared_intermediate_size": 0,
        "use_routing_bias": True,
    },
    # The layers that predict several tokens are not loaded.
    ignored=frozenset({"auto_map", "mtp_transformer_layers", "num_mtp_modules", "use_mtp"}),
)
