"""Tiny random models of every family and option, and real checkpoints made of them.

Within a model the sizes differ from each other and few divide, so that a mistaken axis, a swapped
head or a missing bias shows. Weights come from NumPy's frozen `RandomState` stream, as multiples of
1/256 that float32, bfloat16 and float16 all hold exactly: every file format and every machine has
the same model, and the golden values need no weights beside them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from mpishard.description.config import ModelConfig
from mpishard.description.partition import Weight, weight_table

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
PROMPT_LENGTHS = (11, 21)
_ABSENT = object()


def _llama(heads: int, kv_heads: object, hidden: int, ffn: int, vocab: int, **fields: Any) -> dict:
    """A ``config.json`` of the sizes H, G, D, F and V; `fields` are added or replace."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-2,  # large, so that a wrong one shows
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "use_cache": True,
    }
    return {name: value for name, value in (config | fields).items() if value is not _ABSENT}


def _mistral(*sizes: Any, **fields: Any) -> dict:
    return _llama(
        *sizes, **{"architectures": ["MistralForCausalLM"], "model_type": "mistral"} | fields
    )


def _qwen2(*sizes: Any, **fields: Any) -> dict:
    return _llama(*sizes, **{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"} | fields)


def _qwen3(*sizes: Any, **fields: Any) -> dict:
    return _llama(*sizes, **{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"} | fields)


# "old" is the spelling of transformers 4, rope_scaling beside rope_theta, "new" the spelling of
# transformers 5, rope_parameters. Prompts are longer than every original length and every window.
# Thetas are small, so that every pair of a head turns visibly within them, and yarn's ramps begin
# and end between pairs.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama-mha": _llama(8, _ABSENT, 48, 37, 61, rope_theta=300.0),
    "llama-gqa": _llama(
        *(8, 4, 32, 45, 67),
        head_dim=10,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    ),
    "llama-mqa": _llama(8, 1, 56, 53, 59, head_dim=8, hidden_act="relu"),
    "llama-uneven": _llama(12, 3, 24, 41, 71, head_dim=4, num_hidden_layers=3, rope_theta=100.0),
    "llama-bias": _llama(
        *(6, 3, 42, 43, 73),
        head_dim=8,
        attention_bias=True,
        mlp_bias=True,
        hidden_act="gelu_pytorch_tanh",
    ),
    "llama-linear-old": _llama(
        *(4, 2, 28, 39, 63),
        head_dim=8,
        rope_theta=200.0,
        rope_scaling={"type": "linear", "factor": 3.0},
    ),
    "qwen2-linear-new": _qwen2(
        *(4, 4, 26, 51, 65),
        head_dim=6,
        rope_parameters={"rope_type": "linear", "rope_theta": 200.0, "factor": 3.0},
    ),
    "llama-dynamic-old": _llama(
        *(8, 2, 40, 47, 69),
        head_dim=6,
        max_position_embeddings=8,
        rope_theta=200.0,
        rope_scaling={"type": "dynamic", "factor": 4.0},
    ),
    "mistral-dynamic-new": _mistral(
        *(6, 2, 33, 57, 75),
        head_dim=8,
        sliding_window=9,
        max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 200.0, "factor": 2.0},
    ),
    "llama-llama3-old": _llama(
        *(4, 1, 44, 35, 77),
        head_dim=12,
        rope_theta=50.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 0.5,
            "high_freq_factor": 2.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "qwen3-llama3-new": _qwen3(
        *(4, 2, 29, 33, 79),
        head_dim=10,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 20.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 20,
        },
    ),
    "llama-yarn-old": _llama(
        *(6, 3, 30, 49, 81),
        head_dim=12,
        rope_theta=7.0,
        rope_scaling={
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 1.0,
            "beta_slow": 0.25,
        },
    ),
    "qwen2-yarn-new": _qwen2(
        *(4, 2, 34, 55, 83),
        head_dim=10,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 5.0,
            "factor": 3.0,
            "original_max_position_embeddings": 18,
            "mscale": 2.0,
            "mscale_all_dim": 0.5,
            "truncate": False,
        },
    ),
    "mistral-yarn-new": _mistral(
        *(8, 4, 45, 59, 85),
        head_dim=14,
        sliding_window=None,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 7.4,
            "factor": None,  # then the ratio of max_position_embeddings to the original length
            "original_max_position_embeddings": 16,
            "beta_fast": 1.5,
            "beta_slow": 0.5,
            "attention_factor": 1.3,
        },
    ),
    "mistral-window": _mistral(12, 3, 38, 49, 87, head_dim=6, sliding_window=5, rope_theta=100.0),
    "mistral-full": _mistral(16, _ABSENT, 35, 61, 89, head_dim=4, sliding_window=None),
    "qwen2-tied": _qwen2(6, 2, 36, 63, 91, tie_word_embeddings=True, use_sliding_window=False),
    "qwen2-window": _qwen2(
        *(8, 4, 27, 65, 93),
        head_dim=8,
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
    ),
    "qwen3-tied": _qwen3(
        *(8, 8, 31, 67, 95),
        head_dim=6,
        tie_word_embeddings=True,
        rope_theta=1000.0,
    ),
    "qwen3-mixed": _qwen3(
        *(6, 3, 37, 69, 97),
        head_dim=8,
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 150.0},
    ),
    "qwen3-bias": _qwen3(8, 1, 39, 71, 99, head_dim=10, attention_bias=True),
}


