"""Multimodal checkpoints whose language model is of a known family.

A wrapper puts a tower for images beside a language model, whose stream the tower writes into where
a prompt has images. Without images it is the language model alone. The fields of that are in
``text_config``; `mpishard.storage.text_half` knows the names of its tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Wrapper:
    """What a multimodal architecture says of its language model."""

    name: str  # as `model_type` spells it
    architectures: tuple[str, ...]  # its spellings
    families: dict[str, str]  # by the model_type in text_config, of which the first is the default
    flat: bool = False  # older files have the fields of the language model beside the others
    # The language model's fields where the file has none, and those that no file can change.
    defaults: dict[str, Any] = field(default_factory=dict)
    always: dict[str, Any] = field(default_factory=dict)
    transposed_experts: bool = False  # see `StackedNames.transposed`
    ignored: frozenset[str] = frozenset()  # fields beside text_config that change nothing


_LLAVA = {name: name for name in ("llama", "mistral", "qwen2", "qwen3")}
_QWEN2_VL = {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_window_layers": 80,
    "rope_theta": 1e6,
}
_QWEN3_VL = {"max_position_embeddings": 128000, "rope_theta": 500000.0}

WRAPPERS = (
    Wrapper("llava", ("LlavaForConditionalGeneration",), _LLAVA),
    Wrapper("llava_next", ("LlavaNextForConditionalGeneration",), _LLAVA),
    Wrapper("internvl", ("InternVLForConditionalGeneration",), {"qwen2": "qwen2"} | _LLAVA),
    Wrapper(
        "mistral3",
        ("Mistral3ForConditionalGeneration",),
        {"mistral": "mistral", "ministral3": "ministral3"},
    ),
    Wrapper(
        "qwen2_vl",
        ("Qwen2VLForConditionalGeneration",),
        {"qwen2_vl_text": "qwen2", "qwen2_vl": "qwen2"},
        flat=True,
        defaults=_QWEN2_VL,
    ),
    Wrapper(
        "qwen2_5_vl",
        ("Qwen2_5_VLForConditionalGeneration",),
        {"qwen2_5_vl_text": "qwen2", "qwen2_5_vl": "qwen2"},
        flat=True,
        defaults=_QWEN2_VL,
    ),
    Wrapper(
        "qwen3_vl",
        ("Qwen3VLForConditionalGeneration",),
        {"qwen3_vl_text": "qwen3"},
        defaults=_QWEN3_VL,
    ),
    Wrapper(
        "qwen3_vl_moe",
        ("Qwen3VLMoeForConditionalGeneration",),
        {"qwen3_vl_moe_text": "qwen3_moe"},
        defaults=_QWEN3_VL | {"num_key_value_heads": 16, "head_dim": 128},
        always={"norm_topk_prob": True},
        transposed_experts=True,
    ),
    Wrapper(
        "kimi_k25",
        ("KimiK25ForConditionalGeneration", "Kimi_K25ForConditionalGeneration"),
        {"deepseek_v3": "deepseek_v3", "kimi_k2": "deepseek_v3"},
        ignored=frozenset({"auto_map", "ignore_index"}),
    ),
    Wrapper("gemma3", ("Gemma3ForConditionalGeneration",), {"gemma3_text": "gemma3_text"}),
    Wrapper("llama4", ("Llama4ForConditionalGeneration",), {"llama4_text": "llama4_text"}),
)
