"""Reads the encoder beside the decoder in a ``config.json``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mpishard.config.families.family import Family
from mpishard.config.fields import Fields
from mpishard.config.model_config import ExpertNames, ModelConfig, RelativeBias
from mpishard.config.read_moe import MOST_EXPERTS


def with_encoder(
    config: ModelConfig,
    fields: Fields,
    family: Family,
    generation: dict[str, Any] | None,
    most_layers: int,
) -> ModelConfig:
    """The decoder with its encoder, of which both are in `config` what they have in common. The
    defaults are those of Switch Transformers. Raises UserError as `read_model_config` does."""
    fields.only("is_encoder_decoder", True)
    buckets = fields.integer("relative_attention_num_buckets", 32)
    distance = fields.integer("relative_attention_max_distance", 128)
    if buckets % 4:
        fields.refuse("relative_attention_num_buckets", "must be a multiple of 4")
    if distance <= buckets // 2:
        fields.refuse("relative_attention_max_distance", f"must be more than {buckets // 2}")
    config = replace(config, relative_bias=RelativeBias(buckets, distance))
    layers = fields.optional_integer("num_decoder_layers") or config.layers
    if layers > most_layers:
        fields.refuse("num_decoder_layers", f"must be at most {most_layers}")
    if config.moe and config.moe.num_experts * layers > MOST_EXPERTS:
        fields.refuse(
            "num_experts", f"must be at most {MOST_EXPERTS} in all {layers} layers together"
        )
    encoder = replace(
        _with_layers(config, fields, "encoder", config.layers, family.encoder_moe_names),
        causal=False,
        logits_scale=1.0,
        stored_names=family.encoder_stored_names,
    )
    return replace(
        _with_layers(config, fields, "decoder", layers, config.moe.names if config.moe else None),
        encoder=encoder,
        decoder_start_id=_start_id(fields, generation),
        logits_scale=config.hidden**-0.5,
    )


def _with_layers(
    config: ModelConfig, fields: Fields, stack: str, layers: int, names: ExpertNames | None
) -> ModelConfig:
    """`config` with the layers of one stack, all of the same form but for the experts."""
    moe = config.moe
    if moe is not None and names is not None:
        number = fields.non_negative_integer(f"num_sparse_{stack}_layers", 3)
        step = fields.non_negative_integer(
            f"{stack}_sparse_step", layers // number if number else layers
        )
        sparse = tuple(step == 1 or (step > 1 and n % step == 1) for n in range(layers))
        moe = replace(moe, layers=sparse, names=names)
    return replace(
        config,
        layers=layers,
        ropes=config.ropes[:1] * layers,
        windows=(None,) * layers,
        chunks=(None,) * layers,
        moe=moe,
    )


def _start_id(fields: Fields, generation: dict[str, Any] | None) -> int:
    """The token that the decoder begins with."""
    start = (generation or {}).get("decoder_start_token_id")
    if start is None:
        start = fields.get("decoder_start_token_id")
    if type(start) is not int:
        fields.refuse("decoder_start_token_id", "must be the id of the decoder's first token")
    return start
