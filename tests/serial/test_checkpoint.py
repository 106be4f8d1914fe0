"""Hugging Face directories: what is read, and how each damage is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_models import (
    DTYPES,
    MOE_VARIANTS,
    raw_config,
    rewrite,
    stacked_weights,
    tiny_config,
    tiny_weights,
    write_checkpoint,
)

from mpishard.config.model_config import MoEConfig
from mpishard.config.reader import read_model_config
from mpishard.config.weight_sharding import WeightSharding
from mpishard.config.weight_specs import specs_of_shard, weight_specs
from mpishard.errors import UserError
from mpishard.storage.checkpoint import Checkpoint
from mpishard.storage.inspection import describe, stored_bytes, verify
from mpishard.storage.source import open_source
from mpishard.storage.weights import check_fits, load_weights

VARIANT = "llama-uneven"
TIED = "qwen2-tied"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_checkpoint(VARIANT, tmp_path / "model")


def refusal(directory: Path) -> str:
    with pytest.raises(UserError) as error:
        open_source(directory)
    return str(error.value)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_are_read_in_the_stored_dtype(tmp_path, dtype, shards):
    checkpoint = open_source(write_checkpoint(VARIANT, tmp_path, dtype, shards))
    assert isinstance(checkpoint, Checkpoint)
    whole = tiny_weights(VARIANT, DTYPES[dtype])
    for weight in weight_specs(checkpoint.config):
        assert checkpoint.shape(weight.name) == weight.shape
        assert checkpoint.dtype(weight.name) == DTYPES[dtype]
        for rank in range(5):
            sharding = weight.slices(checkpoint.config, WeightSharding(5), rank)
            part = checkpoint.read(weight.name, sharding)
            assert part.dtype == DTYPES[dtype] and part.flags.c_contiguous
            np.testing.assert_array_equal(part, whole[weight.name][sharding])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("stored", DTYPES)
def test_weights_are_loaded_cut_and_converted(tmp_path, stored, dtype):
    source = open_source(write_checkpoint(VARIANT, tmp_path, stored, shards=2))
    whole = tiny_weights(VARIANT, DTYPES[stored])
    for tp in (1, 4, 7):
        for rank in range(tp):
            loaded = load_weights(source, WeightSharding(tp), rank, dtype)
            for weight in weight_specs(source.config):
                part = loaded[weight.name]
                assert type(part) is np.ndarray and part.dtype == dtype and part.flags.c_contiguous
                sharding = weight.slices(source.config, WeightSharding(tp), rank)
                np.testing.assert_array_equal(part, whole[weight.name][sharding].astype(dtype))


def test_what_is_read_belongs_to_the_caller(directory):
    checkpoint = open_source(directory)
    first = checkpoint.read(Q_PROJ, (slice(0, 2), slice(0, 24)))
    first[:] = 7
    assert not (checkpoint.read(Q_PROJ, (slice(0, 2), slice(0, 24))) == 7).any()


def test_more_ranks_than_query_heads_are_refused(directory):
    with pytest.raises(UserError, match=r"--tp 13 .* 12 query heads"):
        check_fits(open_source(directory), WeightSharding(13))


def test_generation_settings_are_read(directory):
    assert open_source(directory).config.eos_ids == tiny_config(VARIANT).eos_ids
    (directory / "generation_config.json").write_text('{"eos_token_id": [5, 9]}')
    assert open_source(directory).config.eos_ids == (5, 9)


# What is no model.


def test_a_path_that_does_not_exist(tmp_path):
    message = refusal(tmp_path / "nowhere")
    assert "nowhere does not exist" in message and "Hugging Face directory" in message


def test_a_file_in_place_of_a_directory(directory):
    assert "model.safetensors is not a directory" in refusal(directory / "model.safetensors")


def test_a_directory_without_a_model(tmp_path):
    message = refusal(tmp_path)
    assert str(tmp_path) in message and "config.json" in message and "mpishard.json" in message


# Damaged descriptions.


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_malformed_json_is_placed(directory, name):
    (directory / name).write_text('{\n  "hidden_size": 24,\n  "vocab_size": }')
    message = refusal(directory)
    assert f"{name} is not valid JSON" in message and "line 3, column 17" in message


@pytest.mark.parametrize(
    "content, problem",
    [
        ("[" * 99999, "it is nested more than 64 levels deep"),
        ('{"a": ' * 65 + "{}" + "}" * 65, "it is nested more than 64 levels deep"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "it has a whole number of too many digits"),
    ],
)
def test_json_that_python_cannot_work_with(directory, content, problem):
    (directory / "config.json").write_text(content)
    path = directory / "config.json"
    assert refusal(directory).startswith(f"{path} cannot be read as JSON: {problem}")


def test_json_of_another_kind(directory):
    (directory / "config.json").write_text("[1, 2]")
    assert "config.json holds a JSON list" in refusal(directory)


def test_json_that_is_not_text(directory):
    (directory / "config.json").write_bytes(b'{"a": "\xff\xfe"}')
    assert "config.json is not UTF-8 text" in refusal(directory)


def test_a_configuration_that_cannot_be_read(directory):
    (directory / "config.json").unlink()
    (directory / "config.json").mkdir()
    assert "cannot read" in refusal(directory) and "config.json" in refusal(directory)


# Damaged weight files.


def test_no_weight_file(directory):
    (directory / "model.safetensors").unlink()
    message = refusal(directory)
    assert "model.safetensors" in message and "model.safetensors.index.json" in message


@pytest.mark.parametrize("left", [5, 100, -10])
def test_a_truncated_weight_file(directory, left):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    message = refusal(directory)
    assert str(path) in message and "truncated or damaged" in message
    assert f"({path.stat().st_size} bytes)" in message


def test_a_damaged_header(directory):
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[20] = 0
    path.write_bytes(content)
    assert "model.safetensors" in refusal(directory) and "damaged" in refusal(directory)


def test_a_weight_file_that_cannot_be_read(directory):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").mkdir()
    assert "model.safetensors" in refusal(directory)


def test_an_index_that_names_a_missing_file(tmp_path):
    directory = write_checkpoint(VARIANT, tmp_path, shards=3)
    (directory / "model-00002-of-00003.safetensors").unlink()
    message = refusal(directory)
    assert "model-00002-of-00003.safetensors is missing" in message


@pytest.mark.parametrize("absolute", [True, False])
def test_an_index_that_leads_out_of_the_directory(tmp_path, absolute):
    directory = write_checkpoint(VARIANT, tmp_path / "model", shards=2)
    first = "model-00001-of-00002.safetensors"
    (directory / first).rename(tmp_path / first)
    where = str(tmp_path / first) if absolute else f"../{first}"

    def lead_out(content: dict[str, Any]) -> None:
        places = content["weight_map"]
        places |= {name: where for name, file in places.items() if file == first}

    index = directory / "model.safetensors.index.json"
    rewrite(index, lead_out)
    message = refusal(directory)
    assert message.startswith(f"{index} places ")
    assert "outside of the directory: copy that file into it and name it there" in message


@pytest.mark.parametrize("file", ["x" * 300, "", ".", "a\0b", "\ud800", "config.json/x"])
def test_an_index_that_names_what_cannot_be_a_file(tmp_path, file):
    directory = write_checkpoint(VARIANT, tmp_path, shards=2)
    index = directory / "model.safetensors.index.json"
    rewrite(index, lambda content: content["weight_map"].update({Q_PROJ: file}))
    message = refusal(directory)
    assert f"is missing: model.safetensors.index.json places {Q_PROJ} in it" in message
    assert message.isprintable() and len(message) < 500


def test_names_of_any_kind_make_one_short_sentence(directory):
    path = directory / "model.safetensors"
    odd = {"\n\x1b[1m": np.ones(1, np.float32)}
    rewrite(path, lambda tensors: tensors.update(odd))
    assert refusal(directory).startswith(f"{path} holds the tensor \\n\\x1b[1m, which a ")
    path.write_bytes((3000).to_bytes(8, "little") + b'"' + b"x" * 2998 + b'"')
    assert "truncated or damaged" in refusal(directory) and len(refusal(directory)) < 800


def test_an_index_that_names_the_wrong_file(tmp_path):
    directory = write_checkpoint(VARIANT, tmp_path, shards=2)
    index = directory / "model.safetensors.index.json"
    first, second = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    rewrite(index, lambda content: content["weight_map"].update({Q_PROJ: second}))
    message = refusal(directory)
    assert f"{second} lacks {Q_PROJ}" in message and first not in message


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_map(tmp_path, content):
    directory = write_checkpoint(VARIANT, tmp_path, shards=2)
    (directory / "model.safetensors.index.json").write_text(content)
    assert "index.json has no weight_map" in refusal(directory)


# Weights that are not what config.json calls for.


def test_a_missing_tensor(directory):
    rewrite(directory / "model.safetensors", lambda tensors: tensors.pop(Q_PROJ))
    message = refusal(directory)
    assert f"{directory} lacks the tensor {Q_PROJ}" in message and "(48, 24)" in message


def test_a_tensor_of_the_wrong_shape(directory):
    wrong = np.zeros((24, 48), np.float32)
    rewrite(directory / "model.safetensors", lambda tensors: tensors.update({Q_PROJ: wrong}))
    message = refusal(directory)
    assert f"model.safetensors: {Q_PROJ} has shape (24, 48)" in message and "(48, 24)" in message


def test_a_tensor_of_another_dtype(directory):
    def narrow(tensors: dict[str, np.ndarray]) -> None:
        tensors[Q_PROJ] = tensors[Q_PROJ].astype(np.int16)

    rewrite(directory / "model.safetensors", narrow)
    message = refusal(directory)
    assert f"{Q_PROJ} has dtype I16" in message and "F32, F16, BF16" in message


@pytest.mark.parametrize("count", [1, 3])
def test_tensors_that_the_model_does_not_have(directory, count):
    names = ["model.layers.0.self_attn.q_proj.bias", "model.visual.a", "model.visual.b"][:count]
    more = {name: np.ones(3, np.float32) for name in names}
    rewrite(directory / "model.safetensors", lambda tensors: tensors.update(more))
    message = refusal(directory)
    assert names[0] in message and "llama" in message
    assert ("2 more tensors" in message) == (count == 3)


def test_a_tensor_that_is_only_in_the_file_and_not_in_the_index(tmp_path):
    directory = write_checkpoint(VARIANT, tmp_path, shards=2)
    more = {"model.visual.a": np.ones(3, np.float32)}
    rewrite(directory / "model-00002-of-00002.safetensors", lambda tensors: tensors.update(more))
    assert "model.visual.a" in refusal(directory)


def test_rotary_frequencies_are_let_pass(directory):
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    rewrite(directory / "model.safetensors", lambda tensors: tensors.update(more))
    assert more.keys().isdisjoint(load_weights(open_source(directory), WeightSharding(), 0))


def test_loading_keeps_no_file_open(tmp_path):
    source = open_source(write_checkpoint(VARIANT, tmp_path, shards=3))
    before = len(os.listdir("/dev/fd"))
    weights = load_weights(source, WeightSharding(), 0)
    assert len(os.listdir("/dev/fd")) == before and len(weights) > 20


# Experts, one by one and together.

MIXTURE = "mixtral-window"  # 5 experts of width 21, hidden 34
UP_OF_3 = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
STACKABLE = [name for name in MOE_VARIANTS if not name.startswith(("gpt_oss", "granite", "llama4"))]


def one_by_one(variant: str) -> dict[str, np.ndarray]:
    """The weights of a gpt_oss, granitemoe or llama4 under the names of the partition table, taken
    apart by loops."""
    config, weights = tiny_config(variant), tiny_weights(variant)
    assert config.moe is not None
    if variant.startswith("llama4"):
        return _of_llama4(config.moe, weights)
    if variant.startswith("granite"):
        for layer in range(config.layers):
            moe, mlp = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
            both, down = weights.pop(f"{moe}.input_linear.weight"), f"{moe}.output_linear.weight"
            width = config.moe.moe_intermediate_size
            for expert, down_DF in enumerate(weights.pop(down)):
                name = f"{mlp}.experts.{expert}"
                weights[f"{name}.gate_proj.weight"] = both[expert][:width]
                weights[f"{name}.up_proj.weight"] = both[expert][width:]
                weights[f"{name}.down_proj.weight"] = down_DF
        return weights
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        stored = {name: weights.pop(name) for name in list(weights) if name.startswith(prefix)}
        for expert in range(config.moe.num_experts):
            name = f"{prefix}.{expert}"
            for part, first in (("gate", 0), ("up", 1)):
                columns = range(first, 2 * config.moe.moe_intermediate_size, 2)
                rows = [stored[f"{prefix}.gate_up_proj"][expert][:, i] for i in columns]
                weights[f"{name}.{part}_proj.weight"] = np.stack(rows)
                bias = [stored[f"{prefix}.gate_up_proj_bias"][expert][i] for i in columns]
                weights[f"{name}.{part}_proj.bias"] = np.array(bias)
            weights[f"{name}.down_proj.weight"] = stored[f"{prefix}.down_proj"][expert].T
            weights[f"{name}.down_proj.bias"] = stored[f"{prefix}.down_proj_bias"][expert]
    return weights


def _of_llama4(moe: MoEConfig, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Transposed matrices, in one tensor columns of gate and then those of up."""
    width = moe.moe_intermediate_size
    for layer in (layer for layer, has_experts in enumerate(moe.layers) if has_experts):
        stored = f"model.layers.{layer}.feed_forward.experts"
        both, down = weights.pop(f"{stored}.gate_up_proj"), weights.pop(f"{stored}.down_proj")
        for expert in range(moe.num_experts):
            name = f"model.layers.{layer}.mlp.experts.{expert}"
            weights[f"{name}.gate_proj.weight"] = both[expert][:, :width].T
            weights[f"{name}.up_proj.weight"] = both[expert][:, width:].T
            weights[f"{name}.down_proj.weight"] = down[expert].T
    return weights


