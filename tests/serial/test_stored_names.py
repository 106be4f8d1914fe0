"""Weights that share a tensor, or are stored transposed or under other names: slices of any cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from stored import stored
from tiny_layer_norm_models import LAYER_NORM_VARIANTS
from tiny_models import VARIANTS, rewrite, tiny_config, tiny_weights, write_checkpoint

from mpishard.config.stored_names import StoredNames
from mpishard.config.weight_sharding import WeightSharding
from mpishard.config.weight_specs import weight_specs
from mpishard.errors import UserError
from mpishard.storage import checkpoint as checkpoint_module
from mpishard.storage.arrays import row_blocks
from mpishard.storage.convert import convert
from mpishard.storage.inspection import verify
from mpishard.storage.source import open_source
from mpishard.storage.weights import load_weights

VARIANT = "llama-bias"  # 6 query heads on 3 key/value heads, and every projection with a bias
FORMS = {
    "names": StoredNames(
        prefixes=("transformer.", ""),
        layers="h",
        modules={"model.embed_tokens": "wte", "mlp.down_proj": "mlp.c_proj"},
        head="embed_out",
    ),
    "qkv in blocks, transposed": StoredNames(qkv="attn.c_attn", transposed=True),
    "qkv by head, gate over up": StoredNames(
        qkv="self_attn.query_key_value", qkv_by_kv_head=True, gate_up="mlp.gate_up_proj"
    ),
}


@pytest.fixture(params=FORMS)
def checkpoint(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A checkpoint of one of the forms, under the last of its prefixes."""
    names = FORMS[request.param]
    config = replace(tiny_config(VARIANT), stored_names=names)
    monkeypatch.setattr(checkpoint_module, "read_config", lambda *_: config)
    (tmp_path / "config.json").write_text("{}")
    tensors = stored(config, tiny_weights(VARIANT), names.prefixes[-1])
    save_file(tensors, tmp_path / "model.safetensors")
    return open_source(tmp_path)


def test_every_cut_of_every_weight(checkpoint):
    whole = tiny_weights(VARIANT)
    for weight in weight_specs(checkpoint.config):
        for tp in (1, 2, 4, 5, 6):
            for rank in range(tp):
                part = weight.slices(checkpoint.config, WeightSharding(tp), rank)
                expected = whole[weight.name][part]
                np.testing.assert_array_equal(checkpoint.view(weight.name, part), expected)
        for start in range(weight.shape[0]):  # as a conversion in small blocks reads them
            for stop in (start, start + 1, start + 9, start + 20):
                part = (slice(start, stop), *(slice(1, -2) for _ in weight.shape[1:]))
                read = checkpoint.read(weight.name, part)
                assert read.flags.c_contiguous
                np.testing.assert_array_equal(read, whole[weight.name][part])


def test_loaded_verified_and_converted(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("mpishard.storage.shards.read_config", lambda *_: checkpoint.config)
    verify(checkpoint)
    monkeypatch.setattr(
        "mpishard.storage.convert.row_blocks", lambda shape, _: row_blocks(shape, 1 << 22)
    )
    convert(checkpoint, tmp_path / "shards", tp=4)
    shards = open_source(tmp_path / "shards")
    verify(shards)
    for rank in range(4):
        loaded = load_weights(checkpoint, WeightSharding(4), rank)
        of_shards = load_weights(shards, WeightSharding(4), rank)
        assert list(loaded) == list(of_shards)
        for weight in weight_specs(checkpoint.config):
            part = weight.slices(checkpoint.config, WeightSharding(4), rank)
            expected = tiny_weights(VARIANT)[weight.name][part]
            np.testing.assert_array_equal(loaded[weight.name], expected)
            np.testing.assert_array_equal(of_shards[weight.name], expected)


RENAMED = [variant for variant in VARIANTS if tiny_config(variant).stored_names != StoredNames()]


@pytest.mark.parametrize("variant", sorted({*LAYER_NORM_VARIANTS, *RENAMED}))
def test_checkpoints_of_the_families_are_read_under_each_of_their_names(tmp_path, variant):
    """And with the buffers that old files have, which follow from the configuration."""
    config, whole = tiny_config(variant), tiny_weights(variant)
    sharding = WeightSharding(min(4, config.heads))
    for prefix in config.stored_names.prefixes:
        directory = write_checkpoint(variant, tmp_path / (prefix or "none"), "bfloat16")
        weights = stored(config, tiny_weights(variant, ml_dtypes.bfloat16), prefix)
        layer = f"{prefix}{config.stored_names.layers}.0"
        buffers = {f"{layer}{end}": np.ones(3, np.uint8) for end in config.stored_names.buffers}
        unused = {f"{name}0.weight": np.ones(3, np.float32) for name in config.stored_names.unused}
        save_file(weights | buffers | unused, directory / "model.safetensors")
        source = open_source(directory)
        for rank in range(sharding.ranks):
            loaded = load_weights(source, sharding, rank)
            for weight in weight_specs(config):
                part = whole[weight.name][weight.slices(config, sharding, rank)]
                np.testing.assert_array_equal(loaded[weight.name], part)
    convert(source, tmp_path / "shards", sharding.tp)
    shards = open_source(tmp_path / "shards")
    assert shards.config == config
    verify(shards)
    for rank in range(sharding.ranks):
        loaded = load_weights(source, sharding, rank)
        for name, part in load_weights(shards, sharding, rank).items():
            np.testing.assert_array_equal(part, loaded[name])


def test_a_missing_tensor_has_the_name_of_the_checkpoint(tmp_path):
    directory = write_checkpoint("gpt2-layers", tmp_path)
    name = "transformer.h.1.attn.c_attn.weight"
    rewrite(directory / "model.safetensors", lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=rf"lacks the tensor {name}.* in shape \(30, 90\)"):
        open_source(directory)
