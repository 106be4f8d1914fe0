"""``mpishard shard`` and ``inspect``: converted by any number of ranks, interrupted, repeated,
damaged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from mpi_runner import Launch, run_mpi
from safetensors.numpy import save_file
from tiny_models import VARIANTS, write_checkpoint

from commands.shell import answered, mpishard, refusal, refusal_here
from mpishard.config.reader import read_model_config
from mpishard.config.weight_specs import weight_specs


def contents(directory: Path) -> dict[str, bytes]:
    """The files of a shard directory, without what differs from conversion to conversion."""
    texts = {path.name: path.read_bytes() for path in directory.iterdir()}
    manifest = json.loads(texts["mpishard.json"])
    conversion = manifest["conversion"].encode()
    return {name: text.replace(conversion, b"") for name, text in texts.items()}


@pytest.mark.parametrize("n, tp", [(2, 3), (3, 4), (4, 2)])
def test_any_number_of_ranks_writes_the_same_files(model, tmp_path, n, tp):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    answered(None, "shard", model, alone, "--tp", tp)
    finished = mpishard(n, "shard", model, shared, "--tp", tp)
    assert finished.returncode == 0 and finished.stdout == ""
    assert finished.stderr.splitlines()[-1] == f"{shared}: 0.1 MB for {tp} ranks"
    left, right = contents(alone), contents(shared)
    assert left.keys() == right.keys()
    assert {f"rank-{rank:05}-of-{tp:05}.h5" for rank in range(tp)} < left.keys()
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} < left.keys()
    assert sorted(tmp_path.iterdir()) == [alone, shared]


def test_inspect_shows_what_each_rank_holds_and_verifies_it(model, shards):
    said = answered(2, "inspect", shards(3), "--verify")
    assert "--tp 3" in said and "rank-00002-of-00003.h5" in said
    assert said.endswith("verified: every element of every weight is there and sound\n")
    assert "verified" not in answered(None, "inspect", model)


def test_weights_are_stored_in_the_dtype_asked_for(tmp_path):
    model = write_checkpoint("qwen3-mixed", tmp_path / "model", "bfloat16")
    answered(2, "shard", model, tmp_path / "narrow", "--tp", 3, "--dtype", "bfloat16")
    assert "bfloat16" in answered(None, "inspect", tmp_path / "narrow", "--verify")
    lines, out = tmp_path / "in.jsonl", tmp_path / "out.npz"
    lines.write_text('{"id": "a", "input_ids": [1, 2, 3]}')
    words = ["--input", lines, "--output", out]
    answered(None, "logits", model, *words)
    direct = np.load(out)["a"]
    answered(3, "logits", tmp_path / "narrow", *words)
    assert np.abs(np.load(out)["a"] - direct).max() < 2e-4 * direct.std()


# Interrupted


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of some 100 MB, which takes a while to convert."""
    sizes = {"vocab_size": 30000, "hidden_size": 512, "intermediate_size": 2048}
    raw = {**VARIANTS["llama-mha"], **sizes, "num_hidden_layers": 2}
    directory = tmp_path_factory.mktemp("models") / "large"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(raw))
    table = weight_specs(read_model_config(raw, None, "config.json"))
    weights = {weight.name: np.ones(weight.shape, np.float32) for weight in table}
    save_file(weights, directory / "model.safetensors")
    return directory


def test_a_killed_conversion_leaves_nothing_valid_and_can_be_repeated(large, tmp_path):
    out, incomplete = tmp_path / "out", tmp_path / "out.incomplete"
    words = ["-m", "mpishard", "shard", large, out, "--tp", "2"]
    with Launch(2, words, stderr=subprocess.PIPE) as job:
        deadline = time.monotonic() + 30
        while not list(incomplete.glob("rank-00001-of-00002.h5")):
            assert job.process.poll() is None and time.monotonic() < deadline
        os.kill(job.pid(1), signal.SIGKILL)
        assert job.process.wait(10) != 0
    assert not out.exists()
    assert not (incomplete / "mpishard.json").exists()
    message = refusal(None, "inspect", incomplete)
    assert message.endswith("is an interrupted conversion: run `mpishard shard` again")
    answered(2, "shard", large, out, "--tp", 2)
    assert list(tmp_path.iterdir()) == [out]
    answered(None, "inspect", out, "--verify")


DISK_FULL = """
import runpy
from mpi4py import MPI
from mpishard.errors import UserError
from mpishard.storage.convert import Conversion

def fails(self, *arguments):
    raise UserError("disk full")

if MPI.COMM_WORLD.rank == 1:
    Conversion.write = fails
runpy.run_module("mpishard", run_name="__main__", alter_sys=True)
"""


