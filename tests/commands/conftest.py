"""The models that the commands are tried on: tiny, random, but able to speak."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_text import write_speaker

from commands.shell import VARIANT, answered
from mpishard.runtime import launch


@pytest.fixture(autouse=True)
def _launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that run in this process take themselves for mpirun's, also where the tests are a
    job of Slurm's."""
    monkeypatch.setattr(launch, "launcher", lambda: "mpirun")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with a tokenizer and a chat template."""
    return write_speaker(VARIANT, tmp_path_factory.mktemp("models") / VARIANT)


@pytest.fixture(scope="session")
def shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The same model as shards for so many ranks, all but the first made of other shards."""
    directory = tmp_path_factory.mktemp("shards")

    def of(tp: int) -> Path:
        out = directory / f"tp{tp}"
        if not out.exists():
            source = next(directory.iterdir(), model)
            answered(None, "shard", source, out, "--tp", tp)
        return out

    return of
