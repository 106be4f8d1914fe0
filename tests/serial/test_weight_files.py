"""Checkpoints as they lie on disks: without an index, half downloaded, in formats of others."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import rewrite, tiny_weights, write_checkpoint

from mpishard.config.weight_sharding import WeightSharding
from mpishard.errors import UserError
from mpishard.storage.convert import convert
from mpishard.storage.source import notices, open_source
from mpishard.storage.weights import load_weights

VARIANT = "llama-uneven"
POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4665fb61f1b6a2c1f5b1a0c9a5a0d8c8b1f1b1c5a1d1e1f1a1b1c1d1e1f1a1b1\nsize 4976698672\n"
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_checkpoint(VARIANT, tmp_path / "model")


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Three files of weights, without an index."""
    directory = write_checkpoint(VARIANT, tmp_path / "model", shards=3)
    (directory / "model.safetensors.index.json").unlink()
    return directory


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_source(path)
    return str(caught.value)


def check_loads(directory: Path) -> None:
    loaded = load_weights(open_source(directory), WeightSharding(), 0)
    assert loaded.keys() == tiny_weights(VARIANT).keys()
    for name, array in tiny_weights(VARIANT).items():
        np.testing.assert_array_equal(loaded[name], array)


# Without an index


@pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "weights.safetensors"])
def test_one_file_of_any_name(directory, name):
    (directory / "model.safetensors").rename(directory / name)
    check_loads(directory)


def test_a_numbered_set(three):
    check_loads(three)
    (three / "consolidated.safetensors").write_bytes(b"other names for the same weights")
    check_loads(three)


def test_a_numbered_set_that_is_incomplete(three):
    (three / "model-00002-of-00003.safetensors").unlink()
    message = refusal(three)
    assert message.startswith(f"{three / 'model-00002-of-00003.safetensors'} is missing: ")
    assert message.endswith("model-00001-of-00003.safetensors is one of 3 files")
    (three / "model-00003-of-00003.safetensors").unlink()
    first = three / "model-00001-of-00003.safetensors"
    first.rename(three / "model-00001-of-99999.safetensors")
    assert "model-00002-of-99999.safetensors is missing" in refusal(three)


@pytest.mark.parametrize(
    "name",
    ["model-00001-of-00002.safetensors", "extra.safetensors", "x-00001-of-00003.safetensors"],
)
def test_files_that_are_of_several_models(three, name):
    (three / name).write_bytes(b"")
    message = refusal(three)
    assert "and no model.safetensors.index.json that says which of them are the model" in message
    assert "and 2 more" in message


def test_a_tensor_that_two_files_hold(three):
    twice = {"model.norm.weight": np.ones(24, np.float32)}
    rewrite(three / "model-00001-of-00003.safetensors", lambda tensors: tensors.update(twice))
    message = refusal(three)
    assert "both hold model.norm.weight, and there is no model.safetensors.index.json" in message


# Half downloaded, half copied


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_pointers_of_git_lfs(directory, name):
    (directory / name).write_text(POINTER)
    assert refusal(directory) == (
        f"{directory / name} is a pointer of git-lfs, not the file itself: "
        f"run `git lfs pull` in {directory}"
    )


def test_pointers_of_git_lfs_below_an_index(tmp_path):
    directory = write_checkpoint(VARIANT, tmp_path, shards=2)
    (directory / "model-00002-of-00002.safetensors").write_text(POINTER)
    assert "model-00002-of-00002.safetensors is a pointer of git-lfs" in refusal(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_empty_files(directory, name):
    (directory / name).write_bytes(b"")
    assert refusal(directory) == f"{directory / name} is empty (0 bytes): download or copy it again"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_page_in_place_of_a_file(directory, name):
    (directory / name).write_text("<!DOCTYPE html>\n<html><title>Sign in</title></html>")
    assert f"{directory / name} is a web page, not the file itself" in refusal(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_links_that_lead_nowhere(directory, name):
    (directory / name).unlink()
    (directory / name).symlink_to("../blobs/0123")
    if name == "config.json":  # then nothing says that there is a model
        assert "has neither config.json" in refusal(directory)
        return
    assert f"{directory / name} is a link to ../blobs/0123, which does not" in refusal(directory)


def test_a_truncated_file_says_how_long_it_should_be(directory):
    path = directory / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-10])
    message = refusal(directory)
    assert message.startswith(f"{path} ({size - 10} bytes) is truncated or damaged: ")
    assert message.endswith(f"; its header asks for {size} bytes")


HUB = ".cache/huggingface/download/model.safetensors.0123abc.incomplete"


@pytest.mark.parametrize("unfinished", [HUB, "model.safetensors.part", "x.aria2", "y.crdownload"])
@pytest.mark.parametrize("left", ["nothing", "a part", "an index", "no configuration"])
def test_downloads_that_did_not_finish(tmp_path, unfinished, left):
    directory = write_checkpoint(VARIANT, tmp_path, shards=2 if left == "an index" else 1)
    for file in directory.glob("model*.safetensors"):
        if left == "a part":
            file.write_bytes(file.read_bytes()[:-10])
        else:
            file.unlink()
    if left == "no configuration":
        (directory / "config.json").unlink()
    assert "a download" not in refusal(directory)
    (directory / unfinished).parent.mkdir(parents=True, exist_ok=True)
    (directory / unfinished).write_bytes(b"x")
    name = Path(unfinished).name
    assert f"; {name} is of a download that did not finish: start it again" in refusal(directory)


