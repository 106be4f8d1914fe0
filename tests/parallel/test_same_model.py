"""Ranks that open a model on hosts of their own: what they refuse if it is not the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI
from tiny_models import rewrite, write_checkpoint
from tiny_text import write_speaker

import mpishard
from mpishard.errors import UserError
from mpishard.runtime.same_model import open_on_all
from mpishard.storage.convert import convert
from mpishard.storage.source import open_source

pytestmark = pytest.mark.ranks(2, 3)

VARIANT = "llama-uneven"


@pytest.fixture
def host(comm, monkeypatch: pytest.MonkeyPatch) -> str:
    """The host of this rank: the last rank is on one of its own."""
    name = "host2" if comm.rank == comm.size - 1 else "host1"
    monkeypatch.setattr(MPI, "Get_processor_name", lambda: name)
    return name


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The same model on every rank, and a directory for each."""
    return write_speaker(VARIANT, tmp_path / "model")


def refusal(directory: Path, comm: MPI.Intracomm) -> str:
    """The sentence, which is the same on all ranks but for the path."""
    with pytest.raises(UserError) as caught:
        open_on_all(directory, comm)
    sentence = str(caught.value)
    for path in comm.allgather(str(directory)):
        sentence = sentence.replace(path, "MODEL")
    assert comm.allgather(sentence) == [sentence] * comm.size
    return sentence


def test_the_same_model_in_different_places(directory, comm, host):
    assert open_on_all(directory, comm).config.heads == 12
    assert mpishard.load(directory, comm).generate([[1, 2]])


def change_field(directory: Path) -> None:
    rewrite(directory / "config.json", lambda raw: raw.update(rope_theta=101.0))


def change_ids(directory: Path) -> None:
    (directory / "generation_config.json").write_text('{"eos_token_id": 5}')


def change_template(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{{ messages }}")


def rename_tensors(directory: Path) -> None:
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    file = directory / "model.safetensors"
    rewrite(file, lambda tensors: tensors.update(more))  # it is not read, and moves the others


def change_every_weight(directory: Path) -> None:
    def scale(tensors: dict[str, np.ndarray]) -> None:
        for name in tensors:
            tensors[name] = tensors[name] * np.float32(1.5)

    rewrite(directory / "model.safetensors", scale)


def change_the_last_token(directory: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.embed_tokens.weight"][-1] += 1

    rewrite(directory / "model.safetensors", change)


def narrow(directory: Path) -> None:
    config = (directory / "config.json").read_text()
    write_checkpoint(VARIANT, directory, "bfloat16")
    (directory / "config.json").write_text(config)


@pytest.mark.parametrize(
    "change, what",
    [
        (change_field, "the configuration"),
        (change_ids, "the configuration"),
        (change_template, "the tokenizer"),
        (change_every_weight, "the bytes of the weights"),
        (change_the_last_token, "the bytes of the weights"),
        (narrow, "the names and shapes of the tensors"),
    ],
)
def test_another_model_on_another_host(directory, comm, host, change: Callable, what):
    if host == "host2":
        change(directory)
    smaller, larger = ("host1", "host2") if comm.size == 2 else ("host2", "host1")
    different = f"{smaller} differs from {larger}"
    assert refusal(directory, comm) == (
        f"model MODEL is not the same on all hosts: {different} in {what}; copy one of them to all"
    )


def test_files_that_differ_without_effect(directory, comm, host):
    if host == "host2":
        rename_tensors(directory)
        (directory / "README.md").write_text("of a later day")
    assert open_on_all(directory, comm).config.heads == 12


def test_shards_of_another_conversion(directory, comm, host, tmp_path):
    shards = tmp_path / "shards"
    convert(open_source(directory), shards, comm.size)
    right = "rank 0 of host1 differs from rank 1 of host1, and from host2 in the names and shapes"
    if comm.size == 2:
        right = "host1 differs from host2 in the names and shapes of the tensors; copy"
    assert right in refusal(shards, comm)


def test_ranks_of_one_host(directory, comm, monkeypatch):
    monkeypatch.setattr(MPI, "Get_processor_name", lambda: "host1")
    if comm.rank == 1:
        change_field(directory)
    right = "rank 1 of host1 differs from rank 0 of host1 and rank 2 of host1 in the configuration"
    if comm.size == 2:
        right = "rank 0 of host1 differs from rank 1 of host1 in the configuration"
    assert right in refusal(directory, comm)


def test_a_model_that_one_host_does_not_have(directory, comm, host):
    if host == "host2":
        os.unlink(directory / "model.safetensors")
    sentence = refusal(directory, comm)
    assert sentence.startswith("MODEL has neither model.safetensors nor ")
    assert sentence.endswith("no weights to read (on host2, but not on all)")


def test_a_model_that_no_host_has(directory, comm, host):
    os.unlink(directory / "model.safetensors")
    assert refusal(directory, comm).endswith(": no weights to read")
