"""``mpishard logits``: scores equal to the oracle's, under the ids of the lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi_runner import run_mpi
from tiny_models import tiny_config, tiny_weights

from commands.shell import VARIANT, answered, mpishard, refusal, refusal_here
from mpishard.reference import Reference
from mpishard.tokenizer import Tokenizer

LINES: list[dict[str, Any]] = [
    {"id": "a", "input_ids": [1, 5, 66, 0, 9, 3]},
    {"id": 7, "prompt": "def on(a):\n"},
    {"id": "one token", "input_ids": [2]},
    {"id": "a/b.npy", "prompt": "line\u2028separator é", "input_ids": None},
    {"id": "long", "input_ids": [(7 * place) % 67 for place in range(64)]},
]
NAMES = [str(line["id"]) for line in LINES]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As some editors write it: with a byte order mark, blank lines and carriage returns."""
    file = tmp_path_factory.mktemp("input") / "lines.jsonl"
    written = [json.dumps(line, ensure_ascii=False) for line in LINES]
    file.write_text("\ufeff" + "\r\n\n".join(written) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def right(model) -> dict[str, np.ndarray]:
    """All arrays of the oracle, in double precision."""
    oracle, text, arrays = (
        Reference(tiny_config(VARIANT), tiny_weights(VARIANT)),
        Tokenizer(model),
        {},
    )
    for name, line in zip(NAMES, LINES, strict=True):
        ids = line.get("input_ids") or text.encode(line["prompt"])
        arrays[name], hidden = oracle.forward(ids)
        arrays |= {f"{name}.hidden.{layer}": x_SD for layer, x_SD in enumerate(hidden)}
    return arrays


def check(file: Path, right: dict[str, np.ndarray], names: list[str], tolerance: float) -> None:
    """Refuse arrays further from the oracle's than `tolerance` of their standard deviation."""
    with np.load(file) as arrays:
        assert list(arrays) == names
        for name in names:
            assert arrays[name].dtype == np.float32
            assert arrays[name].shape == right[name].shape
            error = np.abs(arrays[name] - right[name]).max()
            assert error < tolerance * right[name].std(), name


@pytest.mark.parametrize("tp, dp", [(1, 1), (1, 2), (3, 1), (2, 2), (8, 1), (2, 4)])
def test_every_layout_scores_like_the_oracle(model, lines, right, tmp_path, tp, dp):
    out = tmp_path / "scores.npz"
    answered(tp * dp, "logits", model, "--input", lines, "--output", out, "--tp", tp)
    check(out, right, NAMES, 2e-4)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    "n, words",
    [
        (2, "--cp 2"),
        (3, "--cp 3 --cp-prefill all-gather --cp-order contiguous"),
        (4, "--tp 4 --sequence-parallel"),
        (8, "--tp 2 --cp 2 --dp 2 --sequence-parallel"),
        (6, "--tp 6 --sequence-parallel --flash-decoding"),
    ],
)
def test_every_way_to_divide_sequences_scores_like_the_oracle(
    model, lines, right, tmp_path, n, words
):
    out = tmp_path / "scores.npz"
    answered(n, "logits", model, "--input", lines, "--output", out, *words.split())
    check(out, right, NAMES, 2e-4)


@pytest.mark.parametrize(
    "tp, n, words",
    [
        (3, 3, ""),
        (2, 4, ""),
        (2, 4, "--cp 2 --sequence-parallel"),
        (2, 6, "--cp 3 --cp-prefill all-gather"),
        (8, 8, "--flash-decoding --sequence-parallel"),
    ],
)
def test_hidden_states(shards, lines, right, tmp_path, tp, n, words):
    out = tmp_path / "scores.npz"
    how = ["--input", lines, "--output", out, "--hidden-states", "--compute-dtype", "float64"]
    answered(n, "logits", shards(tp), *how, *words.split())
    layers = range(tiny_config(VARIANT).layers + 1)
    names = [part for name in NAMES for part in (name, *(f"{name}.hidden.{i}" for i in layers))]
    check(out, right, names, 1e-6)  # float32 in the file


def test_the_output_is_replaced_when_it_is_complete(model, lines, tmp_path):
    out = tmp_path / "scores.npz"
    out.write_text("old")
    finished = mpishard(None, "logits", model, "--input", lines, "--output", out)
    assert finished.returncode == 0 and finished.stdout == ""
    assert np.load(out)["a"].shape == (6, 67)
    tokens = sum(len(np.load(out)[name]) for name in NAMES)
    assert f"prefill: {tokens} tokens" in finished.stderr.splitlines()[-1]


