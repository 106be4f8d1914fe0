"""Shard directories: what the files hold, how they are loaded, and how each fault is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest
from tiny_models import MOE_VARIANTS, VARIANTS, tiny_config, tiny_weights, write_checkpoint

from mpishard.config.weight_sharding import WeightSharding
from mpishard.config.weight_specs import specs_of_shard, weight_specs
from mpishard.errors import UserError
from mpishard.storage import shards as shards_module
from mpishard.storage.convert import convert
from mpishard.storage.inspection import describe, stored_bytes, verify
from mpishard.storage.shards import ShardDirectory
from mpishard.storage.source import open_source
from mpishard.storage.weights import check_fits, load_weights

VARIANT, TP = "llama-uneven", 3
CUT = WeightSharding(TP)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DOWN_PROJ = "model.layers.2.mlp.down_proj.weight"
NORM = "model.norm.weight"
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def shard(directory: Path, tp: int = TP, dtype: str = "float32", variant: str = VARIANT) -> Path:
    """A new shard directory of a tiny model."""
    checkpoint = write_checkpoint(variant, directory / "model")
    out = directory / f"shards-{tp}-{dtype}"
    convert(open_source(checkpoint), out, tp, dtype)
    return out


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shard(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def directory(sound: Path, tmp_path: Path) -> Path:
    """Shards of the tiny model to be damaged."""
    return shutil.copytree(sound, tmp_path / "shards")


def rank_file(directory: Path, rank: int) -> Path:
    return directory / f"rank-{rank:05d}-of-{TP:05d}.h5"


def refusal(use: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        use()
    return str(error.value)


def damage(path: Path, name: str, element: int = 3) -> None:
    """Flips the lowest bit of one number's first byte, as a failing disk would."""
    with h5py.File(path) as file:
        offset = file[name].id.get_offset() + 4 * element
    with open(path, "r+b") as raw:
        raw.seek(offset)
        byte = raw.read(1)[0]
        raw.seek(offset)
        raw.write(bytes([byte ^ 1]))


def edit_manifest(directory: Path, **changes: Any) -> None:
    path = directory / "mpishard.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# What the files hold.


def test_the_directory_is_what_the_contract_says(directory):
    assert {path.name for path in directory.iterdir()} == {
        *("config.json", "mpishard.json"),
        *(f"rank-0000{rank}-of-00003.h5" for rank in range(3)),
    }
    manifest = json.loads((directory / "mpishard.json").read_text())
    assert manifest.keys() == {"format_version", "conversion", "source", "dtype", "mapping"}
    assert manifest["format_version"] == 1 and manifest["dtype"] == "float32"
    assert manifest["mapping"] == {"tp": 3, "ep": 1, "ranks": 3}
    assert manifest["source"].endswith("model")


@pytest.mark.parametrize("dtype", DTYPES)
def test_files_describe_themselves_and_are_contiguous_and_page_aligned(tmp_path, dtype):
    directory = shard(tmp_path, dtype=dtype)
    manifest = json.loads((directory / "mpishard.json").read_text())
    config, whole = tiny_config(VARIANT), tiny_weights(VARIANT)
    for rank in range(TP):
        with h5py.File(rank_file(directory, rank)) as file:
            attributes = dict(file.attrs)
            assert json.loads(attributes.pop("config")) == json.loads(
                (directory / "config.json").read_text()
            )
            assert attributes == {
                "format_version": 1,
                "conversion": manifest["conversion"],
                "dtype": dtype,
                **{"tp": 3, "ep": 1, "ranks": 3, "rank": rank},
            }
            assert set(file) == set(whole)
            for weight in weight_specs(config):
                dataset = file[weight.name]
                assert list(dataset.attrs["names"]) == [weight.name]
                assert tuple(dataset.attrs["shape"]) == weight.shape
                assert dataset.attrs["dtype"] == dtype
                assert dataset.dtype == ("<f4" if dtype == "float32" else "<u2")
                assert dataset.chunks is None and dataset.id.get_offset() % 4096 == 0
                sharding = tuple(map(slice, dataset.attrs["start"], dataset.attrs["stop"]))
                assert sharding == weight.slices(config, CUT, rank)
                np.testing.assert_array_equal(
                    dataset[()].view(DTYPES[dtype]),
                    whole[weight.name][sharding].astype(DTYPES[dtype]),
                )


