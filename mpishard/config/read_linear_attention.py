"""Reads the layers of linear attention in a ``config.json``."""

from __future__ import annotations

from mpishard.config.fields import Fields
from mpishard.config.model_config import LinearAttentionConfig

_LINEAR, _FULL = "linear_attention", "full_attention"


def read_linear_attention(fields: Fields, layers: int) -> LinearAttentionConfig:
    """The gated delta nets of qwen3_next; the defaults are those of its configuration class. Raises
    UserError as `read_model_config` does."""
    interval = fields.integer("full_attention_interval", 4)
    types = fields.get("layer_types")
    if types is None:
        types = [_LINEAR if (layer + 1) % interval else _FULL for layer in range(layers)]
    if not isinstance(types, list) or not all(kind in (_LINEAR, _FULL) for kind in types):
        fields.refuse("layer_types", f"must be a list of {_LINEAR} and {_FULL}")
    if len(types) != layers:
        fields.refuse("layer_types", f"must have one entry for each of the {layers} layers")
    if _FULL not in types:
        fields.refuse("layer_types", f"must have {_FULL} in one layer at least")
    key_heads = fields.integer("linear_num_key_heads", 16)
    heads = fields.integer("linear_num_value_heads", 32)
    if heads % key_heads:
        fields.refuse(
            "linear_num_value_heads", f"must be a multiple of linear_num_key_heads = {key_heads}"
        )
    return LinearAttentionConfig(
        layers=tuple(kind == _LINEAR for kind in types),
        heads=heads,
        kv_heads=key_heads,
        key_width=fields.integer("linear_key_head_dim", 128),
        value_width=fields.integer("linear_value_head_dim", 128),
        taps=fields.integer("linear_conv_kernel_dim", 4),
    )
