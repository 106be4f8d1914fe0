"""Commands in warm ranks, which most tests run, answer as those of a real launch do; and whatever
becomes of warm ranks, the next command finds some."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi_runner import run_warm, warm
from mpi_runner.launch import mpirun
from tiny_models import rewrite
from tiny_text import write_speaker

from commands.shell import VARIANT, Finished, mpishard


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose logits are not numbers."""
    path = write_speaker(VARIANT, tmp_path_factory.mktemp("odd"))
    rewrite(path / "model.safetensors", lambda tensors: tensors["model.norm.weight"].put(3, np.nan))
    return path


COMMANDS = {
    "generate": (None, "generate MODEL --prompt é --prompt a --json --seed 7 --temperature 1"),
    "streamed": (2, "generate MODEL --prompt a --tp 2 --max-tokens 5"),
    "chunked": (3, "generate MODEL --prompt aaaa --cp 3 --prefill-chunk 2 --check-collectives"),
    "batch": (2, "batch MODEL --input IN --output OUT --dp 2 --max-tokens 5"),
    "logits": (4, "logits MODEL --input IN --output OUT --tp 2 --dp 2"),
    "shard": (2, "shard MODEL OUT --tp 3"),
    "inspect": (2, "inspect MODEL --verify"),
    "help": (None, "generate --help"),
    "version": (2, "--version"),
    "a wrong call": (2, "generate MODEL"),
    "ranks that do not fit": (3, "generate MODEL --prompt a --tp 2"),
    "no model": (2, "generate OUT --prompt a"),
    "nothing to read": (2, "logits MODEL --input OUT --output OUT"),
    "a rank that fails alone": (2, "generate ODD --prompt a --prompt b --temperature 1"),
    "ranks that fail together": (2, "generate ODD --prompt a --cp 2 --temperature 1"),
}


def told(finished: Finished) -> list[str]:
    """What a command says, with what differs from run to run left out."""
    speed = r"\d+\.\d+ (completion )?tokens/s|in \d+\.\d+ s"
    errors = re.sub(rf"{speed}|\d+ (%|MiB)|rank \d of \d: |prompt \d", "", finished.stderr)
    lines = [line for line in errors.splitlines() if not line.startswith("Abort(")]
    return [f"status {finished.returncode}", finished.stdout, *lines]


@pytest.mark.parametrize("command", COMMANDS)
def test_warm_ranks_answer_as_those_of_a_real_launch(model, odd, tmp_path, command):
    n, typed = COMMANDS[command]
    lines, out = tmp_path / "in.jsonl", tmp_path / "out"
    lines.write_text("".join(json.dumps({"id": id, "prompt": id}) + "\n" for id in "abcd"))
    names = {"MODEL": str(model), "ODD": str(odd), "IN": str(lines), "OUT": str(out)}
    words = [names.get(word, word) for word in typed.split()]
    found: list[list[str]] = []
    made: list[Any] = []
    for is_real in (True, False):
        found.append(told(mpishard(n, *words, is_real=is_real)))
        made.append({path.name: path.stat().st_size for path in out.glob("*")})
        if command in ("batch", "logits"):
            made[-1] = out.read_bytes()
        if out.exists():
            out.rename(tmp_path / f"out {is_real}")
    assert found[1] == found[0]
    assert made[1] == made[0]


VERSION = ["--version"]


def test_warm_ranks_are_kept_and_begun_anew_where_one_has_died():
    right = told(run_warm(2, VERSION))
    kept = warm.ranks(2)
    assert told(run_warm(2, VERSION)) == right and warm.ranks(2) is kept
    os.kill(kept.launch.pid(1), signal.SIGKILL)
    kept.launch.process.wait(10)
    assert told(run_warm(2, VERSION)) == right and warm.ranks(2) is not kept


def test_another_launcher_starts_ranks_of_its_own(monkeypatch):
    """Such as that of other hosts."""
    kept = warm.ranks(1)
    monkeypatch.setenv("MPISHARD_MPIRUN", shlex.join(["env", *mpirun()]))
    other = warm.ranks(1)
    assert other is not kept and other.launch.process.args[0] == "env"  # type: ignore[index]
    monkeypatch.undo()
    assert warm.ranks(1) is kept


def test_a_command_that_takes_too_long_fails_the_test_and_is_ended():
    right = told(run_warm(2, VERSION))
    kept = warm.ranks(2)
    os.kill(kept.launch.pid(1), signal.SIGSTOP)
    with pytest.raises(pytest.fail.Exception, match="still running after 1 s: .*--version"):
        run_warm(2, VERSION, timeout=1)
    assert list(kept.launch.members()) == []
    assert told(run_warm(2, VERSION)) == right


def test_each_command_runs_in_its_own_directory(tmp_path):
    (tmp_path / "file").touch()
    for cwd, words in ((str(tmp_path), "is not a directory"), (None, "does not exist")):
        said = run_warm(None, ["inspect", "file"], cwd=cwd)
        assert said.returncode == 2 and f"file {words}" in said.stderr
