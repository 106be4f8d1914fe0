"""Quantized checkpoints: the numbers of every storage form, under any cut, and how each damage is
refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import quantized_models
from quantized_models import MODELS, drawn, prompt_of, together, write_quantized
from safetensors.numpy import save_file

from mpishard.config.quantization.scheme import Scheme
from mpishard.config.reader import read_model_config
from mpishard.config.stored_names import StoredNames
from mpishard.config.weight_sharding import WeightSharding
from mpishard.config.weight_specs import specs_of_shard, weight_specs
from mpishard.errors import UserError
from mpishard.reference import Reference
from mpishard.storage import checkpoint as checkpoint_module
from mpishard.storage.arrays import row_blocks
from mpishard.storage.checkpoint import Checkpoint
from mpishard.storage.convert import convert
from mpishard.storage.inspection import describe, stored_bytes, verify
from mpishard.storage.quantized import awq, elements, gptq, mxfp4, nvfp4, packed, scaled
from mpishard.storage.quantized.forms import describe_scheme
from mpishard.storage.source import open_source
from mpishard.storage.weights import load_weights

COMPRESSED = MODELS["fp8-channel"].quantization
GOLDEN = Path(__file__).parents[1] / "golden" / "stored"
BOUND = 2e-4  # of the logits' standard deviation


@pytest.fixture(scope="module", params=MODELS)
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def published(form: str, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    source = open_source(write_quantized(form, tmp_path_factory.mktemp(form)))
    assert isinstance(source, Checkpoint)
    return source


def test_there_are_goldens_of_every_form():
    assert {file.stem for file in GOLDEN.glob("*.npz")} == set(MODELS)


def test_the_logits_are_those_of_the_dequantized_model(form, published):
    golden_SV = np.load(GOLDEN / f"{form}.npz")["logits"]
    read = load_weights(published, WeightSharding(), 0)
    weights = together(published.config, read) if form == "mxfp4" else read
    logits_SV, _ = Reference(published.config, weights, np.float32).forward(prompt_of(form))
    assert np.abs(logits_SV - golden_SV).max() < BOUND * golden_SV.std()


def test_every_rank_reads_what_its_codes_mean(form, published, monkeypatch):
    most = 1 << 16  # bytes of an element: blocks of rows then end within words and blocks
    monkeypatch.setattr(checkpoint_module, "row_blocks", lambda shape, _: row_blocks(shape, most))
    _, numbers = drawn(form)
    experts = published.config.moe is not None
    for sharding in (WeightSharding(), WeightSharding(3), WeightSharding(5)):
        sharding = replace(sharding, ep=2, ranks=2 * sharding.tp) if experts else sharding
        for index in range(sharding.ranks):
            loaded = load_weights(published, sharding, index)
            for weight in specs_of_shard(published.config, sharding, index):
                expected = numbers[weight.name][weight.slices(published.config, sharding, index)]
                assert loaded[weight.name].dtype == np.float32
                np.testing.assert_array_equal(loaded[weight.name], expected, weight.name)


def test_any_part_of_a_matrix(form, published):
    _, numbers = drawn(form)
    random = np.random.default_rng(3)
    quantized = [name for name, place in published.locations.items() if place.quantized]
    for name in random.choice(quantized, 5):
        whole = numbers[name]
        for _ in range(20):
            bounds = [sorted(random.integers(0, length + 1, 2)) for length in whole.shape]
            part = tuple(slice(int(start), int(stop)) for start, stop in bounds)
            np.testing.assert_array_equal(published.read(name, part), whole[part], f"{name} {part}")


def test_what_is_quantized_is_described_and_verified(form, published):
    text = "\n".join(describe(published))
    quantized = [place.quantized for place in published.locations.values() if place.quantized]
    for scheme in {one.scheme for one in quantized}:
        count = sum(one.scheme == scheme for one in quantized)
        assert f"quantized     {count} matrices: {describe_scheme(scheme)}" in text
    steps: list[int] = []
    verify(published, steps.append)
    assert sum(steps) == stored_bytes(published)


@pytest.mark.parametrize(
    "form, dtype", [("gptq-ordered", "float32"), ("fp8-modelopt", "bfloat16"), ("mxfp4", "float32")]
)
def test_shards_hold_the_numbers(form, dtype, tmp_path, monkeypatch):
    published = open_source(write_quantized(form, tmp_path / "model"))
    most = 1 << 18  # bytes of an element: blocks of rows then end within those of scales
    monkeypatch.setattr(
        "mpishard.storage.convert.row_blocks", lambda shape, _: row_blocks(shape, most)
    )
    convert(published, tmp_path / "shards", tp=3, dtype=dtype)
    shards = open_source(tmp_path / "shards")
    verify(shards)
    assert "quantized" not in "\n".join(describe(shards))
    _, numbers = drawn(form)
    weights = {weight.name: weight for weight in weight_specs(shards.config)}
    stored = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    for rank in range(3):
        for name, part in load_weights(shards, WeightSharding(3), rank, stored).items():
            bounds = weights[name].slices(shards.config, WeightSharding(3), rank)
            expected = numbers[name][bounds].astype(part.dtype)
            np.testing.assert_array_equal(part, expected, name)


def test_576_rows_have_five_scales():
    random = np.random.default_rng(1)
    codes = random.normal(size=(576, 200)).astype(ml_dtypes.float8_e4m3fn)
    scales = random.uniform(1, 2, (5, 2)).astype(np.float32)
    stored = {"weight": codes, "weight_scale_inv": scales}
    scheme = Scheme("fp8", (128, 128), scale="weight_scale_inv")
    assert scaled.tensors({}, scheme, (576, 200))[1].shape == (5, 2)
    found = scaled.decode(stored, scheme, slice(100, 576), slice(90, 200))
    for i, j in np.ndindex(found.shape):
        row, column = 100 + i, 90 + j
        assert found[i, j] == np.float32(codes[row, column]) * scales[row // 128, column // 128]


@pytest.mark.parametrize("by_kv_head", [False, True])
def test_weights_that_share_a_quantized_tensor(tmp_path, monkeypatch, by_kv_head):
    """q, k and v in one FP8 tensor, and gate and up, in blocks that end anywhere among them."""
    names = StoredNames(
        qkv="self_attn.qkv_proj", qkv_by_kv_head=by_kv_head, gate_up="mlp.gate_up_proj"
    )
    raw = MODELS["fp8-blocks"].quantization | {"weight_block_size": [28, 20]}
    config = read_model_config(
        quantized_models.LLAMA | {"quantization_config": raw, "num_hidden_layers": 1}, None, "it"
    )
    config = replace(config, stored_names=names)
    monkeypatch.setattr(checkpoint_module, "read_config", lambda *_: config)
    draw, random = quantized_models.fp8((28, 20), "weight_scale_inv"), np.random.RandomState(2)
    tensors: dict[str, np.ndarray] = {}
    expected: dict[str, np.ndarray] = {}
    weights = {weight.name: weight for weight in weight_specs(config)}
    prefix = "model.layers.0."
    qkv, numbers = draw(random, 192, 96)
    tensors |= {f"{prefix}self_attn.qkv_proj.{end}": array for end, array in qkv.items()}
    heads = numbers.reshape((3, 64, 96) if by_kv_head else (1, 192, 96))
    kv = 16 * 3 // len(heads)
    for part, first, last in (("q", 0, 2), ("k", 2, 3), ("v", 3, 4)):
        rows = heads[:, first * kv : last * kv].reshape(-1, 96)
        expected[f"{prefix}self_attn.{part}_proj.weight"] = rows
    gate_up, numbers = draw(random, 128, 96)
    tensors |= {f"{prefix}mlp.gate_up_proj.{end}": array for end, array in gate_up.items()}
    expected[f"{prefix}mlp.gate_proj.weight"] = numbers[:64]
    expected[f"{prefix}mlp.up_proj.weight"] = numbers[64:]
    for name in weights.keys() - expected.keys():
        tensors[name] = expected[name] = np.ones(weights[name].shape, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    source = open_source(tmp_path)
    for tp in (1, 2, 5):
        for rank in range(tp):
            for name, found in load_weights(source, WeightSharding(tp), rank).items():
                bounds = weights[name].slices(config, WeightSharding(tp), rank)
                np.testing.assert_array_equal(found, expected[name][bounds], name)


# Mistakes that are easy to make: the form in which each must show, the module and the name in it.

_blocks_of = elements.blocks_of
MISTAKES: dict[str, tuple[str, Any, str, Any]] = {
    "a block off by one": (
        "fp8-blocks",
        elements,
        "blocks_of",
        lambda part, length: np.maximum(np.asarray(_blocks_of(part, length)) - 1, 0),
    ),
    "blocks counted from the part": (
        "nvfp4",
        elements,
        "blocks_of",
        lambda part, length: _blocks_of(slice(0, part.stop - part.start), length),
    ),
    "the upper half of a byte first": (
        "int4",
        packed,
        "TABLES",
        {4: elements.NIBBLES[:, ::-1]},
    ),
    "numbers in the upper half first": ("mxfp4", mxfp4, "E2M1", elements.E2M1[:, ::-1]),
    "outputs of a word in their order": ("awq", awq, "ORDER", list(range(8))),
    "zero points as they are stored": ("gptq", gptq, "ONES", np.uint32(0)),
    "columns in their order": (
        "gptq-ordered",
        gptq,
        "column_groups",
        lambda stored, name, scheme, columns: _blocks_of(columns, 16),
    ),
    "elements plus 7": ("int4", packed, "OFFSETS", {4: 7}),
    "the other scale of the matrix": (
        "nvfp4-modelopt",
        nvfp4,
        "spread",
        lambda scales, *of: 1 / elements.spread(scales, *of),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_show(tmp_path, monkeypatch, name):
    form, module, attribute, wrong = MISTAKES[name]
    source = open_source(write_quantized(form, tmp_path))
    _, numbers = drawn(form)
    assert isinstance(source, Checkpoint)
    quantized = [name for name, place in source.locations.items() if place.quantized][-1]
    whole = numbers[quantized]
    rows, columns = whole.shape
    part = slice(rows // 3, rows), slice(columns // 3, columns)
    np.testing.assert_array_equal(source.read(quantized, part), whole[part])
    monkeypatch.setattr(module, attribute, wrong)
    assert (source.read(quantized, part) != whole[part]).any()


# What is damaged, and what does not fit.

LAYER = "model.layers.1."
Q, UP = f"{LAYER}self_attn.q_proj", f"{LAYER}mlp.up_proj"
EXPERT = "model.layers.0.mlp.experts.2.down_proj"


def damaged(form: str, directory: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The model in this form, with its tensors changed."""
    write_quantized(form, directory)
    tensors = dict(drawn(form)[0])
    change(tensors)
    save_file(
        {name: np.array(array, order="C") for name, array in tensors.items()},
        directory / "model.safetensors",
    )
    return directory


