"""Tiny models in every storage form, written from the descriptions of the forms.

Codes and scales are drawn at random, and the number that each element means is computed here from
the form's definition, element by element where it is not plain. `mpishard.storage.quantized` must
read the same numbers from the files. Sizes are such that blocks end within the parts of ranks, and
some blocks are shorter than the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from stored import stored
from tiny_models import raw_config

from mpishard.config.model_config import ModelConfig
from mpishard.config.reader import read_model_config
from mpishard.config.weight_specs import WeightSpec, weight_specs

Arrays = dict[str, np.ndarray]
Drawn = tuple[Arrays, np.ndarray]  # the tensors by the ends of their names, the numbers they mean

F8, E8M0, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu, ml_dtypes.bfloat16

LLAMA = raw_config("llama-mha") | {
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "hidden_size": 96,
    "intermediate_size": 64,
}
PHI3 = raw_config("phi3-longrope")
DEEPSEEK = raw_config("deepseek_v3-groups")
MIXTURE = raw_config("qwen3_moe-normed") | {
    "hidden_size": 64,
    "moe_intermediate_size": 48,
    "num_local_experts": 4,
    "num_hidden_layers": 2,
}
GPT_OSS = raw_config("gpt_oss-plain") | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_local_experts": 4,
}


# -- what the tensors of a matrix (O, I) are


def _repeat(scales: np.ndarray, block: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """The scale of each element."""
    wide = np.repeat(np.repeat(scales.astype(np.float32), block[0], 0), block[1], 1)
    return wide[: shape[0], : shape[1]]


def _scales(random: np.random.RandomState, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return random.uniform(0.5, 1.5, shape).astype(dtype)


def _pack(codes: np.ndarray, order: tuple[int, ...] = tuple(range(8)), bits: int = 4) -> np.ndarray:
    """As many codes along the last axis in each word as `order` has places."""
    each = len(order)
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % each)])
    words = np.zeros((*codes.shape[:-1], codes.shape[-1] // each), np.uint32)
    for element, place in enumerate(order):
        words |= codes[..., element::each].astype(np.uint32) << np.uint32(bits * place)
    return words.view(np.int32)


def fp8(
    block: tuple[int | None, int | None],
    name: str = "weight_scale",
    dtype: Any = np.float32,
    scale_shape: Callable[[np.ndarray], np.ndarray] = lambda scales: scales,
) -> Callable[..., Drawn]:
    """FP8 in blocks of so many rows and columns; None: all."""

    def draw(random: np.random.RandomState, rows: int, columns: int) -> Drawn:
        each = block[0] or rows, block[1] or columns
        codes = random.normal(0, 0.2, (rows, columns)).astype(F8)
        scales = _scales(random, (-(-rows // each[0]), -(-columns // each[1])), dtype)
        numbers = codes.astype(np.float32) * _repeat(scales, each, (rows, columns))
        return {"weight": codes, name: scale_shape(scales)}, numbers

    return draw


def int8(symmetric: bool) -> Callable[..., Drawn]:
    """int8 with a scale for each row."""

    def draw(random: np.random.RandomState, rows: int, columns: int) -> Drawn:
        codes = random.randint(-128, 128, (rows, columns)).astype(np.int8)
        scales = (_scales(random, (rows, 1), np.float32) / 400).astype(BF16)
        zeros = (
            np.zeros((rows, 1), np.int8) if symmetric else random.randint(-9, 9, (rows, 1), np.int8)
        )
        numbers = (codes.astype(np.float32) - zeros) * scales.astype(np.float32)
        tensors = {"weight": codes, "weight_scale": scales, "weight_zero_point": zeros}
        return tensors, numbers

    return draw


def _grouped(
    random: np.random.RandomState, rows: int, columns: int, group: int, dtype: Any, zeros: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (O, I), zero points and scales (O, groups)."""
    groups = -(-columns // group)
    codes = random.randint(0, 16, (rows, columns))
    scales = (_scales(random, (rows, groups), np.float32) / 20).astype(dtype)
    return (
        codes,
        random.randint(1, 16, (rows, groups)) if zeros else np.full((rows, groups), 8),
        scales,
    )


def _means(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, of: np.ndarray) -> np.ndarray:
    """The numbers of codes, whose columns belong to the groups `of`."""
    return ((codes - zeros[:, of]) * scales.astype(np.float32)[:, of]).astype(np.float32)


def int4(group: int, zeros: bool = False, ordered: bool = False) -> Callable[..., Drawn]:
    """pack-quantized, with zero points or with the groups of columns stored."""

    def draw(random: np.random.RandomState, rows: int, columns: int) -> Drawn:
        codes, zero_points, scales = _grouped(random, rows, columns, group, BF16, zeros)
        of = np.arange(columns) // group
        of = random.permutation(of) if ordered else of
        tensors = {
            "weight_packed": _pack(codes),
            "weight_scale": scales,
            "weight_shape": np.array([rows, columns], np.int64),
        }
        if zeros:
            tensors["weight_zero_point"] = np.ascontiguousarray(_pack(zero_points.T).T)
        if ordered:
            tensors["weight_g_idx"] = of.astype(np.int32)
        return tensors, _means(codes, zero_points, scales, of)

    return draw


def packed_int8(random: np.random.RandomState, rows: int, columns: int) -> Drawn:
    """pack-quantized with eight bits, and a zero point and a scale for each row."""
    codes = random.randint(0, 256, (rows, columns))
    zeros = random.randint(120, 137, (rows, 1))
    scales = (_scales(random, (rows, 1), np.float32) / 400).astype(np.float16)
    tensors = {
        "weight_packed": _pack(codes, (0, 1, 2, 3), 8),
        "weight_scale": scales,
        "weight_shape": np.array([rows, columns], np.int64),
        "weight_zero_point": np.ascontiguousarray(_pack(zeros.T, (0, 1, 2, 3), 8).T),
    }
    return tensors, _means(codes, zeros, scales, np.zeros(columns, int))


def awq(group: int) -> Callable[..., Drawn]:
    """gemm: transposed; outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight have the bits 0-3, 4-7, …"""

    def draw(random: np.random.RandomState, rows: int, columns: int) -> Drawn:
        codes, zeros, scales = _grouped(random, rows, columns, group, np.float16, True)
        order = tuple([0, 2, 4, 6, 1, 3, 5, 7].index(output) for output in range(8))
        tensors = {
            "qweight": _pack(codes.T, order),
            "qzeros": _pack(zeros.T, order),
            "scales": np.ascontiguousarray(scales.T),
        }
        return tensors, _means(codes, zeros, scales, np.arange(columns) // group)

    return draw


def gptq(group: int, less: int, ordered: bool = False) -> Callable[..., Drawn]:
    """Transposed, inputs packed; zero points are stored less 1 or as they are."""

    def draw(random: np.random.RandomState, rows: int, columns: int) -> Drawn:
        codes, zeros, scales = _grouped(random, rows, columns, group, np.float16, True)
        of = np.arange(columns) // group
        of = random.permutation(of) if ordered else of
        tensors = {
            "qweight": np.ascontiguousarray(_pack(codes).T),
            "qzeros": _pack(zeros.T - less),
            "scales": np.ascontiguousarray(scales.T),
            "g_idx": of.astype(np.int32),
        }
        return tensors, _means(codes, zeros, scales, of)

    return draw


def _e2m1(bits: int) -> float:
    """Sign, two bits of exponent, one of mantissa."""
    exponent, mantissa = bits >> 1 & 3, bits & 1
    magnitude = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
    return -magnitude if bits >> 3 else magnitude


def _fp4(random: np.random.RandomState, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of two codes, and the codes' numbers."""
    codes = random.randint(0, 16, (rows, columns))
    numbers = np.array([_e2m1(bits) for bits in range(16)], np.float32)[codes]
    return (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8), numbers


def nvfp4(modelopt: bool) -> Callable[..., Drawn]:
    """A scale in FP8 for 16 elements, and one of the matrix, by which ModelOpt multiplies and
    compressed-tensors divides."""

    def draw(random: np.random.RandomState, rows: int, columns: int) -> Drawn:
        packed, numbers = _fp4(random, rows, columns)
        scales = (100 * _scales(random, (rows, -(-columns // 16)), np.float32)).astype(F8)
        whole = np.float32(random.uniform(1000, 1600))
        wide = _repeat(scales, (1, 16), (rows, columns))
        if modelopt:
            tensors = {"weight": packed, "weight_scale": scales}
            tensors["weight_scale_2"] = np.array(np.float32(1) / whole)
            return tensors, numbers * (wide * tensors["weight_scale_2"])
        tensors = {"weight_packed": packed, "weight_scale": scales}
        tensors["weight_global_scale"] = np.array([whole])
        return tensors, numbers * (wide / whole)

    return draw


def mxfp4(random: np.random.RandomState, rows: int, columns: int) -> Drawn:
    """A power of two for 32 elements, as compressed-tensors stores it."""
    packed, numbers = _fp4(random, rows, columns)
    exponents = random.randint(121, 126, (rows, -(-columns // 32))).astype(np.uint8)
    wide = np.repeat(2.0 ** (exponents.astype(np.float32) - 127), 32, 1)[:, :columns]
    return {"weight_packed": packed, "weight_scale": exponents}, numbers * wide


# -- the models


@dataclass(frozen=True)
class Model:
    """A model whose modules with names that contain one of `parts` are stored as `draw` says, and
    others in float32. `tensors` follow the first of them, and are not read."""

    raw: dict[str, Any]
    quantization: dict[str, Any]
    draw: Callable[..., Drawn]
    parts: tuple[str, ...] = ("_proj",)
    others: Mapping[str, Callable[..., Drawn]] = field(default_factory=dict)  # by a part of a name
    unread: tuple[str, ...] = ()
    beside: bool = False  # the configuration is in hf_quant_config.json
    plain: tuple[str, ...] = ()  # parts of names of modules that are left as they are


def _compressed(form: str, kind: str, bits: int, strategy: str, **weights: Any) -> dict[str, Any]:
    """A configuration of compressed-tensors."""
    named = {"type": kind, "num_bits": bits, "strategy": strategy, "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": named | {"dynamic": False, "observer": "minmax"} | weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
    }


_GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 16,
    "desc_act": False,
    "sym": False,
    "damp_percent": 0.1,
}

MODELS: dict[str, Model] = {
    "fp8-blocks": Model(
        DEEPSEEK,
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [16, 20],
            "modules_to_not_convert": ["lm_head", "gate"],
        },
        fp8((16, 20), "weight_scale_inv"),
    ),
    "fp8-tensor": Model(
        LLAMA,
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
        fp8((None, None), "weight_scale_inv", BF16, lambda scales: scales.reshape(())),
        unread=("activation_scale",),
    ),
    "fp8-channel": Model(
        LLAMA,
        _compressed("float-quantized", "float", 8, "channel")
        | {"ignore": ["lm_head", "re:model.layers.1.mlp.*"]},
        fp8((1, None), dtype=BF16),
        unread=("weight_zero_point",),
        plain=("layers.1.mlp",),
    ),
    "fp8-powers": Model(
        LLAMA,
        _compressed("float-quantized", "float", 8, "block", block_structure=[40, 28]),
        fp8((40, 28), dtype=E8M0),
    ),
    "fp8-modelopt": Model(
        LLAMA,
        {
            "quant_algo": "FP8",
            "kv_cache_quant_algo": "FP8",
            "exclude_modules": ["lm_head", "model.layers.0.self_attn*"],
        },
        fp8((None, None), scale_shape=lambda scales: scales.reshape(())),
        unread=("input_scale", "k_scale"),
        beside=True,
        plain=("layers.0.self_attn",),
    ),
    "fp8-fused": Model(  # q, k and v in one tensor, gate and up in another
        PHI3,
        {"quant_method": "fp8", "weight_block_size": [28, 20]},
        fp8((28, 20), "weight_scale_inv"),
    ),
    "int8": Model(LLAMA, _compressed("int-quantized", "int", 8, "channel"), int8(True)),
    "int8-zeros": Model(
        LLAMA, _compressed("int-quantized", "int", 8, "channel", symmetric=False), int8(False)
    ),
    "int4": Model(
        MIXTURE,
        _compressed("pack-quantized", "int", 4, "group", group_size=16)
        | {"ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp\\.(gate|up|down)_proj.*"]},
        int4(16),
        parts=(".experts.",),
    ),
    "int4-zeros": Model(
        LLAMA,
        _compressed("pack-quantized", "int", 4, "group", group_size=32, symmetric=False),
        int4(32, zeros=True),
    ),
    "int4-ordered": Model(
        LLAMA,
        _compressed("pack-quantized", "int", 4, "group", group_size=16, actorder="group"),
        int4(16, ordered=True),
    ),
    "packed-int8": Model(
        LLAMA,
        _compressed("pack-quantized", "int", 8, "channel", symmetric=False),
        packed_int8,
    ),
    "awq": Model(
        LLAMA,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 32,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["gate"],
        },
        awq(32),
    ),
    "gptq": Model(LLAMA, _GPTQ, gptq(16, less=1)),
    "gptq-ordered": Model(LLAMA, _GPTQ | {"desc_act": True}, gptq(16, less=1, ordered=True)),
    "gptq-rows": Model(LLAMA, _GPTQ | {"group_size": -1}, gptq(1 << 20, less=1)),
    "gptq-v2": Model(LLAMA, _GPTQ | {"checkpoint_format": "gptq_v2"}, gptq(16, less=0)),
    "nvfp4": Model(
        LLAMA,
        _compressed("nvfp4-pack-quantized", "float", 4, "tensor_group", group_size=16),
        nvfp4(modelopt=False),
        unread=("input_global_scale",),
    ),
    "nvfp4-modelopt": Model(
        LLAMA,
        {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "ignore": ["lm_head"],
            "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
            "producer": {"name": "modelopt", "version": "0.45.0"},
            "quantized_layers": {
                "*.mlp": {"quant_algo": "NVFP4", "group_size": 16},
                "*.self_attn.*": {"quant_algo": "FP8"},
            },
        },
        nvfp4(modelopt=True),
        others={"self_attn": fp8((None, None), scale_shape=lambda scales: scales.reshape(1))},
        unread=("input_scale",),
    ),
    "mxfp4": Model(
        GPT_OSS,
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
        mxfp4,
        parts=(".experts.",),
    ),
    "mxfp4-packed": Model(
        LLAMA, _compressed("mxfp4-pack-quantized", "float", 4, "group", group_size=32), mxfp4
    ),
}


def config_of(form: str) -> ModelConfig:
    """The configuration of the model in this form."""
    return read_model_config(raw_of(form), None, "config.json")


def raw_of(form: str) -> dict[str, Any]:
    """Its ``config.json``."""
    model = MODELS[form]
    return model.raw if model.beside else model.raw | {"quantization_config": model.quantization}


@cache
def drawn(form: str) -> tuple[Arrays, Arrays]:
    """The stored tensors, and the numbers of each weight of `weight_specs` in float32. They belong
    to all callers."""
    model = MODELS[form]
    random = np.random.RandomState(_SEEDS.get(form, 0))
    config = read_model_config(model.raw, None, "config.json")
    tensors: Arrays = {}
    numbers: Arrays = {}
    for weight in weight_specs(config):
        name = weight.name
        if _is_plain(model, name, weight.shape):
            plain = random.randint(-89, 90, weight.shape) / 256 + ("norm" in name)
            numbers[name] = plain.astype(np.float32)
            tensors[name] = numbers[name]
            continue
        if name in numbers:
            continue  # drawn with the first weight of its tensor
        draw = next((draw for part, draw in model.others.items() if part in name), model.draw)
        module, rows = _tensor_of(config, weight)
        found, whole = draw(random, sum(rows.values()), weight.shape[1])
        for part, count in rows.items():
            numbers[part], whole = whole[:count], whole[count:]
        tensors |= {module + end: array for end, array in found.items()}
        tensors |= {
            module + end: np.ones(1, np.float32) for end in model.unread if end not in found
        }
    return (together(config, tensors) if form == "mxfp4" else tensors), numbers


def _tensor_of(config: ModelConfig, weight: WeightSpec) -> tuple[str, dict[str, int]]:
    """What the names of a weight's stored tensors begin with, and the weights that they hold, one
    above the other, with their numbers of rows."""
    names = config.stored_names
    before, _, last = weight.name.rpartition("self_attn.q_proj.weight")
    if names.qkv and before and not last:
        q, kv = (heads * config.head_dim for heads in (config.heads, config.kv_heads))
        parts = {
            f"{before}self_attn.{part}_proj.weight": rows
            for part, rows in zip("qkv", (q, kv, kv), strict=True)
        }
        return f"{before}{names.qkv}.", parts
    before, _, last = weight.name.rpartition("mlp.gate_proj.weight")
    if names.gate_up and before and not last:
        parts = {f"{before}mlp.{part}_proj.weight": config.ffn for part in ("gate", "up")}
        return f"{before}{names.gate_up}.", parts
    return weight.name.removesuffix("weight"), {weight.name: weight.shape[0]}


def _is_plain(model: Model, name: str, shape: tuple[int, ...]) -> bool:
    return (
        len(shape) == 1
        or not any(part in name for part in model.parts)
        or any(part in name for part in model.plain)
    )


def together(config: ModelConfig, tensors: Arrays) -> Arrays:
    """The experts in one tensor, as a gpt_oss has them, rows of gate and up in turns: quantized, or
    as transposed matrices."""
    assert config.moe is not None
    experts, width = config.moe.num_experts, config.moe.moe_intermediate_size
    stacked = {name: array for name, array in tensors.items() if ".experts." not in name}
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        for end, name in (
            ("weight_packed", "_blocks"),
            ("weight_scale", "_scales"),
            ("weight", ""),
            ("bias", "_bias"),
        ):
            if f"{prefix}0.up_proj.{end}" not in tensors:
                continue
            gate, up, down = (
                np.stack([tensors[f"{prefix}{e}.{part}_proj.{end}"] for e in range(experts)])
                for part in ("gate", "up", "down")
            )
            both = np.stack([gate, up], axis=2).reshape(experts, 2 * width, *gate.shape[2:])
            if name == "_blocks":
                both, down = (one.reshape(*one.shape[:2], -1, 16) for one in (both, down))
            if name == "":
                both, down = both.swapaxes(1, 2), down.swapaxes(1, 2)
            stacked[f"{prefix}gate_up_proj{name}"] = both
            stacked[f"{prefix}down_proj{name}"] = down
    return stacked


def write_plain(form: str, directory: Path) -> Path:
    """Writes the model with the numbers that its codes mean, in float32."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(MODELS[form].raw))
    _save(stored(config_of(form), plain(form)), directory)
    return directory


def plain(form: str) -> Arrays:
    """The numbers that the codes mean, as the reference takes them."""
    _, numbers = drawn(form)
    return together(config_of(form), numbers) if form == "mxfp4" else numbers


def write_quantized(form: str, directory: Path) -> Path:
    """Writes the model as it is published."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw_of(form)))
    if MODELS[form].beside:
        content = {"producer": {"name": "modelopt"}, "quantization": MODELS[form].quantization}
        (directory / "hf_quant_config.json").write_text(json.dumps(content))
    tensors, _ = drawn(form)
    _save(tensors, directory)
    return directory


def _save(tensors: Arrays, directory: Path) -> None:
    whole = {name: np.array(array, order="C") for name, array in tensors.items()}
    save_file(whole, directory / "model.safetensors", {"format": "pt"})


def prompt_of(form: str) -> list[int]:
    """The prompt of its golden value."""
    return np.random.RandomState(1).randint(0, MODELS[form].raw["vocab_size"], 9).tolist()


_SEEDS: dict[str, int] = {}
