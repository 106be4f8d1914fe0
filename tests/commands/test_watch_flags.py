"""The flags of the watchdog and of compared collectives, where nothing goes wrong."""

from __future__ import annotations

import pytest
from mpi4py import MPI

from commands.shell import answered, refusal, refusal_here
from mpishard.cli import make_parser
from mpishard.errors import UserError
from mpishard.runtime import launch
from mpishard.runtime.watchdog import Watchdog

ASKED = ["--prompt", "def on", "--max-tokens", "20", "--ignore-eos"]


@pytest.mark.parametrize(
    "words",
    [
        "generate M --prompt a",
        "logits M --input I --output O",
        "bench M",
        "shard M OUT --tp 2",
    ],
)
def test_every_command_with_collectives_is_watched(words):
    args = make_parser().parse_args(words.split())
    assert (args.timeout, args.check_collectives) == (launch.TIMEOUT, False)
    args = make_parser().parse_args([*words.split(), "--timeout=0.5", "--check-collectives"])
    assert (args.timeout, args.check_collectives) == (0.5, True)


def test_half_an_hour_unless_told_otherwise():
    assert launch.TIMEOUT == 1800
    with Watchdog(MPI.COMM_SELF) as watch:
        assert watch.timeout == 1800


def test_0_watches_nothing():
    with Watchdog(MPI.COMM_SELF, 0) as watch:
        assert watch._thread is None
    with Watchdog(MPI.COMM_SELF, 1) as watch:
        thread = watch._thread
        assert thread is not None and thread.is_alive()
    assert not thread.is_alive()
    watch.close()  # once more is no fault


@pytest.mark.parametrize("timeout", ["-1", "inf", "-inf"])
def test_a_timeout_is_a_number_of_seconds(model, timeout):
    right = f"timeout {timeout} must be the seconds that a collective may take, or 0 for any time"
    words = ["generate", model, "--prompt", "a", f"--timeout={timeout}"]
    assert refusal_here(*words) == right
    with pytest.raises(UserError, match="must be the seconds"):
        Watchdog(MPI.COMM_SELF, float("nan"))
    with pytest.raises(UserError, match="must be the seconds"):
        Watchdog(MPI.COMM_SELF, float(timeout))


def test_a_timeout_that_is_no_number_and_flags_without_effect(model):
    words = ["generate", model, "--prompt", "a", "--timeout"]
    assert refusal_here(*words, "soon").startswith("argument --timeout: 'soon' is not a number;")
    assert refusal_here(*words, "nan").startswith("argument --timeout: 'nan' is not a number;")
    assert refusal_here(*words, "1", "--timeout", "2").startswith("argument --timeout: given twice")
    for flag in ("--timeout 9", "--check-collectives"):
        said = refusal(2, "inspect", model, *flag.split())
        assert said == f"unrecognized arguments: {flag}; see `mpishard inspect --help`"


@pytest.mark.parametrize("n, how", [(None, ""), (2, "--tp 2"), (4, "--tp 2 --cp 2"), (2, "--dp 2")])
def test_ranks_that_agree_answer_the_same_when_compared(model, n, how):
    words = ["generate", model, *ASKED, "--prompt", "b", *how.split()]
    assert answered(n, *words, "--check-collectives", "--timeout", 30) == answered(n, *words)


def test_other_commands_compare_too(model, shards, tmp_path):
    check = ["--check-collectives", "--timeout", "30"]
    answered(2, "shard", model, tmp_path / "out", "--tp", 2, *check)
    lines = tmp_path / "in.jsonl"
    lines.write_text('{"id": "a", "prompt": "def"}\n{"id": "b", "input_ids": [1, 2]}\n')
    answered(2, "logits", shards(2), "--input", lines, "--output", tmp_path / "o.npz", *check)
    small = ["--prompt-tokens", 4, "--max-tokens", 2, "--batch", 1, "--repeat", 1]
    answered(2, "bench", model, "--tp", 2, *small, *check)