@pytest.mark.parametrize(
    "sharding",
    [WeightSharding(), WeightSharding(2, 3), WeightSharding(4, 2), WeightSharding(1, 1, 3)],
    ids=str,
)
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("variant", MOE_VARIANTS)
def test_experts_are_loaded_one_by_one_however_they_are_stored(
    tmp_path, variant, stacked, sharding
):
    source = open_source(write_checkpoint(variant, tmp_path, "bfloat16", shards=2, stacked=stacked))
    whole = tiny_weights(variant) if variant in STACKABLE else one_by_one(variant)
    assert whole.keys() == {weight.name for weight in weight_specs(source.config)}
    for index in range(sharding.ranks):
        loaded = load_weights(source, sharding, index)
        held = specs_of_shard(source.config, sharding, index)
        assert list(loaded) == [weight.name for weight in held]
        for weight in held:
            part = whole[weight.name][weight.slices(source.config, sharding, index)]
            assert loaded[weight.name].flags.c_contiguous
            np.testing.assert_array_equal(loaded[weight.name], part, weight.name)


@pytest.mark.parametrize(("variant", "stacked"), [(MIXTURE, True), ("gpt_oss-yarn", False)])
def test_a_part_of_stacked_experts_is_looked_at_where_it_lies(tmp_path, variant, stacked):
    source = open_source(write_checkpoint(variant, tmp_path, stacked=stacked))
    assert isinstance(source, Checkpoint)
    for weight in weight_specs(source.config):
        view = source.view(weight.name, weight.slices(source.config, WeightSharding(2, 2), 0))
        assert not view.flags.owndata and not view.flags.writeable
        assert source.shape(weight.name) == weight.shape
    names = stacked_weights(variant)
    assert source.arrays.keys() == names.keys()
    assert stored_bytes(source) == sum(array.nbytes for array in names.values())
    verify(source)


