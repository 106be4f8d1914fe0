"""Conversion: the same bits by every road, in little memory, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_models import DTYPES, VARIANTS, tiny_config, tiny_weights, write_checkpoint

import mpishard
from mpishard.config.weight_sharding import WeightSharding
from mpishard.config.weight_specs import weight_specs
from mpishard.errors import UserError
from mpishard.storage import arrays
from mpishard.storage.convert import Conversion, convert
from mpishard.storage.inspection import stored_bytes, verify
from mpishard.storage.source import open_source
from mpishard.storage.weights import load_weights

VARIANT = "llama-uneven"
ROOT = Path(mpishard.__file__).parents[1]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(VARIANT, tmp_path / "model")


def bits(directory: Path) -> dict[str, tuple[bytes, dict[str, str]]]:
    """The data and the attributes of every dataset of every rank file."""
    content = {}
    for path in sorted(directory.glob("rank-*.h5")):
        with h5py.File(path) as file:
            for name, dataset in file.items():
                attributes = {key: str(value) for key, value in dataset.attrs.items()}
                content[f"{path.name}/{name}"] = dataset[()].tobytes(), attributes
    return content


def random_weights(variant: str) -> dict[str, np.ndarray]:
    """Weights that use all bits of a float32, unlike those of the tiny models."""
    random = np.random.default_rng(7)
    return {
        name: random.standard_normal(array.shape, np.float32)
        for name, array in tiny_weights(variant).items()
    }


def nearest_even(values: np.ndarray) -> np.ndarray:
    """The bits of bfloat16, by integer arithmetic on those of float32."""
    whole = values.view(np.uint32)
    return ((whole + 0x7FFF + ((whole >> 16) & 1)) >> 16).astype(np.uint16)


# What comes out.


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [("llama-uneven", "float32"), ("llama-bias", "bfloat16"), ("qwen3-tied", "bfloat16")],
)
def test_resharding_equals_direct_conversion_bit_for_bit(tmp_path, variant, dtype):
    checkpoint = write_checkpoint(variant, tmp_path / "model")
    save_file(random_weights(variant), checkpoint / "model.safetensors")
    source = checkpoint
    for tp in (2, 3, 1):  # each from the one before
        convert(open_source(source), tmp_path / f"again-{tp}", tp, dtype)
        convert(open_source(checkpoint), tmp_path / f"direct-{tp}", tp, dtype)
        assert bits(tmp_path / f"again-{tp}") == bits(tmp_path / f"direct-{tp}")
        source = tmp_path / f"again-{tp}"
        verify(open_source(source))


# As the files of the ranks that hold them: with tp, ep and the number of sets. One model goes
# through all, those whose weights differ through some.
CUTS = [(2, 2, 2), (1, 4, 4), (3, 1, 3), (2, 3, 6), (1, 1, 2), (2, 1, 4), (1, 5, 5), (1, 1, 1)]
FEW_CUTS = [(2, 2, 2), (3, 1, 3), (2, 3, 6), (1, 1, 1)]


@pytest.mark.parametrize(
    ("variant", "dtype", "cuts"),
    [
        ("mixtral-window", "float32", CUTS),
        ("deepseek_v3-plain", "bfloat16", FEW_CUTS),
        ("gpt_oss-yarn", "float32", FEW_CUTS),
    ],
)
def test_experts_are_resharded_bit_for_bit(tmp_path, variant, dtype, cuts):
    """Of one layer: others are cut alike."""
    checkpoint = write_checkpoint(variant, tmp_path / "model")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    everything = random_weights(variant)
    weights = {name: w for name, w in everything.items() if not re.search(r"layers\.[1-9]", name)}
    save_file(weights, checkpoint / "model.safetensors")
    source = checkpoint
    for tp, ep, ranks in cuts:  # each from the one before
        name = f"{tp}-{ep}-{ranks}"
        again, direct = tmp_path / f"again-{name}", tmp_path / f"direct-{name}"
        convert(open_source(source), again, tp, dtype, ep=ep, ranks=ranks)
        convert(open_source(checkpoint), direct, tp, dtype, ep=ep, ranks=ranks)
        assert len(list(again.glob("rank-*.h5"))) == ranks
        assert bits(again) == bits(direct)
        verify(open_source(again))
        source = again
    loaded = load_weights(open_source(source), WeightSharding(), 0, DTYPES[dtype])
    for name, array in loaded.items():
        if name in weights:
            assert array.tobytes() == weights[name].astype(array.dtype).tobytes()


@pytest.mark.parametrize("variant", ["mixtral-window", "qwen2_moe-mixed"])
def test_stacked_experts_become_the_same_shards(tmp_path, variant):
    for stacked in (False, True):
        checkpoint = write_checkpoint(variant, tmp_path / f"model-{stacked}", stacked=stacked)
        convert(open_source(checkpoint), tmp_path / f"shards-{stacked}", 2, "bfloat16", ep=3)
    assert bits(tmp_path / "shards-True") == bits(tmp_path / "shards-False")


def test_what_experts_are_chosen_by_stays_wide(tmp_path):
    variant = "deepseek_v3-plain"
    checkpoint = write_checkpoint(variant, tmp_path / "model")
    weights = random_weights(variant)
    save_file(weights, checkpoint / "model.safetensors")
    conversion = Conversion(open_source(checkpoint), tmp_path / "out", 2, "bfloat16", 3)
    convert(open_source(checkpoint), tmp_path / "out", 2, "bfloat16", ep=3)
    source = open_source(tmp_path / "out")
    assert conversion.total_bytes == stored_bytes(source)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    for dtype in (ml_dtypes.bfloat16, np.float32, np.float64):
        loaded = load_weights(source, WeightSharding(2, 3), 5, dtype)
        assert loaded[name].dtype == (np.float64 if dtype == np.float64 else np.float32)
        np.testing.assert_array_equal(loaded[name], weights[name])
        others = {array.dtype for key, array in loaded.items() if "e_score" not in key}
        assert others == {np.dtype(dtype)}


def test_blocks_of_any_size_give_the_same_bits(checkpoint, tmp_path, monkeypatch):
    results = []
    for block_bytes in (arrays.BLOCK_BYTES, 1000, 1):
        monkeypatch.setattr(arrays, "BLOCK_BYTES", block_bytes)
        first, second = tmp_path / f"first-{block_bytes}", tmp_path / f"second-{block_bytes}"
        convert(open_source(checkpoint), first, 3)
        convert(open_source(first), second, 2)
        verify(open_source(second))
        results.append((bits(first), bits(second)))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("stored", DTYPES)
def test_checkpoints_of_every_kind(tmp_path, stored, shards):
    checkpoint = write_checkpoint(VARIANT, tmp_path / "model", stored, shards)
    whole = tiny_weights(VARIANT)
    for dtype in ("float32", "bfloat16"):
        convert(open_source(checkpoint), tmp_path / dtype, 5, dtype)
        for rank in range(5):
            loaded = load_weights(open_source(tmp_path / dtype), WeightSharding(5), rank)
            for weight in weight_specs(tiny_config(VARIANT)):
                sharding = weight.slices(tiny_config(VARIANT), WeightSharding(5), rank)
                np.testing.assert_array_equal(loaded[weight.name], whole[weight.name][sharding])


def test_bfloat16_is_rounded_to_nearest_even(checkpoint, tmp_path):
    weights = random_weights(VARIANT)
    norm = weights["model.norm.weight"]
    halfway = [1 + 1 / 256, 1 + 3 / 256, -1 - 1 / 256, 1 + 1 / 256 + 2**-23]
    norm[:4] = halfway
    save_file(weights, checkpoint / "model.safetensors")
    convert(open_source(checkpoint), tmp_path / "out", 1, "bfloat16")
    loaded = load_weights(open_source(tmp_path / "out"), WeightSharding(), 0, ml_dtypes.bfloat16)
    for name, array in weights.items():
        np.testing.assert_array_equal(loaded[name].view(np.uint16), nearest_even(array))
    assert loaded["model.norm.weight"][:4].tolist() == [1, 1 + 4 / 256, -1, 1 + 2 / 256]


def test_descriptions_and_tokenizer_come_along(checkpoint, tmp_path):
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    kept = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"]
    kept.append("chat_templates/tool_use.jinja")
    (checkpoint / "chat_templates").mkdir()
    for name in kept:
        (checkpoint / name).write_text(f"content of {name}")
    (checkpoint / "README.md").write_text("stays")
    convert(open_source(checkpoint), tmp_path / "one", 2)
    convert(open_source(tmp_path / "one"), tmp_path / "two", 3)
    for name in ["config.json", "generation_config.json", *kept]:
        assert (tmp_path / "two" / name).read_bytes() == (checkpoint / name).read_bytes()
    assert not (tmp_path / "two" / "README.md").exists()
    assert open_source(tmp_path / "two").config.eos_ids == (3, 4)


# How the work is shared.


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_workers_share_the_files(checkpoint, tmp_path, workers):
    convert(open_source(checkpoint), tmp_path / "alone", 5)
    shared = [Conversion(open_source(checkpoint), tmp_path / "shared", 5) for _ in range(workers)]
    shared[0].prepare()
    written = []
    for worker in reversed(range(workers)):
        steps: list[int] = []
        shared[worker].write(worker, workers, steps.append)
        assert sum(steps) == shared[worker].worker_bytes(worker, workers)
        written += steps
    assert sum(written) == shared[0].total_bytes
    shared[0].finish()
    assert bits(tmp_path / "shared") == bits(tmp_path / "alone")


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_share_the_files_of_experts(tmp_path, workers):
    source = open_source(write_checkpoint("mixtral-window", tmp_path / "model"))
    convert(source, tmp_path / "alone", 2, ep=3)
    shared = [Conversion(source, tmp_path / "shared", 2, ep=3) for _ in range(workers)]
    shared[0].prepare()
    for worker in reversed(range(workers)):
        steps: list[int] = []
        shared[worker].write(worker, workers, steps.append)
        assert sum(steps) == shared[worker].worker_bytes(worker, workers)
    shared[0].finish()
    assert bits(tmp_path / "shared") == bits(tmp_path / "alone")


def test_progress_adds_up_to_what_is_stored(checkpoint, tmp_path):
    steps: list[int] = []
    conversion = Conversion(open_source(checkpoint), tmp_path / "out", 3, "bfloat16")
    convert(open_source(checkpoint), tmp_path / "out", 3, "bfloat16", steps.append)
    assert sum(steps) == conversion.total_bytes
    assert sum(steps) == sum(len(data) for data, _ in bits(tmp_path / "out").values())


# What is refused, before any work.


def refused(source: Path, out: Path, *args: object) -> str:
    before = sorted(out.parent.iterdir()) if out.parent.is_dir() else []
    with pytest.raises(UserError) as error:
        Conversion(open_source(source), out, *args).prepare()  # type: ignore[arg-type]
    assert before == (sorted(out.parent.iterdir()) if out.parent.is_dir() else [])
    return str(error.value)


def test_an_existing_output(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    assert f"{tmp_path / 'out'} exists already" in refused(checkpoint, tmp_path / "out", 2)
    (tmp_path / "out").rmdir()
    (tmp_path / "out").write_text("a file")
    assert "exists already" in refused(checkpoint, tmp_path / "out", 2)
    assert "exists already" in refused(checkpoint, checkpoint, 2)


def test_an_output_that_cannot_be_made(checkpoint, tmp_path):
    message = refused(checkpoint, tmp_path / "nowhere" / "out", 2)
    assert f"cannot write {tmp_path / 'nowhere' / 'out'}" in message
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(checkpoint, tmp_path / "file" / "out", 2)


def test_a_parent_that_is_not_writable(checkpoint, tmp_path, monkeypatch):
    def denied(path: Path) -> None:  # as mkdir does, but for root as well
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", denied)
    message = refused(checkpoint, tmp_path / "out", 2)
    assert f"cannot write {tmp_path / 'out.incomplete'}" in message
    assert "Permission denied" in message


def test_a_directory_of_someone_else_in_the_way(checkpoint, tmp_path):
    (tmp_path / "out.incomplete").mkdir()
    (tmp_path / "out.incomplete" / "letter.txt").write_text("precious")
    message = refused(checkpoint, tmp_path / "out", 2)
    assert "out.incomplete is in the way" in message
    assert (tmp_path / "out.incomplete" / "letter.txt").read_text() == "precious"


def test_a_disk_that_is_too_small(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=42))
    needed = Conversion(open_source(checkpoint), tmp_path / "out", 2).total_bytes
    message = refused(checkpoint, tmp_path / "out", 2)
    assert f"needs {needed} bytes" in message and "42 are free" in message


@pytest.mark.parametrize(
    ("args", "fact"),
    [
        ((13,), "--tp 13 .* 12 query heads"),
        ((0,), "--tp 0 must be at least 1"),
        ((2, "float16"), "--dtype float16 is not one of float32, bfloat16"),
        ((2, "float32", 2), "--tp 2 --ep 2 divides experts, but a llama model"),
        ((2, "float32", 0), "--ep 0 must be at least 1"),
    ],
)
def test_wrong_arguments(checkpoint, tmp_path, args, fact):
    with pytest.raises(UserError, match=fact):
        Conversion(open_source(checkpoint), tmp_path / "out", *args)


# Whole or not at all.


def test_finish_refuses_what_is_not_whole(checkpoint, tmp_path):
    conversion = Conversion(open_source(checkpoint), tmp_path / "out", 3)
    conversion.prepare()
    conversion.write(0, 2)  # and the other worker never does its share
    with pytest.raises(UserError, match="rank-00001-of-00003.h5 is missing"):
        conversion.finish()
    assert not (tmp_path / "out").exists()


def test_finish_refuses_to_replace_what_came_to_be_meanwhile(checkpoint, tmp_path):
    conversion = Conversion(open_source(checkpoint), tmp_path / "out", 2)
    conversion.prepare()
    conversion.write()
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="came to exist"):
        conversion.finish()
    assert list((tmp_path / "out").iterdir()) == []


def run_python(code: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


STOPS_AFTER = """
import sys, time
from mpishard.storage.convert import Conversion
from mpishard.storage.source import open_source

