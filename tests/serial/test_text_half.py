"""The text half of a multimodal checkpoint, under every name that its tensors have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_models import raw_config, stacked_weights, tiny_weights, write_checkpoint

from mpishard.config.weight_sharding import WeightSharding
from mpishard.errors import UserError
from mpishard.storage.convert import convert
from mpishard.storage.inspection import describe, verify
from mpishard.storage.source import notices, open_source
from mpishard.storage.weights import load_weights

VARIANT, MIXTURE = "mistral-window", "qwen3_moe-normed"
OTHERS: dict[str, Any] = {
    "vision_tower.layers.0.attention.q_proj.weight": np.ones((2, 3), np.float32),
    "vision_tower.norm.weight": np.ones(3, np.int8),
    "multi_modal_projector.linear_1.weight": np.ones((2, 2), np.float32),
}


def old(name: str) -> str:
    return f"language_model.{name}"


def new(name: str) -> str:
    return (
        name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1)
    )


def without(name: str) -> str:
    return name


def write_wrapped(directory: Path, spell: Callable[[str], str] = new, **outer: object) -> Path:
    """The model VARIANT within a multimodal one."""
    directory.mkdir()
    raw = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "text_config": raw_config(VARIANT),
        "vision_config": {"hidden_size": 3},
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(raw | outer))
    tensors = {spell(name): array for name, array in tiny_weights(VARIANT).items()}
    save_file(tensors | OTHERS, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("spell", [old, new, without])
def test_the_weights_are_those_of_the_model_alone(tmp_path, spell):
    alone = open_source(write_checkpoint(VARIANT, tmp_path / "alone"))
    source = open_source(write_wrapped(tmp_path / "wrapped", spell))
    verify(source)
    for rank in range(2):
        right = load_weights(alone, WeightSharding(2), rank)
        loaded = load_weights(source, WeightSharding(2), rank)
        assert loaded.keys() == right.keys()
        for name, array in right.items():
            np.testing.assert_array_equal(loaded[name], array)


def test_what_is_left_unread_is_said(tmp_path):
    source = open_source(write_wrapped(tmp_path / "wrapped"))
    (notice,) = notices(source)
    assert notice == (
        "the text half of mistral3: 3 tensors of multi_modal_projector, vision_tower are unread"
    )
    lines = describe(source)
    assert "family        mistral, in mistral3" in lines
    assert f"note          {notice}" in lines


def test_shards_of_a_text_half(tmp_path):
    source = open_source(write_wrapped(tmp_path / "wrapped"))
    convert(source, tmp_path / "shards", 2)
    shards = open_source(tmp_path / "shards")
    assert shards.config == source.config and notices(shards) == []
    verify(shards)
    loaded, right = (load_weights(one, WeightSharding(2), 1) for one in (shards, source))
    for name, array in right.items():
        np.testing.assert_array_equal(loaded[name], array)


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda t: t.pop(new("model.norm.weight")), "lacks the tensor model.norm.weight"),
        (
            lambda t: t.update({"model.language_model.odd.weight": np.ones(1, np.float32)}),
            "holds the tensor model.odd.weight, which a mistral model with this config.json does",
        ),
        (
            lambda t: t.update({"language_model.model.norm.weight": np.ones(1, np.float32)}),
            "and another model.norm.weight",
        ),
    ],
    ids=["missing", "unknown", "twice"],
)
def test_the_text_half_must_be_whole_and_no_more(tmp_path, change, problem):
    directory = write_wrapped(tmp_path / "wrapped")
    tensors = {new(name): array for name, array in tiny_weights(VARIANT).items()} | OTHERS
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(UserError) as caught:
        open_source(directory)
    assert problem in str(caught.value)


@pytest.mark.parametrize("transposed", [True, False])
def test_experts_of_qwen3_vl_are_stored_in_two_ways(tmp_path, transposed):
    text = raw_config(MIXTURE) | {"model_type": "qwen3_vl_moe_text", "norm_topk_prob": True}
    raw = {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "text_config": text,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    tensors = {
        new(name): np.ascontiguousarray(array.swapaxes(1, 2))
        if transposed and array.ndim == 3
        else array
        for name, array in stacked_weights(MIXTURE).items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = load_weights(open_source(tmp_path), WeightSharding(), 0)
    for name, array in tiny_weights(MIXTURE).items():
        np.testing.assert_array_equal(loaded[name], array)


def test_the_head_decides_where_nobody_says_whether_it_is_tied(tmp_path):
    directory = write_wrapped(tmp_path / "wrapped", tie_word_embeddings=None)
    raw = json.loads((directory / "config.json").read_text())
    raw["text_config"].pop("tie_word_embeddings", None)
    (directory / "config.json").write_text(json.dumps(raw))
    source = open_source(directory)
    assert not source.config.tied
    assert len(notices(source)) == 1  # nothing contradicts what the file says
    tensors = {new(name): array for name, array in tiny_weights(VARIANT).items()}
    del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors")
    assert open_source(directory).config.tied
