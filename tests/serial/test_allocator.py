"""Memory that is freed stays with the process."""

from __future__ import annotations

import sys

import pytest
from mpi_runner import run_mpi

# Pages are asked for again in every round unless they were kept.
ROUNDS = """
import resource
import numpy as np
{before}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(6):
    start = faults()
    arrays = [np.ones(2**17) for _ in range(24)]
    del arrays
    last = faults() - start
print(last)
"""
KEPT = "from mpishard.runtime.malloc import keep_freed_memory\nkeep_freed_memory()"


def faults_of_the_last_round(before: str) -> int:
    finished = run_mpi(None, ["-c", ROUNDS.format(before=before)])
    assert finished.returncode == 0, finished.stderr
    return int(finished.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="there is no glibc to be told")
def test_pages_are_not_asked_for_twice():
    pages = 24 * 2**20 // 4096
    assert faults_of_the_last_round(KEPT) < pages / 20
    assert faults_of_the_last_round("") > pages / 2


def test_loading_a_model_sees_to_it():
    loads = "import mpishard.api as api\napi.keep_freed_memory = lambda: print('kept')\n"
    broken = "try:\n    api.load('nowhere')\nexcept Exception:\n    pass\n"
    finished = run_mpi(None, ["-c", loads + broken])
    assert finished.stdout == "kept\n", finished.stderr