def spoilt(array: np.ndarray, value: Any) -> np.ndarray:
    """A copy whose last element has another value."""
    copy = np.array(array)
    copy.reshape(-1)[-1:] = value
    return copy


SCALE_INV = f"{LAYER}self_attn.o_proj.weight_scale_inv"

DAMAGES: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    (
        "fp8-blocks",
        lambda t: t.pop(SCALE_INV),
        f"lacks the tensor {SCALE_INV}, which its config.json calls for in shape (3, 4)",
    ),
    (
        "fp8-blocks",
        lambda t: t.update({SCALE_INV: np.ones((4, 3), np.float32)}),
        f"{SCALE_INV} has shape (4, 3), but config.json calls for (3, 4)",
    ),
    (
        "fp8-blocks",
        lambda t: t.update({SCALE_INV: t[SCALE_INV].astype(np.int32)}),
        f"{SCALE_INV} has dtype I32; F32, F16, BF16, F8_E8M0 can be read",
    ),
    (
        "fp8-blocks",
        lambda t: t.update({SCALE_INV: spoilt(t[SCALE_INV], np.nan)}),
        f"model.safetensors: {SCALE_INV} has values that are infinite or not numbers",
    ),
    (
        "fp8-tensor",
        lambda t: t.update({f"{Q}.weight": spoilt(t[f"{Q}.weight"], np.nan)}),
        f"model.safetensors: {Q}.weight has values that are infinite or not numbers",
    ),
    (
        "fp8-channel",
        lambda t: t.update({f"{Q}.weight": np.ones((96, 96), np.float32)}),
        f"{Q}.weight has dtype F32; F8_E4M3 can be read",
    ),
    (
        "fp8-channel",
        lambda t: t.update({f"{UP}.weight": t[f"{Q}.weight"][:64]}),
        f"{UP}.weight is stored quantized, but quantization_config leaves its module as it is",
    ),
    (
        "int4",
        lambda t: t.update({f"{EXPERT}.weight_shape": np.array([48, 64])}),
        f"model.safetensors: {EXPERT}.weight_shape is (48, 64), but config.json calls for (64, 48)",
    ),
    (
        "int4",
        lambda t: t.pop(f"{EXPERT}.weight_shape"),
        f"lacks the tensor {EXPERT}.weight_shape",
    ),
    (
        "int4",
        lambda t: t.update({f"{EXPERT}.weight_packed": t[f"{EXPERT}.weight_packed"][:, 1:]}),
        f"{EXPERT}.weight_packed has shape (64, 5), but config.json calls for (64, 6)",
    ),
    (
        "int4-zeros",
        lambda t: t.pop(f"{Q}.weight_zero_point"),
        f"lacks the tensor {Q}.weight_zero_point, which its config.json calls for in shape (12, 3)",
    ),
    ("awq", lambda t: t.pop(f"{Q}.qzeros"), f"lacks the tensor {Q}.qzeros"),
    (
        "gptq-ordered",
        lambda t: t.pop(f"{Q}.g_idx"),
        f"lacks the tensor {Q}.g_idx, which its config.json calls for in shape (96,)",
    ),
    (
        "gptq",
        lambda t: t.update({f"{Q}.g_idx": spoilt(t[f"{Q}.g_idx"], 6)}),
        f"model.safetensors: {Q}.g_idx has groups 0 to 6 of 6",
    ),
    (
        "gptq",
        lambda t: t.update({f"{Q}.scales": spoilt(t[f"{Q}.scales"], np.inf)}),
        f"model.safetensors: {Q}.scales has values that are infinite or not numbers",
    ),
    (
        "nvfp4",
        lambda t: t.update({f"{Q}.weight_global_scale": np.zeros(1, np.float32)}),
        f"model.safetensors: {Q}.weight_global_scale is 0",
    ),
    (
        "nvfp4-modelopt",
        lambda t: t.pop(f"{UP}.weight_scale_2"),
        f"lacks the tensor {UP}.weight_scale_2, which its config.json calls for in shape (1,)",
    ),
    (
        "mxfp4-packed",
        lambda t: t.update({f"{Q}.weight_scale": spoilt(t[f"{Q}.weight_scale"], 255)}),
        f"model.safetensors: {Q}.weight_scale has values that are infinite or not numbers",
    ),
    (
        "gptq",
        lambda t: t.update({f"{Q}.bias": np.ones(96, np.float16)}),
        f"holds the tensor {Q}.bias, which a llama model",
    ),
    (
        "gptq",
        lambda t: t.update({f"{LAYER}self_attn.qkv.input_scale": np.ones(1, np.float16)}),
        f"holds the tensor {LAYER}self_attn.qkv.input_scale, which a llama model",
    ),
]