model, out, blocks = sys.argv[1], sys.argv[2], int(sys.argv[3])
written = 0

def stop_here():
    print("here", flush=True)
    time.sleep(60)

def progress(done):
    global written
    written += 1
    if written == blocks:
        stop_here()

conversion = Conversion(open_source(model), out, 3)
conversion.prepare()
if blocks == 0:
    stop_here()
conversion.write(progress=progress)
stop_here()
"""


@pytest.mark.parametrize("blocks", [0, 1, 50, 10**6])
def test_a_killed_conversion_leaves_nothing_valid_and_the_next_succeeds(
    checkpoint, tmp_path, blocks
):
    out = tmp_path / "out"
    with run_python(STOPS_AFTER, checkpoint, out, blocks) as process:
        assert process.stdout is not None and process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    left = tmp_path / "out.incomplete"
    assert left.is_dir()
    with pytest.raises(UserError, match="is an interrupted conversion: run `mpishard shard` again"):
        open_source(left)
    if blocks < 10**6:  # even under its final name
        (left / "mpishard.json.incomplete").rename(left / "mpishard.json")
        fault = "rank-00000-of-00003.h5 is (missing|unfinished)"
        with pytest.raises(UserError, match=fault):
            open_source(left)

    convert(open_source(checkpoint), out, 3)
    verify(open_source(out))
    assert not left.exists()


FILLS_THE_DISK = """
import resource, sys
from mpishard.errors import UserError
from mpishard.storage import rank_file
from mpishard.storage.convert import convert
from mpishard.storage.source import open_source