# Loading.


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_in_the_stored_dtype_are_mapped(tmp_path, dtype):
    source = open_source(shard(tmp_path, dtype=dtype))
    whole = tiny_weights(VARIANT, DTYPES[dtype])
    before = len(os.listdir("/dev/fd"))
    for rank in range(TP):
        weights = load_weights(source, CUT, rank, DTYPES[dtype])
        assert list(weights) == [weight.name for weight in weight_specs(source.config)]
        for weight in weight_specs(source.config):
            part = weights[weight.name]
            assert type(part) is np.ndarray and part.dtype == DTYPES[dtype]
            assert not part.flags.owndata and not part.flags.writeable and part.flags.aligned
            sharding = weight.slices(source.config, CUT, rank)
            np.testing.assert_array_equal(part, whole[weight.name][sharding])
    # One map for all weights of a rank: each keeps a file open, of which a process may have few.
    assert len(os.listdir("/dev/fd")) <= before + 1


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [("bfloat16", np.float32), ("bfloat16", np.float64), ("float32", np.float64)],
)
def test_weights_in_another_dtype_are_converted(tmp_path, stored, dtype):
    source = open_source(shard(tmp_path, dtype=stored))
    whole = tiny_weights(VARIANT, dtype)
    for rank in range(TP):
        weights = load_weights(source, CUT, rank, dtype)
        for weight in weight_specs(source.config):
            part = weights[weight.name]
            assert part.dtype == dtype and part.flags.writeable
            sharding = weight.slices(source.config, CUT, rank)
            np.testing.assert_array_equal(part, whole[weight.name][sharding])