@pytest.mark.parametrize("form, change, words", DAMAGES, ids=[row[2][:60] for row in DAMAGES])
def test_damages_are_named(tmp_path, form, change, words):
    directory = damaged(form, tmp_path, change)
    with pytest.raises(UserError) as caught:
        load_weights(open_source(directory), WeightSharding(), 0)
    message = str(caught.value)
    assert str(directory) in message
    assert words in message and "\n" not in message
    with pytest.raises(UserError, match=re.escape(words.split(": ")[-1])):
        verify(open_source(directory))


def test_a_bias_of_zeros_that_the_tools_of_gptq_add(tmp_path):
    zeros = {f"{Q}.bias": np.zeros(96, np.float16)}
    source = open_source(damaged("gptq", tmp_path, lambda tensors: tensors.update(zeros)))
    assert f"{Q}.bias" not in load_weights(source, WeightSharding(), 0)


def test_scales_of_fp8_under_another_name(tmp_path):
    """As AutoFP8 wrote them."""

    def rename(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale_inv")]:
            tensors[name.removesuffix("_inv")] = tensors.pop(name)

    source = open_source(damaged("fp8-tensor", tmp_path, rename))
    loaded = load_weights(source, WeightSharding(), 0)
    np.testing.assert_array_equal(loaded[f"{Q}.weight"], drawn("fp8-tensor")[1][f"{Q}.weight"])


@pytest.mark.parametrize(
    "quantization", [COMPRESSED | {"config_groups": {}}, {"quant_algo": None, "ignore": []}]
)
def test_a_cache_in_fp8_and_weights_as_they_are(tmp_path, quantization):
    raw = quantized_models.LLAMA | {"quantization_config": quantization}
    weights = drawn("fp8-tensor")[1] | {f"{LAYER}self_attn.k_scale": np.ones(1, np.float32)}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    source = open_source(tmp_path)
    assert "quantized" not in "\n".join(describe(source))
    assert (
        load_weights(source, WeightSharding(), 0)[f"{Q}.weight"] == weights[f"{Q}.weight"]
    ).all()


def test_the_text_half_of_a_quantized_multimodal_checkpoint(tmp_path):
    """Its names begin with language_model., in the files and in the configuration."""
    raw = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": quantized_models.LLAMA | {"model_type": "mistral"},
        "vision_config": {"model_type": "pixtral"},
        "quantization_config": {
            "quant_algo": "MIXED_PRECISION",
            "ignore": ["language_model.model.layers.0.*"],
            "quantized_layers": {"language_model.model.layers.1*": {"quant_algo": "FP8"}},
        },
    }
    tensors, numbers = drawn("fp8-modelopt")
    second = {name: array for name, array in tensors.items() if name.startswith(LAYER)}
    others = {name: array for name, array in numbers.items() if not name.startswith(LAYER)}
    stored = {f"language_model.{name}": array for name, array in (second | others).items()}
    stored["vision_tower.patch.weight"] = np.zeros((3, 3), ml_dtypes.float8_e4m3fn)
    stored["vision_tower.patch.weight_scale"] = np.ones(1, np.float32)
    save_file(
        {name: np.array(array, order="C") for name, array in stored.items()},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps(raw))
    source = open_source(tmp_path)
    for name, array in load_weights(source, WeightSharding(), 0).items():
        np.testing.assert_array_equal(array, numbers[name], name)
    assert "quantized     7 matrices: FP8" in "\n".join(describe(source))