def test_layers_may_store_their_experts_in_different_ways(tmp_path):
    whole, stacked = tiny_weights(MIXTURE), stacked_weights(MIXTURE)
    mixed = {name: array for name, array in whole.items() if "layers.1." not in name}
    mixed |= {name: array for name, array in stacked.items() if "layers.1." in name}
    path = write_checkpoint(MIXTURE, tmp_path) / "model.safetensors"
    save_file(mixed, path)
    loaded = load_weights(open_source(tmp_path), WeightSharding(), 0)
    assert loaded.keys() == whole.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(loaded[name], array)


def test_a_missing_expert(tmp_path):
    path = write_checkpoint(MIXTURE, tmp_path) / "model.safetensors"
    rewrite(path, lambda tensors: tensors.pop(UP_OF_3))
    message = refusal(tmp_path)
    assert f"{tmp_path} lacks the tensor {UP_OF_3}" in message and "(21, 34)" in message


def test_missing_stacked_experts(tmp_path):
    path = write_checkpoint("gpt_oss-plain", tmp_path) / "model.safetensors"
    rewrite(path, lambda tensors: tensors.pop(GATE_UP))
    message = refusal(tmp_path)
    assert f"lacks the tensor {GATE_UP}, " in message and "(8, 37, 28)" in message


