"""``mpishard bench``, progress bars, and runs that are cut off."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from mpi_runner import Launch

from commands.shell import answered, mpishard

BENCH = ["--prompt-tokens", "8", "--max-tokens", "4", "--batch", "1", "3", "--repeat", "1"]


@pytest.mark.parametrize("n, tp", [(None, 1), (4, 2)])
def test_bench_prints_a_table(model, n, tp):
    finished = mpishard(n, "bench", model, *BENCH, "--tp", tp)
    assert finished.returncode == 0, finished.stderr
    assert f"--tp {tp} --dp {(n or 1) // tp}" in finished.stdout
    for words in ("prefill 8", "decode 4", "tokens/s", "roofline", "all_reduce", "GB/s"):
        assert words in finished.stdout


@pytest.mark.parametrize(
    "n, words, collectives",
    [
        (2, "--tp 2 --dp 1 --sequence-parallel", {"all_gather", "reduce_scatter"}),
        (2, "--tp 1 --cp 2 --dp 1", {"isendrecv", "reduce_scatter"}),
        (2, "--tp 1 --cp 2 --dp 1 --cp-prefill all-gather", {"all_gather", "reduce_scatter"}),
        (8, "--tp 8 --dp 1 --flash-decoding --decode-merge all-to-all", {"all_to_all"}),
        (
            8,
            "--tp 2 --cp 2 --dp 2 --sequence-parallel --cp-kv-cache-interleave-size 4",
            {"isendrecv"},
        ),
    ],
)
def test_bench_measures_every_way_to_divide_sequences(model, n, words, collectives):
    """Beyond the positions of the configuration, too."""
    how = ["--prompt-tokens", 70, *BENCH[2:], "--max-model-len", 80, "--json"]
    report = json.loads(answered(n, "bench", model, *how, *words.split()))
    assert report["layout"] == words and report["ranks"] == n
    used = {entry["operation"] for row in report["speeds"] for entry in row["collectives"]}
    assert collectives <= used


def test_bench_prints_one_object(model):
    report = json.loads(answered(2, "bench", model, *BENCH, "--json", "--tp", 2))
    assert [(row["phase"], row["batch"]) for row in report["speeds"]] == [
        ("prefill", 1), ("decode", 1), ("prefill", 3), ("decode", 3)
    ]  # fmt: skip


# Progress


def on_terminal(n: int | None, *words: object) -> tuple[str, str]:
    """What a command prints when standard error, but not standard output, is a terminal."""
    terminal, end = os.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 80, 0, 0))
    arguments = ["-m", "mpishard", *map(str, words)]
    with Launch(n, arguments, stdout=subprocess.PIPE, stderr=end) as job:
        os.close(end)
        shown = b""
        with suppress(OSError):  # EIO: the last writer has closed its end
            while block := os.read(terminal, 1000):
                shown += block
        out, _ = job.process.communicate(timeout=30)
    os.close(terminal)
    assert job.process.returncode == 0, shown
    return out, shown.decode()


@pytest.mark.parametrize("n", [None, 2])
def test_long_work_shows_its_progress_on_a_terminal(model, tmp_path, n):
    _, shown = on_terminal(n, "shard", model, tmp_path / "out", "--tp", 3)
    assert "writing: " in shown and shown.count("B/s") >= 1
    prompts = [word for _ in range(4) for word in ("--prompt", "a")]
    out, shown = on_terminal(n, "generate", model, *prompts, "--max-tokens", 3)
    assert "answers: " in shown and "%" not in out


def test_verification_and_scoring_show_their_progress(model, tmp_path):
    out, shown = on_terminal(None, "inspect", model, "--verify")
    assert "verifying: " in shown and out.endswith("sound\n")
    file = tmp_path / "in.jsonl"
    file.write_text('{"id": "a", "input_ids": [1, 2]}')
    _, shown = on_terminal(2, "logits", model, "--input", file, "--output", tmp_path / "out")
    assert "scoring: " in shown


def test_the_text_of_one_prompt_is_its_own_progress(model):
    _, shown = on_terminal(2, "generate", model, "--prompt", "a", "--max-tokens", "3")
    assert "answers: " not in shown


def test_files_get_no_progress_bars(model, tmp_path):
    finished = mpishard(2, "shard", model, tmp_path / "out", "--tp", 2)
    assert finished.stderr == f"{tmp_path / 'out'}: 0.1 MB for 2 ranks\n"


# Cut off


@contextmanager
def long_run(model: Path) -> Iterator[Launch]:
    """Three ranks that have loaded the model and have many prompts to complete."""
    prompts = ["--prompt=the a"] * 2000
    words = ["-m", "mpishard", "generate", str(model), *prompts, "--ignore-eos", "--tp", "3"]
    pipe = subprocess.PIPE
    with Launch(3, words, stdout=pipe, stderr=pipe) as job:
        assert job.process.stderr
        assert "threads per rank" in job.process.stderr.readline()
        yield job


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_dies_ends_the_run(model, rank):
    with long_run(model) as job:
        os.kill(job.pid(rank), signal.SIGKILL)
        died = time.monotonic()
        assert job.process.wait(10) != 0
        assert time.monotonic() - died < 5


def test_an_interrupted_run_ends_without_a_traceback(model):
    with long_run(model) as job:
        job.process.send_signal(signal.SIGINT)
        out, err = job.process.communicate(timeout=10)
    assert job.process.returncode != 0
    assert "===" not in out and "Traceback" not in err
    assert err.count("mpishard: error:") <= 1