# 0 but where a greedy continuation would repeat itself or come to a near-tie.
_SEEDS = {
    "llama-gqa": 5,
    "llama-uneven": 17,
    "llama-bias": 1,
    "llama-linear-old": 4,
    "llama-dynamic-old": 1,
    "mistral-dynamic-new": 3,
    "llama-llama3-old": 1,
    "qwen3-llama3-new": 6,
    "llama-yarn-old": 8,
    "qwen2-yarn-new": 9,
    "mistral-yarn-new": 1,
    "mistral-window": 3,
    "mistral-full": 2,
    "qwen2-window": 16,
    "qwen3-tied": 3,
    "qwen3-mixed": 1,
    "qwen3-bias": 1,
}


def tiny_config(variant: str) -> ModelConfig:
    """The configuration of `variant`."""
    return ModelConfig.from_json(VARIANTS[variant], None, f"{variant}/config.json")


def tiny_weights(variant: str, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Every weight of `variant`, by its Hugging Face name, in `dtype`."""
    random = np.random.RandomState(_SEEDS.get(variant, 0))
    return {
        weight.name: _draw(random, weight).astype(dtype)
        for weight in weight_table(tiny_config(variant))
    }


def tiny_prompts(variant: str) -> list[list[int]]:
    """Prompts of different lengths for `variant`."""
    random = np.random.RandomState(1000 + _SEEDS.get(variant, 0))
    vocab = VARIANTS[variant]["vocab_size"]
    return [random.randint(0, vocab, length).tolist() for length in PROMPT_LENGTHS]


def write_checkpoint(
    variant: str, directory: str | Path, dtype: str = "float32", shards: int = 1
) -> Path:
    """`directory`, after writing `variant` into it as Hugging Face does, the weights as `dtype` in
    one file or in `shards` files with an index."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = VARIANTS[variant]
    spelling = "dtype" if "rope_parameters" in config else "torch_dtype"
    (directory / "config.json").write_text(json.dumps(config | {spelling: dtype}, indent=2))

    weights = tiny_weights(variant, DTYPES[dtype])
    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    files: dict[str, dict[str, np.ndarray]] = {}
    for index, (name, array) in enumerate(weights.items()):
        number = index * shards // len(weights) + 1
        files.setdefault(f"model-{number:05}-of-{shards:05}.safetensors", {})[name] = array
    for file, arrays in files.items():
        save_file(arrays, directory / file, metadata={"format": "pt"})
    index_json = {
        "metadata": {"total_size": sum(array.nbytes for array in weights.values())},
        "weight_map": {name: file for file, arrays in files.items() for name in arrays},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2))
    return directory


def _draw(random: np.random.RandomState, weight: Weight) -> np.ndarray:
    """Norms within a third of 1, biases and matrices of a standard deviation of 0.2, all exact in
    8 significant bits."""
    if "norm" in weight.field:
        return 1 + random.randint(-42, 43, weight.shape) / 128
    return random.randint(-89, 90, weight.shape) / 256