def test_loading_does_not_read_the_weights(directory):
    for rank in range(TP):
        damage(rank_file(directory, rank), Q_PROJ)
    load_weights(open_source(directory), CUT, 0, np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ranks_with_nothing_to_hold(tmp_path, monkeypatch, dtype):
    sizes = {"vocab_size": 3, "intermediate_size": 2, "num_hidden_layers": 1}
    monkeypatch.setitem(VARIANTS, "narrow", VARIANTS["llama-mqa"] | sizes)
    source = open_source(shard(tmp_path, 8, variant="narrow"))
    weights = load_weights(source, WeightSharding(8), 7, dtype)
    assert weights["model.embed_tokens.weight"].shape == (0, 56)
    assert weights["model.layers.0.mlp.down_proj.weight"].shape == (56, 0)
    assert all(part.dtype == dtype for part in weights.values())
    verify(source)


def test_slices_of_the_whole_are_put_together_from_all_files(sound):
    source, whole = ShardDirectory.open(sound), tiny_weights(VARIANT)
    for name, array in whole.items():
        assert source.shape(name) == array.shape and source.dtype(name) == np.float32
        for axis, length in enumerate(array.shape):
            for sharding in (slice(0, length), slice(length // 3 - 1, length - 2), slice(4, 4)):
                slices = tuple(
                    sharding if i == axis else slice(0, size) for i, size in enumerate(array.shape)
                )
                np.testing.assert_array_equal(source.read(name, slices), array[slices])
    narrow = source.read(Q_PROJ, (slice(5, 40), slice(2, 9)), ml_dtypes.bfloat16)
    assert narrow.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(narrow, whole[Q_PROJ][5:40, 2:9])


def test_slices_of_what_several_ranks_hold_come_once(tmp_path):
    source = open_source(shard(tmp_path, tp=7))  # 7 ranks share 3 key/value heads
    name = "model.layers.1.self_attn.k_proj.weight"
    everything = source.read(name, (slice(0, 12), slice(0, 24)))
    np.testing.assert_array_equal(everything, tiny_weights(VARIANT)[name])


def test_another_layout_is_refused_with_both_ways_out(directory):
    source = open_source(directory)
    for use in (
        lambda: check_fits(source, WeightSharding(2)),
        lambda: load_weights(source, WeightSharding(2), 0),
    ):
        message = refusal(use)
        assert "--tp 3" in message and "--tp 2" in message
        assert "start 3 ranks with --tp 3, or make others with" in message
        assert f"`mpishard shard {directory} OUT --tp 2" in message
    assert "12 query heads" in refusal(lambda: check_fits(source, WeightSharding(13)))


# Faults of the files.


def test_a_missing_file(directory):
    rank_file(directory, 1).unlink()
    message = refusal(lambda: open_source(directory))
    assert "should hold 3 rank files" in message and "2 are there" in message
    assert "rank-00001-of-00003.h5 is missing" in message


def test_a_surplus_file(directory):
    shutil.copy(rank_file(directory, 1), directory / "rank-00003-of-00004.h5")
    message = refusal(lambda: open_source(directory))
    assert "4 are there" in message and "rank-00003-of-00004.h5 is not one of them" in message


@pytest.mark.parametrize("left", [0, 10, 2000, -4096, -1])
def test_a_truncated_file(directory, left):
    path = rank_file(directory, 1)
    path.write_bytes(path.read_bytes()[:left])
    message = refusal(lambda: open_source(directory))
    assert str(path) in message and "truncated" in message


def test_swapped_files(directory):
    first, second = rank_file(directory, 0), rank_file(directory, 1)
    first.rename(directory / "aside")
    second.rename(first)
    (directory / "aside").rename(second)
    message = refusal(lambda: open_source(directory))
    assert f"{first} says rank 1, but 0 belongs here" in message and "swapped" in message


def test_a_file_of_another_conversion(directory, tmp_path):
    other = shard(tmp_path)
    shutil.copy(rank_file(other, 2), directory)
    message = refusal(lambda: open_source(directory))
    ids = [json.loads((d / "mpishard.json").read_text())["conversion"] for d in (other, directory)]
    assert str(rank_file(directory, 2)) in message and "another conversion" in message
    assert f"says conversion {ids[0]}, but {ids[1]}" in message


def test_another_format_version(directory):
    edit_manifest(directory, format_version=2)
    message = refusal(lambda: open_source(directory))
    assert "mpishard.json has format version 2" in message and "reads version 1" in message


def test_another_format_version_of_a_file(directory):
    with h5py.File(rank_file(directory, 1), "r+") as file:
        file.attrs["format_version"] = 7
    message = refusal(lambda: open_source(directory))
    assert "rank-00001-of-00003.h5 has format version 7" in message and "version 1" in message


@pytest.mark.parametrize("attribute", ["tp", "ranks", "ep"])
def test_a_file_of_another_rank_count(directory, attribute):
    right = {"tp": 3, "ranks": 3, "ep": 1}[attribute]
    with h5py.File(rank_file(directory, 2), "r+") as file:
        file.attrs[attribute] = 5
    message = refusal(lambda: open_source(directory))
    assert f"rank-00002-of-00003.h5 says {attribute} 5, but {right} belongs here" in message


@pytest.mark.parametrize(
    "mapping",
    [
        {"tp": 2, "ep": 1, "ranks": 3},
        {"tp": 3, "ep": 2, "ranks": 3},
        {"tp": 3, "ep": 1, "ranks": 3, "pp": 2},
        {"tp": "3", "ep": 1, "ranks": "3"},
        {"tp": 0, "ep": 1, "ranks": 0},
        {"tp": 3, "ep": 1, "ranks": [3]},
        [3, 1, 3],
    ],
)
def test_a_mapping_that_cannot_be(directory, mapping):
    edit_manifest(directory, mapping=mapping)
    message = refusal(lambda: open_source(directory))
    assert str(mapping) in message and "ranks, a multiple of both" in message


def test_a_manifest_for_other_files(directory):
    edit_manifest(directory, mapping={"tp": 2, "ep": 1, "ranks": 2})
    message = refusal(lambda: open_source(directory))
    assert "should hold 2 rank files" in message and "3 are there" in message
    edit_manifest(directory, mapping={"tp": 10**12, "ep": 1, "ranks": 10**12})  # not counted up to
    message = refusal(lambda: open_source(directory))
    assert "should hold 1000000000000 rank files" in message and "3 are there" in message


@pytest.mark.parametrize("field", ["conversion", "source", "dtype", "mapping"])
def test_a_manifest_that_lacks_a_field(directory, field):
    path = directory / "mpishard.json"
    content = json.loads(path.read_text())
    del content[field]
    path.write_text(json.dumps(content))
    message = refusal(lambda: open_source(directory))
    assert str(path) in message and f"lacks '{field}'" in message


def test_a_manifest_with_an_unknown_dtype(directory):
    edit_manifest(directory, dtype="int8")
    message = refusal(lambda: open_source(directory))
    assert "dtype is 'int8'" in message and "bfloat16" in message
    edit_manifest(directory, dtype=["float32"])
    assert "dtype is ['float32'], not one of" in refusal(lambda: open_source(directory))


def test_malformed_json(directory):
    (directory / "mpishard.json").write_text("{\n")
    assert "mpishard.json is not valid JSON" in refusal(lambda: open_source(directory))


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"ignore_config": "odd"}, "ignore_config is odd, not a list of names"),
        ({"ignore_config": [1]}, "ignore_config is [1], not a list of names"),
        ({"head_differs": 1}, "head_differs is 1, not true or false"),
    ],
)
def test_a_manifest_with_more_of_another_type(directory, changes, problem):
    edit_manifest(directory, **changes)
    message = refusal(lambda: open_source(directory))
    assert message == f"{directory / 'mpishard.json'}: {problem}"


