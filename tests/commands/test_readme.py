"""README's commands and its Python example, run as they stand there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from mpi_runner import run_mpi
from pages import FENCED, README, ROOT, commands

from commands.shell import answered

LINES = '{"id": "a", "prompt": "def read(self"}\n{"id": "b", "prompt": "class Set"}\n'
SHORT = ["--prompt-tokens", "8", "--max-tokens", "2", "--batch", "1", "--repeat", "1"]  # of bench
PROMPTS = ["def read(self, size=-1):", "class Queue:"]


def test_commands(tmp_path: Path):
    """One after the other, in a directory of their own: the later ones read what `shard` wrote."""
    here = {name: str(tmp_path / name) for name in ("in.jsonl", "out.jsonl", "out.npz")}
    here |= {
        "/tmp/shards": str(tmp_path / "shards"),
        "data/cpython-4m": str(ROOT / "data/cpython-4m"),
    }
    (tmp_path / "in.jsonl").write_text(LINES)
    said = {}
    for ranks, words in commands(README.read_text()):
        shorter = SHORT if words[0] == "bench" else []
        said[words[0]] = answered(ranks, *(here.get(word, word) for word in words), *shorter)
    assert all(f"=== {prompt}" in said["generate"] for prompt in PROMPTS)
    assert "sound" in said["inspect"]
    assert "all_reduce" in said["bench"]
    assert set(np.load(here["out.npz"])) == {"a", "b"}
    answers = map(json.loads, Path(here["out.jsonl"]).read_text().splitlines())
    assert [answer["id"] for answer in answers] == ["a", "b"]


def test_python_example(tmp_path: Path):
    (example,) = [
        code
        for language, code in FENCED.findall(README.read_text())
        if language == "python" and "import mpishard" in code
    ]
    script = tmp_path / "script.py"
    script.write_text(example)
    finished = run_mpi(2, ["-m", "mpi4py", str(script)], cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count(" length\n") == 2, finished.stdout
