"""Mixtures of experts from the command line: the same text from every way to divide the experts,
and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import write_checkpoint
from tiny_text import write_speaker

from commands.shell import answered, completions, refusal, refusal_here

VARIANT = "mixtral-full"  # 6 experts of width 19, 8 query and 4 key/value heads
ASKED = ["--prompt", "the in", "--prompt", "def on(a):\n", "--prompt", "é", "--max-tokens", "12"]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with a tokenizer."""
    return write_speaker(VARIANT, tmp_path_factory.mktemp("mixture"))


def test_answers_do_not_depend_on_who_has_which_expert(mixture, tmp_path):
    expected = completions(None, mixture, *ASKED)
    shards = tmp_path / "shards"
    answered(None, "shard", mixture, shards, "--tp", 2, "--ep", 4)
    again, context = tmp_path / "again", tmp_path / "context"
    answered(None, "shard", shards, again, "--tp", 1, "--ep", 3)
    answered(None, "shard", again, context, "--tp", 1, "--ep", 2, "--cp", 4)
    answered(None, "inspect", again, "--verify")
    for n, source, how in (
        (2, mixture, "--tp 2 --ep 2"),
        (2, mixture, "--tp 2 --expert-dispatch gather"),
        (3, mixture, "--dp 3 --expert-parallel-size 3"),
        (4, mixture, "--tp 2 --cp 2 --ep 2 --sequence-parallel"),
        (4, mixture, "--tp 2 --dp 2 --ep 4"),
        (4, shards, "--dp 2"),
        (3, again, ""),
        (4, context, "--cp 4"),
    ):
        assert completions(n, source, *ASKED, *how.split()) == expected, how


def test_experts_stored_together_are_the_same(mixture, tmp_path):
    together = write_checkpoint(VARIANT, tmp_path / "stacked", stacked=True)
    (together / "tokenizer.json").write_bytes((mixture / "tokenizer.json").read_bytes())
    expected = completions(None, mixture, *ASKED)
    assert completions(2, together, *ASKED, "--tp", 1, "--ep", 2, "--dp", 2) == expected


def test_bench_takes_mixtures(mixture):
    how = "--tp 2 --ep 2 --prompt-tokens 8 --max-tokens 2 --batch 2 --repeat 1".split()
    assert "all_to_all" in answered(2, "bench", mixture, *how)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--ep 7", "--ep 7 must be 1 to the model's 6 experts: a rank without an expert"),
        ("--ep 2", "--ep 2 does not divide --tp 1 --dp 1: it must divide the 1 ranks of a replica"),
    ],
)
def test_experts_that_cannot_be_divided_so(mixture, flags, sentence):
    assert sentence in refusal_here("generate", mixture, "--prompt", "a", *flags.split())


def test_ranks_that_do_not_fit_the_experts(mixture):
    sentence = refusal(4, "generate", mixture, "--prompt", "a", "--tp", 4, "--ep", 3)
    assert sentence.endswith("use --ep 1 or 2 or 4")


def test_switches_of_experts_have_no_effect_on_a_dense_model(model):
    for flags in ("--ep 1", "--expert-dispatch gather"):
        sentence = refusal_here("generate", model, "--prompt", "a", *flags.split())
        assert sentence == f"{flags} has no effect on a model without experts: leave it out"


@pytest.mark.parametrize("variant", ["gpt_oss-yarn", "deepseek_v2-lite", "deepseek_v3-groups"])
def test_sinks_and_latents_on_any_ranks(variant, tmp_path):
    """Caches divided over the ranks, too, which merge what the sinks take their part of."""
    speaker, shards = write_speaker(variant, tmp_path / "model"), tmp_path / "shards"
    expected = completions(None, speaker, *ASKED)
    answered(2, "shard", speaker, shards, "--tp", 4, "--ep", 2)
    answered(None, "inspect", shards, "--verify")
    for n, source, how in (
        (2, speaker, "--cp 2 --ep 2 --prefill-chunk 3"),
        (3, speaker, "--tp 3 --sequence-parallel"),
        (4, shards, "--flash-decoding" if "deepseek" in variant else ""),
        (4, speaker, "--tp 2 --cp 2 --ep 4 --cp-prefill all-gather --decode-merge all-reduce"),
    ):
        assert completions(n, source, *ASKED, *how.split()) == expected, how