@pytest.mark.parametrize("form", ["awq", "fp8-tensor", "int4-zeros", "nvfp4-modelopt"])
def test_quantized_weights_without_a_configuration(tmp_path, form):
    directory = write_quantized(form, tmp_path)
    (directory / "config.json").write_text(json.dumps(MODELS[form].raw))
    with pytest.raises(UserError) as caught:
        open_source(directory)
    assert "is stored quantized, but config.json has no quantization_config" in str(caught.value)


# Configurations.

TAKE = "take the model's unquantized checkpoint, or dequantize this one and save it"
LINEAR = {"targets": ["Linear"]}


WITH_ITS_FORMAT = {
    "weights": {"type": "float", "num_bits": 4, "group_size": 32},
    "format": "mxfp4-pack-quantized",
}


def group(form: str = "int-quantized", **weights: Any) -> dict[str, Any]:
    """A configuration of compressed-tensors with one group."""
    groups = {"group_0": LINEAR | {"weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


REFUSALS: list[tuple[dict[str, Any], str]] = [
    (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        '.quant_method = "bitsandbytes" must be one of fp8, fbgemm_fp8, compressed-tensors, '
        f"modelopt, modelopt_fp4, awq, gptq: {TAKE}",
    ),
    ({"bits": 4}, ".quant_method must be one of fp8, fbgemm_fp8, compressed-tensors, "),
    ({"quant_method": "gptq", "bits": 3}, ".bits = 3 is not read: 4 is"),
    ({"quant_method": "gptq"}, ".bits is not read: 4 is"),
    (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        '.checkpoint_format = "marlin" is not read: gptq and gptq_v2 are',
    ),
    (
        {"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*down.*": {"bits": 8}}},
        ".dynamic = ",
    ),
    (
        {"quant_method": "gptq", "bits": 4, "group_size": 0},
        ".group_size = 0 must be a positive whole number",
    ),
    ({"quant_method": "awq", "bits": 8}, ".bits = 8 is not implemented: 4 is"),
    ({"quant_method": "awq", "version": "gemv"}, '.version = "gemv" is not read: gemm is'),
    ({"quant_method": "awq", "zero_point": False}, ".zero_point = false is not implemented"),
    (
        {"quant_method": "fp8", "weight_block_size": [128]},
        ".weight_block_size = [128] must be the rows and columns of a block, such as [128, 128]",
    ),
    ({"quant_method": "fp8", "weight_block_size": [0, 128]}, ".weight_block_size = [0, 128] must "),
    (
        group("nvfp4-pack-quantized", type="float", num_bits=4, strategy="channel"),
        '.config_groups.group_0.weights.strategy = "channel" is not implemented: "group" and ',
    ),
    ({"quant_method": "fp8", "fmt": "e5m2"}, '.fmt = "e5m2" is not implemented: "e4m3" and'),
    (
        {"quant_method": "fp8", "modules_to_not_convert": "lm_head"},
        '.modules_to_not_convert = "lm_head" must be a list of names',
    ),
    (
        {"quant_method": "fp8", "modules_to_not_convert": ["("]},
        ".modules_to_not_convert = ",
    ),
    (
        {"quant_method": "fp8", "expert_dtype": "fp4"},
        '.expert_dtype = "fp4" is not a field that is known for fp8: ',
    ),
    (
        {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"},
        '.quant_algo = "W4A16_AWQ" is not read: FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, NVFP4, ',
    ),
    ({"quant_method": "modelopt"}, ".quant_algo is not read: FP8, "),
    (
        {"quant_algo": "MIXED_PRECISION"},
        ".quantized_layers is missing: it must say how each layer is stored",
    ),
    (
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "MXFP8"}}},
        '.quantized_layers.a.quant_algo = "MXFP8" is not read: FP8, ',
    ),
    (
        {"quant_method": "fp8", "quant_algo": "MIXED_PRECISION"},
        f'.quant_algo = "MIXED_PRECISION" is not read beside quant_method fp8: {TAKE}',
    ),
    (
        {"quant_algo": "NVFP4", "group_size": 32},
        ".group_size = 32 is not implemented: 16 is",
    ),
    (
        group(type="int", num_bits=4, strategy="channel"),
        ".config_groups.group_0.weights.num_bits = 4 with int in the format int-quantized is not ",
    ),
    (
        group(strategy="attn_head"),
        '.config_groups.group_0.weights.strategy = "attn_head" is not read: tensor, ',
    ),
    (
        group(type="float", strategy="tensor", form="marlin-24"),
        ".config_groups.group_0.weights.num_bits with float in the format marlin-24 is not read: ",
    ),
    (
        group(frobnicate=1),
        ".config_groups.group_0.weights.frobnicate = 1 is not a field that is known for ",
    ),
    (
        {"quant_method": "compressed-tensors"},
        ".config_groups is missing: it must say how weights are stored",
    ),
    (
        COMPRESSED | {"transform_config": {"a": 1}},
        '.transform_config = {"a": 1} is not implemented',
    ),
    (
        COMPRESSED | {"sparsity_config": {"format": "sparse-24-bitmask"}},
        '.sparsity_config.format = "sparse-24-bitmask" is not implemented: "dense" is',
    ),
    (
        COMPRESSED | {"quantization_status": "frozen"},
        '.quantization_status = "frozen" is not implemented: "compressed" is',
    ),
]