def test_a_manifest_that_ignores_what_is_not_there(directory):
    edit_manifest(directory, ignore_config=["odd"])
    message = refusal(lambda: open_source(directory))
    assert "config.json: --ignore-config odd has no effect" in message


def test_rank_files_without_a_manifest(directory):
    (directory / "mpishard.json").unlink()
    assert "no mpishard.json" in refusal(lambda: open_source(directory))


def test_the_configuration_of_another_model(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    message = refusal(lambda: open_source(directory))
    assert "another model configuration" in message and "rank-00000" in message


def test_a_configuration_written_in_another_order_is_the_same(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=8))
    open_source(directory)


def test_a_file_that_is_no_shard(directory):
    rank_file(directory, 0).write_bytes(b"not HDF5 at all" * 100)
    assert "not a shard file" in refusal(lambda: open_source(directory))


# Faults of the data: found by --verify, and wherever the data are read and not only mapped.


def uses(directory: Path) -> list[Callable[[], object]]:
    source = ShardDirectory.open(directory)
    return [
        lambda: verify(source),
        lambda: load_weights(source, CUT, 1, np.float64),
        lambda: source.read(DOWN_PROJ, (slice(0, 24), slice(0, 41))),
    ]


@pytest.mark.parametrize("use", range(3))
def test_a_flipped_bit(directory, use):
    path = rank_file(directory, 1)
    damage(path, DOWN_PROJ)
    with h5py.File(path) as file:
        stored = file[DOWN_PROJ].attrs["crc32"]
    message = refusal(uses(directory)[use])
    assert f"{path} is damaged: {DOWN_PROJ} has checksum" in message
    assert f"{stored:08x} was stored" in message and message.count(f"{stored:08x}") == 1


def test_a_flipped_bit_does_not_survive_resharding(directory, tmp_path):
    damage(rank_file(directory, 1), DOWN_PROJ)
    message = refusal(lambda: convert(open_source(directory), tmp_path / "out", 2))
    assert "is damaged" in message and not (tmp_path / "out").exists()


def edit_dataset(path: Path, name: str, **attributes: Any) -> None:
    with h5py.File(path, "r+") as file:
        file[name].attrs.update(attributes)


def test_a_wrong_slice(directory):
    edit_dataset(rank_file(directory, 1), Q_PROJ, start=[0, 0], stop=[16, 24])
    message = refusal(lambda: load_weights(open_source(directory), CUT, 1))
    assert message == refusal(lambda: describe(open_source(directory)))
    assert f"{rank_file(directory, 1)}: {Q_PROJ} has the slice [0:16, 0:24]" in message
    assert "rank 1 of 3 should have [16:32, 0:24]" in message


def test_a_wrong_whole_shape(directory):
    edit_dataset(rank_file(directory, 1), Q_PROJ, shape=[96, 24])
    message = refusal(lambda: verify(open_source(directory)))
    assert f"{Q_PROJ} has the whole shape (96, 24)" in message and "(48, 24)" in message


def test_a_dataset_of_another_shape_or_dtype(directory):
    path = rank_file(directory, 0)
    with h5py.File(path, "r+") as file:
        attributes = dict(file[NORM].attrs)
        del file[NORM]
        file.create_dataset(NORM, data=np.zeros(25, np.float32)).attrs.update(attributes)
    message = refusal(lambda: verify(open_source(directory)))
    assert f"{NORM} has the shape (25,)" in message and "(24,)" in message
    with h5py.File(path, "r+") as file:
        del file[NORM]
        dataset = file.create_dataset(NORM, data=np.zeros(24, np.uint16))
        dataset.attrs.update(attributes | {"dtype": "bfloat16"})
    message = refusal(lambda: verify(open_source(directory)))
    assert f"{NORM} has the dtype bfloat16" in message and "float32" in message


