"""Hugging Face directories: what is read, and how each damage is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import DTYPES, tiny_config, tiny_weights, write_checkpoint

from mpishard.description.partition import weight_table
from mpishard.errors import UserError
from mpishard.storage.checkpoint import Checkpoint
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


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Applies `change` to the JSON object or the tensors in a file."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    else:
        content = load_file(path)
        change(content)
        save_file(content, path)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_are_read_in_the_stored_dtype(tmp_path, dtype, shards):
    checkpoint = open_source(write_checkpoint(VARIANT, tmp_path, dtype, shards))
    assert isinstance(checkpoint, Checkpoint)
    whole = tiny_weights(VARIANT, DTYPES[dtype])
    for weight in weight_table(checkpoint.config):
        assert checkpoint.shape(weight.name) == weight.shape
        assert checkpoint.dtype(weight.name) == DTYPES[dtype]
        for rank in range(5):
            cut = weight.slices(checkpoint.config, 5, rank)
            part = checkpoint.read(weight.name, cut)
            assert part.dtype == DTYPES[dtype] and part.flags.c_contiguous
            np.testing.assert_array_equal(part, whole[weight.name][cut])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("stored", DTYPES)
def test_weights_are_loaded_cut_and_converted(tmp_path, stored, dtype):
    source = open_source(write_checkpoint(VARIANT, tmp_path, stored, shards=2))
    whole = tiny_weights(VARIANT, DTYPES[stored])
    for tp in (1, 4, 7):
        for rank in range(tp):
            loaded = load_weights(source, tp, rank, dtype)
            for weight in weight_table(source.config):
                part = loaded[weight.name]
                assert type(part) is np.ndarray and part.dtype == dtype and part.flags.c_contiguous
                cut = weight.slices(source.config, tp, rank)
                np.testing.assert_array_equal(part, whole[weight.name][cut].astype(dtype))


def test_what_is_read_belongs_to_the_caller(directory):
    checkpoint = open_source(directory)
    first = checkpoint.read(Q_PROJ, (slice(0, 2), slice(0, 24)))
    first[:] = 7
    assert not (checkpoint.read(Q_PROJ, (slice(0, 2), slice(0, 24))) == 7).any()


def test_more_ranks_than_query_heads_are_refused(directory):
    with pytest.raises(UserError, match=r"--tp 13 .* 12 query heads"):
        check_fits(open_source(directory), 13)


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


@pytest.mark.parametrize("left", [0, 5, 100, -10])
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
        tensors[Q_PROJ] = tensors[Q_PROJ].astype(np.int8)

    rewrite(directory / "model.safetensors", narrow)
    message = refusal(directory)
    assert f"{Q_PROJ} has dtype I8" in message and "F32, F16, BF16" in message


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
    assert more.keys().isdisjoint(load_weights(open_source(directory), 1, 0))


def test_a_tied_head_is_let_pass_where_it_is_the_embedding(tmp_path):
    path = write_checkpoint(TIED, tmp_path) / "model.safetensors"
    head = {"lm_head.weight": tiny_weights(TIED)["model.embed_tokens.weight"]}
    rewrite(path, lambda tensors: tensors.update(head))
    assert "lm_head.weight" not in load_weights(open_source(tmp_path), 1, 0)
    head["lm_head.weight"] = head["lm_head.weight"] + 1
    rewrite(path, lambda tensors: tensors.update(head))
    message = refusal(tmp_path)
    assert "lm_head.weight differs from model.embed_tokens.weight" in message
    assert "tie_word_embeddings" in message


def test_loading_keeps_no_file_open(tmp_path):
    source = open_source(write_checkpoint(VARIANT, tmp_path, shards=3))
    before = len(os.listdir("/dev/fd"))
    weights = load_weights(source, 1, 0)
    assert len(os.listdir("/dev/fd")) == before and len(weights) > 20