def test_too_few_stacked_experts(tmp_path):
    path = write_checkpoint(MIXTURE, tmp_path, stacked=True) / "model.safetensors"
    rewrite(path, lambda tensors: tensors.update({GATE_UP: tensors[GATE_UP][:4].copy()}))
    message = refusal(tmp_path)
    assert f"{GATE_UP} has shape (4, 42, 34)" in message and "(5, 42, 34)" in message


def test_experts_that_are_stored_twice(tmp_path):
    path = write_checkpoint(MIXTURE, tmp_path) / "model.safetensors"
    rewrite(path, lambda tensors: tensors.update({GATE_UP: stacked_weights(MIXTURE)[GATE_UP]}))
    assert f"holds the tensor {GATE_UP}, which a mixtral model" in refusal(tmp_path)


def test_layers_that_predict_several_tokens_are_let_pass(tmp_path):
    variant = "deepseek_v3-groups"  # 3 layers and one of that kind
    path = write_checkpoint(variant, tmp_path) / "model.safetensors"
    more = {"model.layers.3.eh_proj.weight": np.ones((3, 3), np.float32)}
    rewrite(path, lambda tensors: tensors.update(more))
    assert (
        load_weights(open_source(tmp_path), WeightSharding(), 0).keys()
        == tiny_weights(variant).keys()
    )
    rewrite(
        tmp_path / "config.json", lambda content: content.update(num_nextn_predict_layers=2**60)
    )
    more = {"model.layers.9.eh_proj.weight": np.ones((3, 3), np.float32)}
    rewrite(path, lambda tensors: tensors.update(more))
    assert (
        load_weights(open_source(tmp_path), WeightSharding(), 0).keys()
        == tiny_weights(variant).keys()
    )
    more = {"model.layers.x.eh_proj.weight": np.ones((3, 3), np.float32)}
    rewrite(path, lambda tensors: tensors.update(more))
    assert "model.layers.x.eh_proj.weight" in refusal(tmp_path)  # soon: nothing counts to 2**60
    rewrite(tmp_path / "config.json", lambda content: content.update(num_nextn_predict_layers=1))
    rewrite(path, lambda tensors: tensors.pop("model.layers.x.eh_proj.weight"))
    assert "model.layers.9.eh_proj.weight" in refusal(tmp_path)


