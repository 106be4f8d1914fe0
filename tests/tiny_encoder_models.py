"""Tiny models that have an encoder, as `tiny_models` has decoders."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpishard.config.model_config import ModelConfig
from mpishard.config.weight_specs import name_of_encoder, weight_specs

Weights = dict[str, np.ndarray]


def _switch(**fields: Any) -> dict[str, Any]:
    config = {
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "model_type": "switch_transformers",
        "num_heads": 5,
        "d_kv": 6,
        "d_model": 34,
        "d_ff": 27,
        "vocab_size": 95,
        "num_layers": 3,
        "num_decoder_layers": 4,
        "num_sparse_encoder_layers": 1,
        "encoder_sparse_step": 2,
        "num_sparse_decoder_layers": 2,
        "num_experts": 6,
        "expert_capacity": 3,
        "router_bias": True,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 11,
        "layer_norm_epsilon": 1e-2,
        "decoder_start_token_id": 4,
        "eos_token_id": 2,
        "pad_token_id": 4,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
    }
    return config | fields


# An encoder with experts in one of three layers and a decoder in two of four, and one with experts
# in all layers, few of whose tokens find room, without biases of the router.
ENCODER_VARIANTS: dict[str, dict[str, Any]] = {
    "switch_transformers-mixed": _switch(),
    "switch_transformers-sparse": _switch(
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=2,
        encoder_sparse_step=1,
        num_sparse_decoder_layers=2,
        num_heads=4,
        d_kv=7,
        expert_capacity=2,
        router_bias=False,
        dense_act_fn="gelu_new",
    ),
}


def encoder_weights(
    config: ModelConfig, draw: Any, random: np.random.RandomState, dtype: Any
) -> dict[str, np.ndarray]:
    """Every weight by its name, drawn by ``draw(random, name, shape)``. Biases of positions and the
    embedding are larger, so that scores and the tied logits depend on them."""
    weights = {}
    for weight in weight_specs(config):
        array = draw(random, weight.name, weight.shape)
        large = weight.field in ("relative_bias", "embedding")
        weights[weight.name] = (4 * array if large else array).astype(dtype)
    return weights


def encoder_prompts(variant: str) -> list[tuple[list[int], list[int]]]:
    """What the encoder reads and what the decoder is given, of three sequences."""
    config, random = ENCODER_VARIANTS[variant], np.random.RandomState(7)
    prompts = []
    for input_length, length in ((21, 13), (9, 25), (1, 1)):
        ids = random.randint(5, config["vocab_size"], input_length + length - 1).tolist()
        begin = [config["decoder_start_token_id"], *ids[input_length:]]
        prompts.append((ids[:input_length], begin))
    return prompts


def parts(config: ModelConfig, weights: Weights) -> tuple[Weights, Weights]:
    """The decoder's weights, and the encoder's by the names of a model of its own."""
    assert config.encoder is not None
    names = {one.name: name_of_encoder(one.name) for one in weight_specs(config.encoder)}
    encoder = {own: weights[name] for own, name in names.items()}
    return {name: weights[name] for name in weights if ".encoder." not in name}, encoder