@contextmanager
def ordinary_user(directory: Path) -> Iterator[None]:
    """Nobody, in place of root, for whom no file is closed."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "."])
def test_what_may_not_be_read(name):
    with tempfile.TemporaryDirectory() as place:
        directory = write_checkpoint(VARIANT, Path(place) / "model")
        Path(place).chmod(0o755)
        (directory / "model.safetensors").chmod(0o644)
        mode = (directory / name).stat().st_mode
        (directory / name).chmod(0)
        with ordinary_user(directory):
            message = refusal(directory)
        (directory / name).chmod(mode)
    what = f"model {directory}" if name == "." else str(directory / name)
    assert message == f"cannot read {what}: Permission denied"


# Formats of others


@pytest.mark.parametrize(
    "names, words",
    [
        (["pytorch_model.bin"], "pytorch_model.bin is pickled weights of PyTorch, which can hold"),
        (["pytorch_model.bin"], "`AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "is pickled"),
        (["model.Q4_K_M.gguf"], "model.Q4_K_M.gguf is weights of llama.cpp; download the model's"),
        (["consolidated.safetensors", "params.json"], "consolidated.safetensors is weights under"),
        (["consolidated.00.pth"], "consolidated.00.pth is weights under the names of their author"),
        (
            ["adapter_model.safetensors", "adapter_config.json"],
            "is an adapter (PEFT), which is",
        ),
        (["tf_model.h5"], "tf_model.h5 is weights of TensorFlow"),
        (["flax_model.msgpack"], "flax_model.msgpack is weights of Flax"),
        (["model.onnx", "model.onnx_data"], "model.onnx is a model of ONNX"),
        (["weights.00.npz"], "weights.00.npz is weights of MLX"),
        (["checkpoint.pt"], "checkpoint.pt is pickled weights of PyTorch"),
        (["README.md"], "neither model.safetensors nor model.safetensors.index.json: no weights"),
    ],
)
def test_formats_that_are_not_read(directory, names, words):
    (directory / "model.safetensors").unlink()
    for name in names:
        (directory / name).write_bytes(b"x")
    message = refusal(directory)
    assert message.startswith(f"{directory} has neither model.safetensors nor ")
    assert words in message
    (directory / "config.json").unlink()
    if names != ["README.md"]:
        assert words in refusal(directory)


def test_the_cache_of_the_hub(directory):
    cache = directory.with_name("models--some--model")
    (cache / "snapshots").mkdir(parents=True)
    directory.rename(cache / "snapshots" / "0123abc")
    sentence = f"{cache} is a folder of the hub's cache: give {cache}/snapshots/0123abc"
    assert refusal(cache) == sentence


def test_a_file_in_place_of_the_directory(directory):
    (directory / "model.gguf").write_bytes(b"GGUF")
    assert "model.gguf is weights of llama.cpp; download" in refusal(directory / "model.gguf")
    message = refusal(directory / "model.safetensors")
    assert "model.safetensors is not a directory: give a local Hugging Face directory" in message


# Tied heads

TIED = "qwen2-tied"


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return write_checkpoint(TIED, tmp_path / "tied")


EMBEDDING = tiny_weights(TIED)["model.embed_tokens.weight"]


def write_head(directory: Path, head: np.ndarray) -> None:
    rewrite(directory / "model.safetensors", lambda tensors: tensors.update({HEAD: head}))


HEAD = "lm_head.weight"


def test_a_stored_head_that_is_the_embedding(tied):
    head = EMBEDDING.copy()
    head[0, 0] = 0
    zeroed = {"model.embed_tokens.weight": np.where(head == 0, -0.0, head).astype(np.float32)}
    write_head(tied, head)
    rewrite(tied / "model.safetensors", lambda tensors: tensors.update(zeroed))
    source = open_source(tied)
    assert source.config.tied and not source.config.head_differs
    assert HEAD not in load_weights(source, WeightSharding(), 0)


@pytest.mark.parametrize("row", [0, 1, 50, len(EMBEDDING) - 1])
def test_a_stored_head_of_which_one_row_differs_is_used(tied, row, tmp_path):
    head = EMBEDDING.copy()
    head[row, -1] += 0.25
    write_head(tied, head)
    source = open_source(tied)
    assert not source.config.tied and source.config.head_differs
    np.testing.assert_array_equal(load_weights(source, WeightSharding(), 0)[HEAD], head)


def test_shards_of_a_head_that_differs(tied, tmp_path):
    head = EMBEDDING.copy()
    head[7] += 1
    write_head(tied, head)
    convert(open_source(tied), tmp_path / "two", 2)
    convert(open_source(tmp_path / "two"), tmp_path / "one", 1)
    source = open_source(tmp_path / "one")
    assert not source.config.tied and notices(source) == notices(open_source(tied)) != []
    np.testing.assert_array_equal(load_weights(source, WeightSharding(), 0)[HEAD], head)


def test_a_head_that_is_stored_alone_is_the_embedding(tied):
    def rename(tensors: dict[str, np.ndarray]) -> None:
        tensors[HEAD] = tensors.pop("model.embed_tokens.weight")

    rewrite(tied / "model.safetensors", rename)
    source = open_source(tied)
    assert source.config.tied
    loaded = load_weights(source, WeightSharding(), 0)
    np.testing.assert_array_equal(loaded["model.embed_tokens.weight"], EMBEDDING)


def test_a_stored_head_of_another_shape(tied):
    write_head(tied, np.concatenate([EMBEDDING, EMBEDDING[:3]]))
    assert f"{HEAD} has shape (94, 36), but config.json calls for (91, 36)" in refusal(tied)


def test_a_stored_head_of_another_dtype(tied):
    path = tied / "model.safetensors"
    narrow = EMBEDDING.astype(np.float16)
    for factor, is_tied in ((1.0, True), (1.0001, False)):
        wide = {"model.embed_tokens.weight": narrow.astype(np.float32) * np.float32(factor)}
        save_file(load_file(path) | wide | {HEAD: narrow}, path)
        assert open_source(tied).config.tied == is_tied