def test_layers_beside_the_decoder_are_let_pass(tmp_path):
    variant = "qwen3_next-mixed"
    path = write_checkpoint(variant, tmp_path) / "model.safetensors"
    more = {"mtp.layers.0.input_layernorm.weight": np.ones(3, np.float32)}
    rewrite(path, lambda tensors: tensors.update(more))
    loaded = load_weights(open_source(tmp_path), WeightSharding(), 0)
    assert loaded.keys() == tiny_weights(variant).keys()


# Experts quantized to four bits.


def by_the_specification(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The rows of one expert's matrix, number by number: sign, two bits of exponent, one of
    mantissa, times the power of two of its group."""
    rows, groups, _ = blocks.shape
    wide = np.empty((rows, 32 * groups))
    for row, column in np.ndindex(wide.shape):
        group, place = divmod(column, 32)
        byte = int(blocks[row, group, place // 2])
        bits = byte >> 4 if place % 2 else byte & 15
        sign, exponent, mantissa = bits >> 3, bits >> 1 & 3, bits & 1
        magnitude = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
        wide[row, column] = (-1) ** sign * magnitude * 2.0 ** (int(scales[row, group]) - 127)
    return wide


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A gpt_oss with 5 experts as it is published, and its weights of experts in float64."""
    directory = tmp_path_factory.mktemp("quantized")
    raw = raw_config("gpt_oss-plain") | {"hidden_size": 64, "intermediate_size": 96}
    raw |= {"num_local_experts": 5, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
    raw["quantization_config"] = {"quant_method": "mxfp4"}
    config = read_model_config(raw, None, "config.json")
    random = np.random.default_rng(11)
    weights = {
        weight.name: random.standard_normal(weight.shape, np.float32)
        for weight in weight_specs(config)
        if weight.expert is None
    }
    prefix, expected = "model.layers.0.mlp.experts", {}
    parts = (("gate_up_proj", 192, 64), ("down_proj", 64, 96))
    for part, rows, columns in parts:
        name, groups = f"{prefix}.{part}", columns // 32
        weights[f"{name}_bias"] = random.standard_normal((5, rows), np.float32)
        blocks = random.integers(0, 256, (5, rows, groups, 16), np.uint8)
        scales = random.integers(115, 130, (5, rows, groups), np.uint8)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        for expert in range(5):
            wide = by_the_specification(blocks[expert], scales[expert])
            if part == "down_proj":
                expected[f"{prefix}.{expert}.down_proj.weight"] = wide
            else:
                expected[f"{prefix}.{expert}.gate_proj.weight"] = wide[::2]
                expected[f"{prefix}.{expert}.up_proj.weight"] = wide[1::2]
    (directory / "config.json").write_text(json.dumps(raw))
    save_file(weights, directory / "model.safetensors")
    return directory, expected


def test_four_bits_are_widened_as_the_specification_says(quantized):
    directory, expected = quantized
    source = open_source(directory)
    for sharding in (
        WeightSharding(),
        WeightSharding(2, 3),
        WeightSharding(6, 2),
        WeightSharding(1, 1, 5),
    ):
        for index in range(sharding.ranks):
            loaded = load_weights(source, sharding, index)
            for weight in specs_of_shard(source.config, sharding, index):
                if weight.name in expected:
                    part = expected[weight.name][weight.slices(source.config, sharding, index)]
                    np.testing.assert_array_equal(loaded[weight.name], part, weight.name)
    assert isinstance(source, Checkpoint)
    name = "model.layers.0.mlp.experts.4.down_proj.weight"
    for start in range(0, 96, 7):
        for stop in range(start, 97, 5):
            part = source.read(name, (slice(3, 9), slice(start, stop)), ml_dtypes.bfloat16)
            np.testing.assert_array_equal(part, expected[name][3:9, start:stop])
    assert source.read(name, (slice(5, 5), slice(0, 96))).shape == (0, 96)


def test_four_bits_are_described_and_verified(quantized):
    source = open_source(quantized[0])
    assert "MXFP4 and float32" in "\n".join(describe(source))
    steps: list[int] = []
    verify(source, steps.append)
    assert sum(steps) == stored_bytes(source)


@pytest.fixture
def damaged(quantized: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(quantized[0], tmp_path / "damaged"))


SCALES = "model.layers.0.mlp.experts.down_proj_scales"


def test_a_scale_that_is_not_a_number(damaged):
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors[SCALES][2, 7, 1] = 255

    rewrite(damaged / "model.safetensors", spoil)
    with pytest.raises(UserError, match=f"{SCALES} has values that are infinite or not numbers"):
        verify(open_source(damaged))


def test_blocks_without_their_scales(damaged):
    rewrite(damaged / "model.safetensors", lambda tensors: tensors.pop(SCALES))
    message = refusal(damaged)
    assert f"lacks the tensor {SCALES}" in message and "(5, 64, 3)" in message


def test_blocks_of_another_kind(damaged):
    def retype(tensors: dict[str, np.ndarray]) -> None:
        tensors[SCALES] = tensors[SCALES].astype(np.float32)

    rewrite(damaged / "model.safetensors", retype)
    assert f"{SCALES} has dtype F32; U8, F8_E8M0 can be read" in refusal(damaged)