def test_positions_can_be_added(model, tmp_path):
    file, out = tmp_path / "in.jsonl", tmp_path / "out.npz"
    ids = [(7 * place) % 67 for place in range(90)]
    file.write_text(json.dumps({"id": "a", "input_ids": ids}))
    words = ["--input", file, "--output", out, "--max-model-len", 90]
    answered(2, "logits", model, *words, "--cp", 2)
    logits_SV, _ = Reference(tiny_config(VARIANT), tiny_weights(VARIANT)).forward(ids)
    check(out, {"a": logits_SV}, ["a"], 2e-4)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", "has no line to score"),
        ('{"id": "a", "input_ids": [1]', "line 1 is not valid JSON"),
        ("{" * 100000, "line 1 is not valid JSON"),
        ("[" * 100000, "has no line that is a JSON object; the first begins with [[[[[[["),
        ("[1, 2]", "is one JSON array, not a JSON object a line: `jq -c '.[]'` makes lines of it"),
        ('{"input_ids": [1]}', 'line 1 must be an object with an "id"'),
        ('{"id": true, "input_ids": [1]}', 'must be an object with an "id"'),
        ('{"id": "a\\u0000", "input_ids": [1]}', "cannot name an array: it has a NUL"),
        ('{"id": "\\ud800", "input_ids": [1]}', "cannot name an array: it is not Unicode"),
        (
            f'{{"id": "{70_000 * "x"}", "input_ids": [1]}}',
            "x… cannot name an array: it has more than 60000 bytes",
        ),
        ('{"id": "a"}', 'must have either "input_ids" or "prompt"'),
        ('{"id": "a", "input_ids": [1], "prompt": "b"}', 'either "input_ids" or "prompt"'),
        ('{"id": "a", "input_ids": "b"}', '"input_ids" must be a list of integers, not "b"'),
        ('{"id": "a", "input_ids": [1.5]}', '"input_ids" must be a list of integers, not [1.5]'),
        (
            '{"id": "a", "prompt": [1.5]}',
            '"prompt" must be one string or one list of token ids',
        ),
        ('{"id": "a", "ids": [1]}', 'unknown field "ids"; known are "id", "input_ids", "prompt"'),
        ('{"id": "a", "input_ids": []}', "line 1: the prompt is empty"),
        ('{"id": "a", "input_ids": [67]}', "token id 67, but the model's ids are 0 to 66"),
        ('{"id": "a", "input_ids": [-1]}', "token id -1"),
        ('{"id": "a", "input_ids": [1' + ", 1" * 64 + "]}", "line 1: the prompt has 65 tokens,"),
        ('{"id": 1, "input_ids": [1]}\n{"id": "1", "prompt": "a"}', "line 2 has the id '1' of an"),
        ('{"id": "a", "input_ids": [1]}\n\n{"id": "b", "prompt": 1}', "line 3: "),
    ],
)
def test_lines_that_cannot_be_scored(model, tmp_path, text, sentence):
    (tmp_path / "in.jsonl").write_text(text)
    out = tmp_path / "out.npz"
    message = refusal_here("logits", model, "--input", tmp_path / "in.jsonl", "--output", out)
    assert sentence in message and "in.jsonl" in message
    assert not out.exists()


def test_input_that_cannot_be_read(model, tmp_path):
    words = ["--output", tmp_path / "out.npz"]
    message = refusal(2, "logits", model, "--input", tmp_path / "none.jsonl", *words)
    assert message.endswith("none.jsonl cannot be read: No such file or directory")
    (tmp_path / "noise.jsonl").write_bytes(b'{"id": "\xff"}')
    message = refusal(None, "logits", model, "--input", tmp_path / "noise.jsonl", *words)
    assert message.endswith("noise.jsonl line 1 is not UTF-8 text: invalid start byte at byte 8")


def test_ids_that_are_names_of_hidden_states(model, tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text('{"id": "a", "input_ids": [1]}\n{"id": "a.hidden.0", "input_ids": [1]}')
    words = ["--input", file, "--output", tmp_path / "out.npz"]
    message = refusal(None, "logits", model, *words, "--hidden-states")
    assert "line 2: the id 'a.hidden.0' is also the name of a hidden state of 'a'" in message
    answered(None, "logits", model, *words)


@pytest.mark.parametrize(
    "output, sentence",
    [
        ("", "is a directory: give the name of a file"),
        ("none/out.npz", "there is no directory"),
        ("in.jsonl", "is the --input: give another name"),
        ("in.jsonl/out.npz", "there is no directory"),
    ],
)
def test_output_that_cannot_be_written(model, tmp_path, output, sentence):
    file = tmp_path / "in.jsonl"
    file.write_text('{"id": "a", "input_ids": [1]}')
    message = refusal(3, "logits", model, "--input", file, "--output", tmp_path / output)
    assert message.startswith("--output ") and sentence in message
    assert file.read_text().startswith('{"id"')


def test_a_failure_leaves_no_output_behind(model, tmp_path):
    """The disk is full: a limit on the size of files stands for it."""
    file, out = tmp_path / "in.jsonl", tmp_path / "out.npz"
    file.write_text(json.dumps({"id": "a", "input_ids": [1] * 64}))
    out.write_text("old")
    script = (
        "import resource, runpy, signal; from mpi4py import MPI; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); "
        "runpy.run_module('mpishard', run_name='__main__', alter_sys=True)"
    )
    words = ["logits", model, "--input", file, "--output", out]
    finished = run_mpi(None, ["-c", script, *words])
    assert finished.returncode == 2
    assert f"mpishard: error: --output {out} cannot be written: File too large" in finished.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.npz"]
    assert out.read_text() == "old"


def test_prompts_need_a_tokenizer_and_token_ids_do_not(model, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((model / name).read_bytes())
    file, out = tmp_path / "in.jsonl", tmp_path / "out.npz"
    file.write_text('{"id": "a", "input_ids": [1]}\n')
    answered(None, "logits", bare, "--input", file, "--output", out)
    file.write_text('{"id": "a", "input_ids": [1]}\n{"id": "b", "prompt": "x"}\n')
    message = refusal(2, "logits", bare, "--input", file, "--output", out, "--tp", 2)
    assert "line 2: " in message and "tokenizer.json does not exist" in message
