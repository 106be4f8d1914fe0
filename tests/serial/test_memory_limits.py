"""The memory that a job may take for its caches unless told."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpishard.batch import run


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Control groups of a batch system: those of a job and of a step of it, which has no limit."""
    monkeypatch.setattr(run, "CONTROL_GROUPS", tmp_path)
    step = tmp_path / "job" / "step"
    step.mkdir(parents=True)
    (step / "memory.max").write_text("max\n")
    (step / "memory.current").write_text("1000\n")
    (tmp_path / "job" / "memory.max").write_text("900000\n")
    (tmp_path / "job" / "memory.current").write_text("400000\n")
    return step


def test_a_limit_counts_wherever_above_it_is_set(groups):
    assert list(run._group_memory(groups)) == [500000]
    (groups / "memory.max").write_text("3000\n")
    assert list(run._group_memory(groups)) == [2000, 500000]
    assert list(run._group_memory(groups.parent.parent / "none")) == []


def test_what_is_free_is_no_more_than_what_is_allowed(groups, monkeypatch):
    free = run._free_memory()
    assert 2**20 < free < 2**50
    read = Path.read_text

    def in_group(path: Path, *arguments: object, **options: object) -> str:
        if path == Path("/proc/self/cgroup"):
            return "0::/job/step\n"
        return read(path)

    monkeypatch.setattr(Path, "read_text", in_group)
    assert run._free_memory() == 500000
    (groups.parent / "memory.current").write_text("999999\n")
    assert run._free_memory() == 0
