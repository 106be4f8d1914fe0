"""The trained models of data/, as the README shows them: from the checkpoint and from shards, alone
and on several ranks, they write what the oracle writes, and that can be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from commands.shell import answered, completions
from mpishard.reference import Reference
from mpishard.storage.checkpoint import Checkpoint
from mpishard.tokenizer import Tokenizer

DATA = Path(__file__).parents[2] / "data"
MODEL, MIXTURE = DATA / "cpython-4m", DATA / "cpython-moe-7m"
PROMPTS = ["def read(self", "The module provides"]
MANY = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
TOKENS = 16


@pytest.fixture(scope="module")
def right() -> list[list[int]]:
    """The oracle's greedy continuations."""
    return continuations(MODEL)


def continuations(model: Path) -> list[list[int]]:
    checkpoint, text = Checkpoint.open(model), Tokenizer(model)
    weights = {name: np.array(array.map()) for name, array in checkpoint.arrays.items()}
    oracle = Reference(checkpoint.config, weights, np.float32)
    return [oracle.greedy(text.encode(prompt), TOKENS) for prompt in PROMPTS]


def check(answers: list[dict], right: list[list[int]]) -> None:
    for answer, ids in zip(answers, right, strict=True):
        length = answer["completion_tokens"]
        assert answer["output_ids"] == ids[:length]
        assert length == TOKENS or answer["finish_reason"] == "stop"
        letters = sum(letter.isalpha() or letter.isspace() for letter in answer["text"])
        assert letters > len(answer["text"]) / 2 > TOKENS / 2


@pytest.mark.parametrize("tp, dp", [(1, 1), (2, 2), (3, 1)])
def test_the_checkpoint_answers(right, tp, dp):
    check(completions(tp * dp, MODEL, *MANY, "--max-tokens", TOKENS, "--tp", tp), right)


def test_its_shards_answer_the_same(right, tmp_path):
    answered(2, "shard", MODEL, tmp_path / "tp4", "--tp", 4, "--dtype", "bfloat16")
    answered(2, "shard", tmp_path / "tp4", tmp_path / "tp2", "--tp", 2)
    for tp in (4, 2):
        check(completions(tp, tmp_path / f"tp{tp}", *MANY, "--max-tokens", TOKENS), right)


def test_it_can_be_talked_to():
    words = ["--prompt", "What is a generator?", "--chat", "--max-tokens", 12]
    said = answered(2, "generate", MODEL, *words, "--tp", 2)
    assert said == completions(None, MODEL, *words)[0]["text"] + "\n"


def test_the_mixture_answers_from_its_checkpoint_and_from_shards(tmp_path):
    right = continuations(MIXTURE)
    asked = [*MANY, "--max-tokens", TOKENS]
    check(completions(None, MIXTURE, *asked), right)
    check(completions(4, MIXTURE, *asked, "--tp", 2, "--ep", 4), right)
    answered(2, "shard", MIXTURE, tmp_path / "shards", "--tp", 2, "--ep", 4)
    check(completions(4, tmp_path / "shards", *asked), right)
