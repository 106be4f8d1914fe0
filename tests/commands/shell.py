"""Commands as a user types them, and what is to be said of every one that is refused."""

from __future__ import annotations

import json
import subprocess
from contextlib import ExitStack
from typing import Any

import pytest
from mpi4py import MPI
from mpi_runner import run_mpi, run_warm

from mpishard.cli import run_command
from mpishard.errors import UserError

# The model that commands are tried on: tiny, with 8 query and 4 key/value heads and odd widths, so
# that every division is uneven.
VARIANT = "llama-gqa"

Finished = subprocess.CompletedProcess[str]


def mpishard(n: int | None, *words: object, is_real: bool = False, **options: Any) -> Finished:
    """What ``mpirun -n N python -m mpishard WORDS`` answers; without mpirun if `n` is None.

    In ranks that are kept warm, unless the command `is_real` or is given an input.
    """
    if is_real or "input" in options:
        return run_mpi(n, ["-m", "mpishard", *map(str, words)], **options)
    return run_warm(n, [*map(str, words)], **options)


def answered(n: int | None, *words: object, **options: Any) -> str:
    """The standard output of a command that succeeds."""
    finished = mpishard(n, *words, **options)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def completions(n: int | None, *words: object, **options: Any) -> list[dict[str, Any]]:
    """The answers of ``mpishard generate --json``."""
    lines = answered(n, "generate", *words, "--json", **options).splitlines()
    return [json.loads(line) for line in lines]


def refusal(n: int | None, *words: object, **options: Any) -> str:
    """The one sentence with which a command refuses what was typed: it ends with status 2, and
    says nothing else that looks like an error or a result."""
    finished = mpishard(n, *words, **options)
    report = f"status {finished.returncode}\n{finished.stdout}\n{finished.stderr}"
    assert finished.returncode == 2, report
    assert "Traceback" not in finished.stderr, report
    messages = [line for line in finished.stderr.splitlines() if line.startswith("mpishard:")]
    assert len(messages) == 1 and messages[0].startswith("mpishard: error: "), report
    assert finished.stdout == "" or "BAD TERMINATION" in finished.stdout, report
    return messages[0].removeprefix("mpishard: error: ")


def refusal_here(*words: object) -> str:
    """The same sentence, of a command run in this process: for the many that differ in nothing
    else."""
    with pytest.raises(UserError) as refused, ExitStack() as job:
        run_command(["mpishard", *map(str, words)], MPI.COMM_SELF, job)
    assert "\n" not in str(refused.value)
    return str(refused.value)
