"""The models that the commands are tried on: tiny, random, but able to speak."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_text import write_speaker

from commands.shell import VARIANT, answered


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