create = rank_file.create

def create_on_a_small_disk(*args):
    places = create(*args)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    return places

rank_file.create = create_on_a_small_disk
try:
    convert(open_source(sys.argv[1]), sys.argv[2], 1)
except UserError as error:
    print(error)
"""


def test_a_disk_that_runs_full(checkpoint, tmp_path):
    with run_python(FILLS_THE_DISK, checkpoint, tmp_path / "out") as process:
        output, _ = process.communicate()
    assert process.returncode == 0
    expected = f"cannot write {tmp_path / 'out.incomplete'}: [Errno 27] File too large"
    assert output.splitlines() == [expected]
    assert not (tmp_path / "out").exists()


# In little memory.

PEAK_MEMORY = """
import resource, sys
from pathlib import Path
from mpishard.storage import arrays
from mpishard.storage.convert import convert
from mpishard.storage.source import open_source

arrays.BLOCK_BYTES = 1 << 20

def peak():
    if sys.platform == "linux":  # where ru_maxrss begins with the parent's
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

convert(open_source(sys.argv[1]), sys.argv[3] + "-warm", 2)
before = peak()
convert(open_source(sys.argv[2]), sys.argv[3], 2)
print(peak() - before)
"""


def test_memory_stays_near_a_block_whatever_the_size_of_a_tensor(tmp_path):
    """One tensor of 40 MB, 20 MB for each rank, in blocks of 1 MB."""
    model, small = tmp_path / "large", write_checkpoint("llama-mqa", tmp_path / "small")
    model.mkdir()
    hidden, vocab = 56, 180_000
    config = VARIANTS["llama-mqa"] | {"vocab_size": vocab, "tie_word_embeddings": True}
    weights = tiny_weights("llama-mqa")
    del weights["lm_head.weight"]
    weights["model.embed_tokens.weight"] = np.ones((vocab, hidden), np.float32)
    (model / "config.json").write_text(json.dumps(config))
    save_file(weights, model / "model.safetensors")
    shards = tmp_path / "shards"
    for source, out in ((model, shards), (shards, tmp_path / "again")):
        with run_python(PEAK_MEMORY, small, source, out) as process:
            output, _ = process.communicate()
        assert process.returncode == 0, output
        assert int(output) < 12 << 20