def test_a_missing_and_a_surplus_dataset(directory):
    with h5py.File(rank_file(directory, 0), "r+") as file:
        file.move(NORM, "model.norm.bias")
    assert "holds model.norm.bias, which" in refusal(lambda: verify(open_source(directory)))
    with h5py.File(rank_file(directory, 0), "r+") as file:
        del file["model.norm.bias"]
    message = refusal(lambda: verify(open_source(directory)))
    assert f"rank-00000-of-00003.h5 lacks {NORM}" in message


def test_a_dataset_without_a_checksum(directory):
    with h5py.File(rank_file(directory, 0), "r+") as file:
        del file[NORM].attrs["crc32"]
    message = refusal(lambda: load_weights(open_source(directory), CUT, 0))
    assert "rank-00000-of-00003.h5" in message and "crc32" in message


@pytest.mark.parametrize(
    "attribute, value, sentence",
    [
        ("start", 3, f"{NORM} has start 3, which must be a list of whole numbers"),
        ("stop", "x", f"{NORM} has stop 'x', which must be a list of whole numbers"),
        ("shape", [24.0], f"{NORM} has shape [24.0], which must be a list of whole numbers"),
        ("shape", h5py.Empty("f4"), f"{NORM} has shape Empty("),
        ("names", 1, f"{NORM} has names 1, which must be a list of names"),
        ("names", True, f"{NORM} has names True, which must be a list of names"),
        ("dtype", [1, 2], f"{NORM} has dtype [1, 2], not one of float32, float16, bfloat16"),
        ("crc32", [1, 2], f"{NORM} has crc32 [1, 2], which must be a whole number"),
        ("crc32", 0.5, f"{NORM} has crc32 0.5, which must be a whole number"),
    ],
)
def test_attributes_of_other_types(directory, attribute, value, sentence):
    edit_dataset(rank_file(directory, 0), NORM, **{attribute: value})
    message = refusal(lambda: load_weights(open_source(directory), CUT, 0))
    assert sentence in message


@pytest.mark.parametrize("attribute", ["format_version", "conversion", "rank", "config"])
@pytest.mark.parametrize("value", [[1, 2], "x" * 5000, h5py.Empty("f4")])
def test_attributes_of_a_file_of_other_types(directory, attribute, value):
    with h5py.File(rank_file(directory, 0), "r+") as file:
        del file.attrs[attribute]
        file.attrs[attribute] = value
    message = refusal(lambda: open_source(directory))
    assert str(rank_file(directory, 0)) in message and len(message) < 700


@pytest.mark.parametrize(
    "instead",
    [
        h5py.SoftLink("/model.layers.0.input_layernorm.weight"),
        h5py.ExternalLink("rank-00001-of-00003.h5", NORM),
        np.dtype("f4"),
        h5py.Empty("f4"),
        None,
    ],
)
def test_what_is_no_dataset(directory, instead):
    """A link's offsets would be those of another file."""
    with h5py.File(rank_file(directory, 0), "r+") as file:
        attributes = dict(file[NORM].attrs)
        del file[NORM]
        if instead is None:
            file.create_group(NORM)
        else:
            file[NORM] = instead
        if not isinstance(instead, h5py.SoftLink | h5py.ExternalLink):
            file[NORM].attrs.update(attributes)
    message = refusal(lambda: load_weights(open_source(directory), CUT, 0))
    assert message == f"{rank_file(directory, 0)}: {NORM} is not stored here as numbers"


def test_names_of_any_kind_make_one_short_sentence(directory):
    with h5py.File(rank_file(directory, 0), "r+") as file:
        file.move(NORM, "a\n" + "x" * 3000)
    message = refusal(lambda: load_weights(open_source(directory), CUT, 0))
    assert message.isprintable() and len(message) < 500


def test_a_directory_in_place_of_a_file(directory):
    rank_file(directory, 0).unlink()
    rank_file(directory, 0).mkdir()
    message = refusal(lambda: open_source(directory))
    assert message.startswith(f"{rank_file(directory, 0)} is truncated") and message.isprintable()


def test_a_dataset_that_was_compressed(directory):
    with h5py.File(rank_file(directory, 0), "r+") as file:
        data, attributes = file[NORM][()], dict(file[NORM].attrs)
        del file[NORM]
        file.create_dataset(NORM, data=data, compression="gzip").attrs.update(attributes)
    message = refusal(lambda: load_weights(open_source(directory), CUT, 0))
    assert f"{NORM} is not stored contiguously" in message


