"""``--ignore-config``: a field that the user answers for, through every command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_models import rewrite

import mpishard as package
from commands.shell import answered, mpishard, refusal_here

NOTICE = "ignored fields of config.json: frobnicate"


@pytest.fixture(scope="module")
def odd(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a field that nobody knows."""
    directory = tmp_path_factory.mktemp("odd") / "model"
    shutil.copytree(model, directory)
    rewrite(directory / "config.json", lambda raw: raw.update(frobnicate=3))
    return directory


@pytest.fixture(scope="module")
def odd_shards(odd: Path) -> Path:
    shards = odd.with_name("shards")
    finished = mpishard(None, "shard", odd, shards, "--tp", 2, "--ignore-config", "frobnicate")
    assert f"{odd}: {NOTICE}\n" in finished.stderr
    return shards


def test_the_first_line_of_a_run_says_what_is_ignored(odd, odd_shards, model, tmp_path):
    lines = tmp_path / "in.jsonl"
    lines.write_text(json.dumps({"id": "a", "input_ids": [1, 2, 3]}))
    files = ["--input", lines, "--output"]
    right = answered(None, "generate", model, "--prompt", "the in", "--max-tokens", 4)
    answer = ["--ignore-config", "frobnicate"]
    for number, path, ranks, more in ((0, odd, None, answer), (1, odd_shards, 2, [])):
        finished = mpishard(ranks, "generate", path, "--prompt", "the in", "--max-tokens", 4, *more)
        assert (finished.returncode, finished.stdout) == (0, right), finished.stderr
        assert finished.stderr.splitlines()[0].endswith(f"; {NOTICE}")
        for command, kind in (("logits", "npz"), ("batch", "jsonl")):
            finished = mpishard(ranks, command, path, *files, tmp_path / f"{number}.{kind}", *more)
            assert finished.returncode == 0, finished.stderr
            assert finished.stderr.splitlines()[0].endswith(f"; {NOTICE}")
        assert f"note          {NOTICE}\n" in answered(None, "inspect", path, *more)


def test_without_an_answer_the_field_is_refused(odd):
    for words in (["inspect", odd], ["generate", odd, "--prompt", "a"], ["shard", odd, "x"]):
        tp = ["--tp", 2] if words[0] == "shard" else []
        assert "give --ignore-config frobnicate" in refusal_here(*words, *tp)


def test_an_answer_without_effect_is_refused(model, odd_shards):
    for path in (model, odd_shards):
        sentence = refusal_here("inspect", path, "--ignore-config", "rope_thetta")
        assert "--ignore-config rope_thetta has no effect, because it is not a field" in sentence


def test_shards_remember_through_another_conversion(odd_shards, tmp_path):
    answered(None, "shard", odd_shards, tmp_path / "again", "--tp", 1)
    assert package.load(tmp_path / "again").notices == (NOTICE,)


def test_in_python(odd):
    assert package.load(odd, ignore_config="frobnicate").notices == (NOTICE,)
    model = package.load(odd, ignore_config=["frobnicate"])
    assert model.notices == (NOTICE,) and model.config.ignored_fields == ("frobnicate",)
    with pytest.raises(package.UserError, match="give --ignore-config frobnicate"):
        package.load(odd)
