"""ERNIE 4.5 with experts (Baidu, 2025): experts chosen by scores and a bias, and shared ones."""

from __future__ import annotations

from dataclasses import replace

from mpishard.config.families.ernie4_5 import ERNIE4_5
from mpishard.config.families.family import Family, MoEFamily
from mpishard.config.fields import Fields
from mpishard.config.model_config import ExpertNames, StackedNames
from mpishard.config.stored_names import StoredNames


def _variant(fields: Fields) -> Family:
    return replace(ERNIE4_5_MOE, head_bias=fields.flag("use_bias", False))


ERNIE4_5_MOE = replace(
    ERNIE4_5,
    architecture="Ernie4_5_MoeForCausalLM",
    name="ernie4_5_moe",
    variant=_variant,
    forms="a bias of the head if the others have one",
    kv_heads=4,
    head_dim=None,
    moe=MoEFamily(
        dense="outside of a range",
        first_dense=1,
        normalized=True,
        normalized_by_at_least=1e-12,
        shared="moe_num_shared_experts",
        shared_count=2,
        names=ExpertNames(
            stacked=StackedNames(
                e_score_correction_bias="mlp.gate.moe_statics.e_score_correction_bias"
            ),
            e_score_correction_bias="mlp.moe_statics.e_score_correction_bias",
            e_score_correction_bias_is_matrix=True,
            shared="mlp.shared_experts",
        ),
    ),
    stored_names=StoredNames(unused=("model.mtp_",)),
    fixed=ERNIE4_5.fixed | {"moe_gate": "topk", "moe_use_aux_free": True},
    # The layers that predict several tokens are not loaded.
    ignored=frozenset(
        """
        auto_map moe_capacity moe_multimodal_dispatch_use_allgather num_nextn_predict_layers
        """.split()
    ),
)