def test_ranks_that_disagree_on_what_they_share(directory, tmp_path):
    path = rank_file(directory, 2)
    damage(path, NORM)
    message = refusal(lambda: verify(open_source(directory)))
    computed = int(message.split("has checksum ")[1][:8], 16)
    edit_dataset(path, NORM, crc32=computed)
    message = refusal(lambda: verify(open_source(directory)))
    assert f"{path}: {NORM} has checksum {computed:08x}" in message
    assert "rank-00000-of-00003.h5" in message


def test_a_table_that_does_not_cover_the_model(directory, monkeypatch):
    monkeypatch.setattr(shards_module, "missing_weights", lambda config, sharding: [Q_PROJ])
    message = refusal(lambda: open_source(directory))
    assert f"--tp 3 leaves parts of {Q_PROJ} on no rank" in message


@pytest.mark.parametrize("seed", range(5))
def test_no_damage_anywhere_in_a_file_goes_unnoticed(directory, seed):
    """Bits flipped at random: the answer is a UserError or the right weights, never others."""
    path, whole = rank_file(directory, 1), tiny_weights(VARIANT)
    content = path.read_bytes()
    occupied = np.flatnonzero(np.frombuffer(content, np.uint8))
    random = np.random.default_rng(seed)
    for place in random.choice(occupied, 8):
        damaged = bytearray(content)
        damaged[place] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        try:
            source = ShardDirectory.open(directory)
            verify(source)
        except UserError as error:
            assert str(path) in str(error)
            continue
        for name, array in whole.items():
            sharding = tuple(slice(0, length) for length in array.shape)
            np.testing.assert_array_equal(source.read(name, sharding), array)


# Inspection.


def test_verify_reads_all_and_says_how_far_it_is(sound, tmp_path):
    checkpoint = open_source(write_checkpoint(VARIANT, tmp_path, "float16"))
    parameters = sum(array.size for array in tiny_weights(VARIANT).values())
    assert stored_bytes(checkpoint) == 2 * parameters
    assert stored_bytes(open_source(sound)) > 4 * parameters  # norms are on every rank
    for source in (checkpoint, open_source(sound)):
        steps: list[int] = []
        verify(source, steps.append)
        assert sum(steps) == stored_bytes(source) and len(steps) > 20


def test_values_that_are_not_finite(tmp_path, monkeypatch):
    weights = tiny_weights(VARIANT)
    weights[DOWN_PROJ][3, 40] = np.inf
    monkeypatch.setattr("tiny_models.tiny_weights", lambda variant, dtype: weights)
    directory = shard(tmp_path)
    for path, file in ((tmp_path / "model", "model.safetensors"), (directory, "rank-00002")):
        source = open_source(path)
        message = refusal(partial(verify, source))
        assert file in message and f"{DOWN_PROJ} has values that are infinite" in message


def test_description_of_shards(sound):
    text = "\n".join(describe(open_source(sound)))
    manifest = json.loads((sound / "mpishard.json").read_text())
    parameters = sum(array.size for array in tiny_weights(VARIANT).values())
    for fact in ("llama", "12 query, 3 key/value", f"{parameters:,} parameters", "float32"):
        assert fact in text
    assert manifest["conversion"] in text and manifest["source"] in text and "--tp 3" in text
    size = rank_file(sound, 1).stat().st_size
    row = next(line for line in text.splitlines() if "rank-00001-of-00003.h5" in line)
    tensors = len(tiny_weights(VARIANT))
    assert row.split() == [
        *("1", "rank-00001-of-00003.h5", f"{size:,}", f"{tensors}"),
        *("4-7", "1", "14-27", "24-47"),
    ]


def test_description_of_a_checkpoint(tmp_path):
    directory = write_checkpoint("qwen3-mixed", tmp_path, "bfloat16", shards=2)
    lines = describe(open_source(directory))
    text = "\n".join(lines)
    for fact in ("qwen3", "bfloat16", "window 5 in 1 of 3 layers", "rope default", "vocabulary"):
        assert fact in text
    tensors = len(tiny_weights("qwen3-mixed"))
    rows = [line.split() for line in lines if "safetensors" in line]
    assert [row[0] for row in rows] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert sum(int(row[2]) for row in rows) == tensors