@pytest.mark.parametrize("quantization, words", REFUSALS, ids=[row[1][:60] for row in REFUSALS])
def test_configurations_that_are_not_read(quantization, words):
    raw = quantized_models.LLAMA | {"quantization_config": quantization}
    with pytest.raises(UserError) as caught:
        read_model_config(raw, None, "model/config.json")
    assert str(caught.value).startswith(f"model/config.json: quantization_config{words}")


def test_the_configuration_in_its_own_file_is_named():
    with pytest.raises(UserError) as caught:
        read_model_config(
            quantized_models.LLAMA,
            None,
            "model/config.json",
            quantization={"quantization": {"quant_algo": "W4A8_AWQ"}},
        )
    assert str(caught.value).startswith(
        'hf_quant_config.json beside model/config.json: quantization.quant_algo = "W4A8_AWQ" is not'
    )


# A configuration, and the scheme of its modules.
READ: list[tuple[dict[str, Any], Scheme]] = [
    (group("naive-quantized", type="float", strategy="channel"), Scheme("fp8", (1, None), bits=8)),
    (group("naive-quantized", strategy="tensor"), Scheme("int8", bits=8)),
    (group("int-quantized", strategy="group", group_size=32), Scheme("int8", (1, 32), bits=8)),
    (group("float-quantized", type="float"), Scheme("fp8", bits=8)),
    (
        group("float-quantized", type="float", strategy="block", block_structure=[1, 128]),
        Scheme("fp8", (1, 128), bits=8),
    ),
    (
        group("pack-quantized", num_bits=4, group_size=64, symmetric=False, actorder="weight"),
        Scheme("packed", (1, 64), symmetric=False),
    ),
    (group("nvfp4-pack-quantized", type="float", num_bits=4), Scheme("nvfp4", (1, 16))),
    (
        {"quant_method": "compressed-tensors", "config_groups": {"a": LINEAR | WITH_ITS_FORMAT}},
        Scheme("mxfp4-packed", (1, 32)),
    ),
    ({"quant_algo": "fp8_pb_wo"}, Scheme("fp8", (128, 128))),
    ({"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, Scheme("fp8", (1, None))),
    ({"quant_algo": "W4A16_NVFP4", "group_size": 16}, Scheme("nvfp4-modelopt", (1, 16))),
    (
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"},
        Scheme("awq", (1, 64), symmetric=False),
    ),
    (
        {"quant_method": "gptq", "bits": 4},
        Scheme("gptq", (1, 128), symmetric=False, zeros_less_one=True),
    ),
    (
        {"quant_method": "gptq", "bits": 4, "format": "gptq_v2", "group_size": -1},
        Scheme("gptq", (1, None), symmetric=False),
    ),
]


@pytest.mark.parametrize("name", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("quantization, scheme", READ)
def test_configurations_that_are_read(quantization, scheme, name):
    config = read_model_config(quantized_models.LLAMA | {name: quantization}, None, "config.json")
    assert config.quantization is not None
    assert config.quantization.scheme("model.layers.0.mlp.up_proj") == scheme


# A configuration, a module, and the form that it has; None: it is not quantized.
SCHEMES: list[tuple[dict[str, Any], str, str | None]] = [
    ({"quant_method": "awq", "modules_to_not_convert": ["gate"]}, "layers.1.mlp.gate_proj", "awq"),
    ({"quant_method": "awq", "modules_to_not_convert": ["gate"]}, "layers.1.mlp.gate", None),
    ({"quant_method": "fp8", "ignored_layers": ["model.layers.1"]}, "model.layers.1.mlp.up", None),
    (
        {"quant_method": "fp8", "ignored_layers": ["model.layers.1"]},
        "model.layers.11.mlp.up",
        "fp8",
    ),
    (
        {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.*.self_attn"]},
        "model.layers.11.self_attn.q_proj",
        None,
    ),
    ({"quant_algo": "NVFP4", "ignore": ["a.0*"]}, "a.0.self_attn.q_proj", None),
    ({"quant_algo": "NVFP4", "ignore": ["a.1.mlp"]}, "a.1.mlp.up_proj", None),
    ({"quant_algo": "NVFP4", "ignore": ["a.1.mlp"]}, "a.10.mlp.up_proj", "nvfp4-modelopt"),
    (COMPRESSED, "lm_head", None),
    (COMPRESSED, "model.layers.1.mlp.up_proj", None),
    (COMPRESSED, "model.layers.11.mlp.up_proj", "fp8"),
    (
        {"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*self_attn.*": {}}},
        "model.layers.0.self_attn.q_proj",
        None,
    ),
    ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "a.b", "fp8"),
]


@pytest.mark.parametrize("quantization, module, form", SCHEMES)
def test_which_modules_are_quantized(quantization, module, form):
    raw = quantized_models.LLAMA | {"quantization_config": quantization}
    config = read_model_config(raw, None, "model/config.json")
    assert config.quantization is not None
    scheme = config.quantization.scheme(module)
    assert (scheme and scheme.form) == form
