"""MiMo-7B (Xiaomi, arXiv 2505.07608): Qwen2, trained to predict several tokens."""

from __future__ import annotations

from dataclasses import replace

from mpishard.config.families.qwen2 import QWEN2
from mpishard.config.stored_names import StoredNames

MIMO = replace(
    QWEN2,
    architecture="MiMoForCausalLM",
    name="mimo",
    stored_names=StoredNames(unused=("model.mtp_layers.",)),
    # The layers that predict several tokens are not loaded.
    ignored=frozenset({"auto_map", "num_nextn_predict_layers"}),
)