# Experts.

MIXTURE = "mixtral-window"  # 6 query heads, 5 experts of width 21
UP_OF_3 = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
UP_OF_4 = UP_OF_3.replace(".3.", ".4.")


@pytest.fixture(scope="module")
def sound_mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixture")
    checkpoint = write_checkpoint(MIXTURE, directory / "model")
    convert(open_source(checkpoint), directory / "shards", 4, ep=2)
    return directory / "shards"


@pytest.fixture
def mixture(sound_mixture: Path, tmp_path: Path) -> Path:
    """Shards of a mixture of experts for --tp 4 --ep 2, to be damaged."""
    return Path(shutil.copytree(sound_mixture, tmp_path / "mixture"))


def mixture_file(directory: Path, rank: int) -> Path:
    return directory / f"rank-{rank:05d}-of-00004.h5"


def test_a_file_holds_its_experts_and_no_others(mixture):
    manifest = json.loads((mixture / "mpishard.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["mapping"] == {"tp": 4, "ep": 2, "ranks": 4}
    whole = tiny_weights(MIXTURE)
    for rank in range(4):
        with h5py.File(mixture_file(mixture, rank)) as file:
            assert {name: file.attrs[name] for name in ("tp", "ep", "ranks", "rank")} == {
                **manifest["mapping"],
                "rank": rank,
            }
            held = {int(name.split(".")[5]) for name in file if "experts" in name}
            assert held == ({0, 1, 2} if rank < 2 else {3, 4})
            assert len(file) == 2 * (6 + 1 + 3 * len(held)) + 2
            if rank >= 2:
                rows = slice(0, 11) if rank == 2 else slice(11, 21)
                np.testing.assert_array_equal(file[UP_OF_3][()], whole[UP_OF_3][rows])


@pytest.mark.parametrize("variant", MOE_VARIANTS)
def test_experts_are_mapped(tmp_path, variant):
    checkpoint = write_checkpoint(variant, tmp_path / "model")
    convert(open_source(checkpoint), tmp_path / "shards", 2, ep=3)
    original, source, sharding = (
        open_source(checkpoint),
        open_source(tmp_path / "shards"),
        WeightSharding(2, 3),
    )
    # Two shards of each variant; over all variants every one.
    for index in sorted({list(MOE_VARIANTS).index(variant) % sharding.ranks, sharding.ranks - 1}):
        direct, loaded = (
            load_weights(original, sharding, index),
            load_weights(source, sharding, index),
        )
        assert list(loaded) == list(direct)
        for weight in specs_of_shard(source.config, sharding, index):
            part = loaded[weight.name]
            assert not part.flags.owndata and not part.flags.writeable
            np.testing.assert_array_equal(part, direct[weight.name], weight.name)


def test_slices_of_experts_are_put_together_from_the_files_that_hold_them(sound_mixture):
    source, whole = open_source(sound_mixture), tiny_weights(MIXTURE)
    for name, array in whole.items():
        for axis, length in enumerate(array.shape):
            for sharding in (slice(0, length), slice(length // 3, length - 2)):
                slices = tuple(
                    sharding if i == axis else slice(0, size) for i, size in enumerate(array.shape)
                )
                np.testing.assert_array_equal(source.read(name, slices), array[slices])


def test_another_cut_of_experts_is_refused_with_both_ways_out(mixture):
    source = open_source(mixture)
    for sharding in (
        WeightSharding(4),
        WeightSharding(2, 2),
        WeightSharding(4, 4),
        WeightSharding(4, 2, 8),
    ):
        for use in (
            partial(check_fits, source, sharding),
            partial(load_weights, source, sharding, 0),
        ):
            message = refusal(use)
            assert f"holds shards for --tp 4 --ep 2, not for {sharding}: " in message
            assert "start 4 ranks with --tp 4 --ep 2, or make others with" in message
            assert f"`mpishard shard {mixture} OUT {sharding}`" in message
    assert "5 experts" in refusal(lambda: check_fits(source, WeightSharding(1, 6)))


def remove_expert(directory: Path, rank: int) -> None:
    with h5py.File(mixture_file(directory, rank), "r+") as file:
        del file[UP_OF_3]


@pytest.mark.parametrize("use", ["verify", "describe", "load", "read"])
def test_a_removed_expert(mixture, use):
    remove_expert(mixture, 3)
    source = ShardDirectory.open(mixture)
    message = refusal(
        {
            "verify": lambda: verify(source),
            "describe": lambda: describe(source),
            "load": lambda: load_weights(source, WeightSharding(4, 2), 3),
            "read": lambda: source.read(UP_OF_3, (slice(0, 21), slice(0, 34))),
        }[use]
    )
    assert message == f"{mixture_file(mixture, 3)} lacks {UP_OF_3}"


def test_a_removed_expert_does_not_go_unnoticed_in_resharding(mixture, tmp_path):
    remove_expert(mixture, 2)
    message = refusal(lambda: convert(open_source(mixture), tmp_path / "out", 1))
    assert f"lacks {UP_OF_3}" in message and not (tmp_path / "out").exists()


def test_an_expert_that_belongs_to_other_ranks(mixture):
    with h5py.File(mixture_file(mixture, 0), "r+") as file:
        file.move(UP_OF_3.replace(".3.", ".0."), UP_OF_3)
    message = refusal(lambda: verify(open_source(mixture)))
    assert f"{mixture_file(mixture, 0)} holds {UP_OF_3}, which belongs to other ranks" in message


def test_an_expert_under_the_name_of_another(mixture):
    """Two experts of one shape, exchanged: only the names that they were stored with tell."""
    with h5py.File(mixture_file(mixture, 2), "r+") as file:
        file.move(UP_OF_3, "aside")
        file.move(UP_OF_4, UP_OF_3)
        file.move("aside", UP_OF_4)
    message = refusal(lambda: verify(open_source(mixture)))
    assert f"{UP_OF_3} has the names ['{UP_OF_4}']" in message


def test_a_flipped_bit_in_an_expert(mixture):
    damage(mixture_file(mixture, 3), UP_OF_4)
    assert f"{UP_OF_4} has checksum" in refusal(lambda: verify(open_source(mixture)))


@pytest.mark.parametrize("mapping", [(2, 4, 4), (4, 1, 4), (4, 4, 4)])
def test_a_manifest_for_another_cut_of_experts(mixture, mapping):
    edit_manifest(mixture, mapping=dict(zip(("tp", "ep", "ranks"), mapping, strict=True)))
    message = refusal(lambda: open_source(mixture))
    field, said, right = ("tp", 4, 2) if mapping[0] == 2 else ("ep", 2, mapping[1])
    assert f"rank-00000-of-00004.h5 says {field} {said}, but {right} belongs here" in message


@pytest.mark.parametrize("mapping", [(4, 3, 4), (4, 2, 6), (4, 0, 4), (4, True, 4)])
def test_a_mapping_of_experts_that_cannot_be(mixture, mapping):
    edit_manifest(mixture, mapping=dict(zip(("tp", "ep", "ranks"), mapping, strict=True)))
    message = refusal(lambda: open_source(mixture))
    assert "must have tp and ep, whole numbers from 1, and ranks, a multiple of both" in message


def test_a_dense_model_has_no_mapping_of_experts(directory):
    mapping = {"tp": 1, "ep": 3, "ranks": 3}
    edit_manifest(directory, mapping=mapping)
    for rank in range(3):
        with h5py.File(rank_file(directory, rank), "r+") as file:
            file.attrs.update(mapping)
    message = refusal(lambda: open_source(directory))
    assert "--tp 1 --ep 3 divides experts, but a llama model" in message


def test_description_of_experts(sound_mixture, tmp_path):
    lines = describe(open_source(sound_mixture))
    text = "\n".join(lines)
    assert "experts       5 of width 21, silu, 3 for a token\n" in text
    assert "shards        --tp 4 --ep 2, made from" in text and "ffn" not in text
    row = next(line for line in lines if "rank-00002-of-00004.h5" in line)
    assert row.split()[3:] == ["28", "2-3", "1", "3-4", "0-10", "34-50"]
    text = "\n".join(describe(open_source(write_checkpoint("qwen2_moe-mixed", tmp_path / "a"))))
    assert "ffn           35, silu" in text
    assert "2 for a token, and a shared one of width 27 in 1 of 4 layers" in text
    checkpoint = write_checkpoint("deepseek_v2-full", tmp_path / "b")
    convert(open_source(checkpoint), tmp_path / "c", 2, ep=4)
    text = "\n".join(describe(open_source(tmp_path / "c")))
    assert "latent        keys and values 10, rotated key 8, queries 14" in text