def test_a_conversion_that_fails_on_one_rank_ends_on_all(large, tmp_path):
    out = tmp_path / "out"
    finished = run_mpi(2, ["-c", DISK_FULL, "shard", large, out, "--tp", "2"], timeout=20)
    assert finished.returncode != 0
    assert finished.stderr.count("mpishard: error: rank 1 of 2: disk full") == 1
    assert not out.exists()


# Refused


@pytest.mark.parametrize("n", [None, 3])
def test_the_output_must_be_new(model, shards, tmp_path, n):
    there = shards(2)
    before = contents(there)
    message = refusal(n, "shard", model, there, "--tp", 2)
    assert message.startswith(f"{there} exists already: ")
    assert contents(there) == before
    stranger = tmp_path / "new.incomplete"
    stranger.mkdir()
    (stranger / "thesis.txt").write_text("mine")
    message = refusal(n, "shard", model, tmp_path / "new", "--tp", 2)
    assert f"{stranger} is in the way" in message
    assert (stranger / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("out", ["none/out", "file/out"])
def test_the_output_must_be_possible(model, tmp_path, out):
    (tmp_path / "file").touch()
    message = refusal(2, "shard", model, tmp_path / out, "--tp", 2)
    assert str(tmp_path / out) in message


def test_no_more_ranks_than_query_heads(model, tmp_path):
    message = refusal(2, "shard", model, tmp_path / "out", "--tp", 9)
    assert message.startswith("--tp 9 is more than the model's 8 query heads")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def damaged(shards, tmp_path: Path) -> Path:
    """Shards for two ranks, to be damaged."""
    return Path(shutil.copytree(shards(2), tmp_path / "damaged"))


def test_a_file_that_is_missing(damaged):
    (damaged / "rank-00001-of-00002.h5").unlink()
    message = refusal(2, "generate", damaged, "--prompt", "a")
    assert "should hold 2 rank files" in message
    assert message.endswith("rank-00001-of-00002.h5 is missing")


def test_files_that_are_swapped(damaged):
    first, second = damaged / "rank-00000-of-00002.h5", damaged / "rank-00001-of-00002.h5"
    first.rename(damaged / "other")
    second.rename(first)
    (damaged / "other").rename(second)
    message = refusal_here("generate", damaged, "--prompt", "a")
    assert f"{first} says rank 1, but 0 belongs here" in message


def test_a_file_of_another_conversion(model, damaged, tmp_path):
    answered(None, "shard", model, tmp_path / "again", "--tp", 2)
    shutil.copy(tmp_path / "again" / "rank-00001-of-00002.h5", damaged)
    message = refusal_here("generate", damaged, "--prompt", "a")
    old, new = (
        json.loads((path / "mpishard.json").read_text())["conversion"]
        for path in (damaged, tmp_path / "again")
    )
    assert f"rank-00001-of-00002.h5 says conversion {new}, but {old} belongs here" in message


def test_a_file_that_is_cut_short(damaged):
    file = damaged / "rank-00001-of-00002.h5"
    os.truncate(file, file.stat().st_size // 2)
    message = refusal_here("generate", damaged, "--prompt", "a")
    assert str(file) in message


def test_a_flipped_bit_is_found_by_verify(damaged):
    file = damaged / "rank-00001-of-00002.h5"
    with h5py.File(file) as weights:
        place = weights["model.norm.weight"].id.get_offset()
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    finished = mpishard(2, "inspect", damaged, "--verify")
    assert finished.returncode == 2 and "verified" not in finished.stdout
    (message,) = [line for line in finished.stderr.splitlines() if "mpishard:" in line]
    assert message.startswith(f"mpishard: error: rank 0 of 2: {file} is damaged: ")
    assert "checksum" in message


def test_shards_are_refused_that_came_to_be_in_the_meantime(large, tmp_path):
    """The output directory appears while the ranks write: what is there stays."""
    out, incomplete = tmp_path / "out", tmp_path / "out.incomplete"
    words = ["-m", "mpishard", "shard", large, out, "--tp", "2"]
    with Launch(2, words, stderr=subprocess.PIPE) as job:
        while not incomplete.exists():
            assert job.process.poll() is None
        out.mkdir()
        _, err = job.process.communicate(timeout=30)
    assert job.process.returncode == 2
    assert "came to exist during the conversion" in err
    assert list(out.iterdir()) == []
