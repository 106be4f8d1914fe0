"""The script that kills a batch over and over finds nothing lost, and would find it."""

from __future__ import annotations

from pathlib import Path

import pytest
from mpi_runner import run_mpi

pytestmark = pytest.mark.waits(12)

FUZZ = Path(__file__).parents[1] / "fuzz"

# Answers lost, doubled, or changed: what a journal must not do.
FAULTS = {
    "missing": "1 missing, 0 doubled, 0 lost or changed on the way",
    "doubled": "0 missing, 1 doubled, 0 lost or changed on the way",
    "other": "0 missing, 0 doubled, 0 lost or changed on the way, 1 different",
}


def test_nothing_is_lost_under_fire():
    words = [str(FUZZ / "batch_under_fire.py"), "--requests", "90", "--kills", "3"]
    finished = run_mpi(None, words, timeout=200)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    lines = finished.stdout.splitlines()
    assert lines[1].startswith("kill  1 (")
    assert lines[-1] == (
        "90 answers: 0 missing, 0 doubled, 0 lost or changed on the way, 0 different from the "
        "uninterrupted run"
    )


@pytest.mark.parametrize("fault, sentence", FAULTS.items())
def test_a_fault_would_be_found(tmp_path, fault, sentence):
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(FUZZ.parent)!r})
from fuzz.batch_under_fire import compare
right, found = Path("right"), Path("found")
lines = ['{{"id": "a"}}', '{{"id": "b"}}', '{{"id": "c"}}']
right.write_text("\\n".join(lines))
changed = {{
    "missing": lines[:2],
    "doubled": [*lines, lines[2]],
    "other": [*lines[:2], '{{"id": "c", "text": ""}}'],
}}
found.write_text("\\n".join(changed["{fault}"]))
sys.exit(compare(right, found, [{{"id": name}} for name in "abc"], 0))
"""
    finished = run_mpi(None, ["-c", script], cwd=tmp_path)
    assert finished.returncode == 1 and sentence in finished.stdout
