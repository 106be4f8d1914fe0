"""Wrong calls and bad input: one sentence each, which says what would be right."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_models import rewrite, write_checkpoint
from tiny_text import write_speaker

from commands.shell import VARIANT, answered, mpishard, refusal, refusal_here
from mpishard.runtime import launch

RUN = "python -m mpishard"


# The number of ranks


def test_ranks_that_tp_does_not_divide(model):
    words = ["generate", model, "--prompt", "it's a", "--tp", "2"]
    message = refusal(3, *words)
    line = f"`mpirun -n 2 {RUN} generate {model} --prompt 'it'\"'\"'s a' --tp 2`"
    assert message == f"--tp 2 does not divide the 3 ranks that were started: run {line}"


def test_under_slurm_the_line_to_type_is_of_srun(model, shards, monkeypatch):
    monkeypatch.setattr(launch, "launcher", lambda: "srun")
    message = refusal_here("generate", model, "--prompt", "a b", "--tp", 3)
    line = f"srun -n 3 mpishard generate {model} --prompt 'a b' --tp 3"
    assert message == f"--tp 3 does not divide the 1 rank that was started: run `{line}`"
    message = refusal_here("generate", shards(4), "--prompt", "a", "--tp", 2, "--dp", 2)
    line = f"srun -n 8 mpishard generate {shards(4)} --prompt a --tp 4 --dp 2"
    assert f"run `{line}`, or make others with `mpishard shard" in message


def test_the_line_to_type_is_right(model):
    """It is typed."""
    message = refusal(1, "generate", model, "--prompt", "a b", "--tp", 3, "--max-tokens", 2)
    before, line, after = message.split("`")
    assert before == "--tp 3 does not divide the 1 rank that was started: run " and after == ""
    mpirun, n, ranks, *program = shlex.split(line)
    assert [mpirun, n, *program[:3]] == ["mpirun", "-n", "python", "-m", "mpishard"]
    finished = mpishard(int(ranks), *program[3:], is_real=True)
    assert finished.returncode == 0, finished.stderr


def test_a_layout_of_other_ranks(model):
    message = refusal(2, "logits", model, "--input", "I", "--output", "O", "--tp", 2, "--dp", 2)
    assert "I cannot be read" in message, "what is cheap to check comes first"
    message = refusal(2, "bench", model, "--tp", 2, "--dp", 2)
    line = f"`mpirun -n 4 {RUN} bench {model} --tp 2 --dp 2`"
    assert message == f"--tp 2 --dp 2 needs 4 ranks but 2 were started: run {line}"


def test_shards_for_other_ranks(shards):
    path = shards(4)
    message = refusal(2, "generate", path, "--prompt", "a", "--tp", 2)
    line = f"`mpirun -n 4 {RUN} generate {path} --prompt a --tp 4`"
    other = f"`mpishard shard {path} OUT --tp 2`"
    assert message == (
        f"{path} holds shards for --tp 4, not for --tp 2: run {line}, or make others with {other}"
    )
    message = refusal_here("generate", path, "--prompt", "a")
    line = f"`mpirun -n 4 mpishard generate {path} --prompt a`"
    assert message == (
        f"{path} holds shards for --tp 4, so the number of ranks must be a multiple of 4, "
        f"not 1: run {line}"
    )
    message = refusal_here("generate", path, "--prompt", "a", "--tensor-parallel-size=2", "--dp=3")
    line = f"mpirun -n 12 mpishard generate {path} --prompt a --tensor-parallel-size=4 --dp=3"
    assert f"run `{line}`" in message
    message = refusal_here("generate", path, "--prompt", "a", "--dp", "2")
    assert f"run `mpirun -n 8 mpishard generate {path} --prompt a --dp 2`" in message


def test_shards_for_another_tp_beside_context_parallelism(shards):
    path = shards(4)
    words = ["generate", path, "--prompt", "a", "--cp", "2", "--tp=2", "--sequence-parallel"]
    line = f"mpirun -n 8 mpishard generate {path} --prompt a --cp 2 --tp=4 --sequence-parallel"
    message = refusal_here(*words)
    assert message.startswith(f"{path} holds shards for --tp 4, not for --tp 2: run `{line}`, or")
    message = refusal_here("bench", path, "--cp=3", "--flash-decoding")
    line = f"mpirun -n 12 mpishard bench {path} --cp=3 --flash-decoding"
    assert message == (
        f"{path} holds shards for --tp 4, so with --cp 3 the number of ranks must be a multiple "
        f"of 12, not 1: run `{line}`"
    )
    message = refusal_here("bench", path, "--cp", "2", "--dp", "3")
    assert message == (
        "--tp 4 --cp 2 --dp 3 needs 24 ranks but 1 was started: "
        f"run `mpirun -n 24 mpishard bench {path} --cp 2 --dp 3`"
    )


def test_the_line_to_type_has_all_that_was_typed(model):
    """It is typed."""
    flags = ["--tp", 2, "--cp", 2, "--dp=1", "--sequence-parallel"]
    flags += ["--cp-prefill", "all-gather", "--cp-order=contiguous", "--decode-merge", "all-reduce"]
    flags += [
        "--cp-kv-cache-interleave-size",
        4,
        "--max-model-len",
        50,
        "--chunked-prefill-size",
        3,
    ]
    flags += ["--compute-dtype", "float64", "--max-tokens", 2, "--json"]
    message = refusal(3, "generate", model, "--prompt", "it's", *flags)
    typed = shlex.join(["generate", str(model), "--prompt", "it's", *map(str, flags)])
    assert message == (
        f"--tp 2 --cp 2 --dp 1 needs 4 ranks but 3 were started: run `mpirun -n 4 {RUN} {typed}`"
    )
    program = shlex.split(message.split("`")[1])
    finished = mpishard(int(program[2]), *program[6:])
    assert finished.returncode == 0, finished.stderr
    assert "--decode-merge all-reduce --cp-kv-cache-interleave-size 4, float64" in finished.stderr


def test_more_ranks_than_query_heads(model, shards):
    for path in (model, shards(2)):
        message = refusal_here("generate", path, "--prompt", "a", "--tp", 9)
        assert message.startswith("--tp 9 is more than the model's 8 query heads")
        assert message.endswith("use --tp 1 to 8")


# How sequences are divided


def test_ranks_that_tp_and_cp_do_not_divide(model):
    message = refusal(5, "bench", model, "--cp", 2, "--tp", 2, "--sequence-parallel")
    line = f"`mpirun -n 4 {RUN} bench {model} --cp 2 --tp 2 --sequence-parallel`"
    assert message == (
        "--tp 2 --cp 2 makes replicas of 4 ranks, which do not divide the 5 ranks that were "
        f"started: run {line}"
    )


@pytest.mark.parametrize(
    "words, sentence",
    [
        (
            "--cp-prefill ring",
            "--cp-prefill ring has no effect with --cp 1: leave it out, or give --cp 2 or more",
        ),
        ("--tp 1 --cp-order contiguous", "--cp-order contiguous has no effect with --cp 1: leave"),
        (
            "--decode-merge all-to-all",
            "--decode-merge all-to-all has no effect where every rank has the whole cache of its "
            "heads: leave it out, or shard the cache with --flash-decoding or --cp 2",
        ),
        (
            "--tp 2 --cp-kv-cache-interleave-size 2 --sequence-parallel",
            "--cp-kv-cache-interleave-size 2 has no effect where every",
        ),
        ("--flash-decoding --cp-order zigzag", "but with --tp 1 and 4 key/value heads none do"),
        ("--cp 2 --flash-decoding", "give --tp 5 to 8, or shard the cache with --cp 2"),
        ("--sequence-parallel", "--sequence-parallel has no effect with --tp 1: leave it out, or"),
        ("--cp-prefill rong --cp 2", "argument --cp-prefill: invalid choice: 'rong' (choose from"),
        ("--tp 9 --cp 2", "--tp 9 is more than the model's 8 query heads"),
    ],
)
def test_flags_that_would_be_ignored(model, words, sentence):
    assert sentence in refusal_here("generate", model, "--prompt", "a", *words.split())


def test_flags_that_would_be_ignored_on_several_ranks(model, shards):
    words = ["--prompt", "a", "--cp-order", "contiguous"]
    for path in (model, shards(2)):
        message = refusal(2, "generate", path, *words)
        assert message.startswith("--cp-order contiguous has no effect with --cp 1")


def test_flash_decoding_without_grouped_heads(tmp_path):
    bare = write_checkpoint("llama-mha", tmp_path / "bare")
    out = tmp_path / "shards"
    answered(None, "shard", bare, out, "--tp", 2)
    for path in (bare, out):
        message = refusal(2, "bench", path, "--tp", 2, "--flash-decoding")
        assert message == (
            "--flash-decoding shards the cache over ranks of --tp that share a key/value head, "
            "but with 8 query heads and 8 key/value heads no --tp makes any share one: leave it "
            "out, or shard the cache with --cp 2"
        )


# What was typed


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--temperature -1", "temperature -1.0 is out of range: it must be 0 (greedy) or at"),
        ("--temperature inf", "temperature inf is out of range"),
        ("--top-k -2", "top_k -2 is out of range"),
        ("--top-p -0.1", "top_p -0.1 is out of range: it must be 0 to 1"),
        ("--top-p 1.01", "top_p 1.01 is out of range"),
        ("--min-p 2", "min_p 2.0 is out of range: it must be 0 to 1"),
        ("--seed -2", "seed -2 is out of range: it must be 0 to 2**64 - 1"),
        ("--repetition-penalty 0", "repetition_penalty 0.0 is out of range: it must be 1e-6 to"),
        ("--presence-penalty 3", "presence_penalty 3.0 is out of range: it must be -2 to 2"),
        ("--frequency-penalty -3", "frequency_penalty -3.0 is out of range: it must be -2 to 2"),
        ("--logit-bias 5", "argument --logit-bias: '5' is not a token id and a number, such as"),
        ("--logit-bias a=5", "argument --logit-bias: 'a' is not a whole number"),
        ("--logit-bias 5=b", "argument --logit-bias: 'b' is not a number"),
        ("--logit-bias 5=200", "a logit_bias of 200.0 is out of range: it must be -100 to 100"),
        ("--logit-bias 67=1", "logit_bias has token id 67, but the model's ids are 0 to 66"),
        ("--logprobs 2", "--logprobs 2 has no effect without --json: give both"),
        ("--logprobs 21 --json", "logprobs 21 is out of range"),
        ("--n 0", "argument --n: 0 must be at least 1"),
        ("--n 129", "n 129 is out of range: it must be 1 to 128"),
        ("--seed 18446744073709551616", "seed 18446744073709551616 is out of range"),
        ("--stop=", "--stop '' is empty"),
        ("--cp 0", "argument --cp/--context-parallel-size: 0 must be at least 1"),
        ("--chunked-prefill-size 0", "argument --chunked-prefill-size: 0 must be at least 1"),
        ("--max-model-len -1", "argument --max-model-len: -1 must be at least 1"),
        ("--max-model-len 9999999999", "max_model_len 9999999999 must be 1 to 2147483647"),
    ],
)
def test_options_out_of_range(model, words, sentence):
    assert sentence in refusal_here("generate", model, "--prompt", "a", *words.split())


def test_a_wrong_call_on_several_ranks(model):
    assert refusal(3, "generate", model) == (
        "a prompt is required: --prompt TEXT or --prompt-file FILE; see `mpishard generate --help`"
    )


def test_help_is_printed_once():
    finished = mpishard(3, "generate", "--help")
    assert finished.returncode == 0 and finished.stderr == ""
    assert finished.stdout.count("usage: mpishard generate") == 1


# Prompts


@pytest.mark.parametrize(
    "prompts, sentence",
    [
        (["a", ""], "prompt 2 is empty: it has no token, and at least one is needed"),
        (
            ["a" * 65],
            "prompt 1 has 65 tokens, but the model has only 64 positions; "
            "shorten it, or allow more with --max-model-len",
        ),
        (["a", "\udcff"], "is not valid text: character 0 is no character of Unicode"),
    ],
)
def test_prompts_that_cannot_be_completed(model, prompts, sentence):
    assert sentence in refusal_here("generate", model, *(f"--prompt={one}" for one in prompts))


def test_an_empty_prompt_on_several_ranks(model):
    message = refusal(4, "generate", model, "--prompt", "a", "--prompt", "", "--tp", 2)
    assert message.startswith("prompt 2 is empty")


def test_a_model_that_cannot_speak(model, tmp_path):
    bare = write_checkpoint("llama-mha", tmp_path / "bare")
    message = refusal(2, "generate", bare, "--prompt", "a", "--tp", 2)
    assert message.startswith(f"{bare}/tokenizer.json does not exist: text needs the model's")
    shutil.copy(model / "tokenizer.json", bare)
    message = refusal_here("generate", bare, "--prompt", "a", "--chat")
    assert message.startswith(f"a chat needs a chat template, but {bare} has neither")


# Models


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkpoint of two files, to be damaged."""
    return write_checkpoint("llama-mha", tmp_path / "model", shards=2)


def test_a_model_that_is_not_there(tmp_path):
    message = refusal(4, "generate", tmp_path / "none", "--prompt", "a")
    assert message.startswith(f"model {tmp_path}/none does not exist: give a local Hugging Face")
    (tmp_path / "file").touch()
    assert "file is not a directory" in refusal_here("inspect", tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "has neither config.json" in refusal_here("inspect", tmp_path / "empty")


def test_a_safetensors_file_that_is_missing_or_cut_short(copy):
    file = copy / "model-00002-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 10)
    message = refusal(2, "generate", copy, "--prompt", "a")
    assert message.startswith(f"{file} (") and "is truncated or damaged" in message
    file.unlink()
    assert refusal_here("inspect", copy).startswith(f"{file} is missing")


NORM = "model.norm.weight"


def test_a_tensor_that_is_missing_or_misshapen(copy):
    file = copy / "model-00002-of-00002.safetensors"
    rewrite(file, lambda tensors: tensors.update({NORM: np.ones(47, np.float32)}))
    message = refusal(2, "generate", copy, "--prompt", "a")
    assert f"{NORM} has shape (47,), but config.json calls for (48,)" in message
    rewrite(file, lambda tensors: tensors.pop(NORM))
    assert f"lacks {NORM}" in refusal_here("inspect", copy)


@pytest.mark.parametrize(
    "ranks, how",
    [
        (1, ""),
        (2, "--tp 2 --temperature 1 --top-p 0.9"),
        (4, "--tp 2 --cp 2 --temperature 1 --top-k 5"),
        (4, "--tp 2 --dp 2"),
    ],
)
def test_weights_that_are_not_numbers(tmp_path, ranks, how):
    """Found when there is no token to choose: no rank waits for one that has noticed."""
    model = write_speaker(VARIANT, tmp_path / "model")
    file = model / "model.safetensors"
    rewrite(file, lambda tensors: tensors[NORM].put(3, np.nan))
    prompts = ["--prompt", "a", "--prompt", "b", "--max-tokens", 3]
    message = refusal(ranks, "generate", model, *prompts, *how.split())
    start = r"(rank \d of \d: )?prompt [12] has no answer: its logits for position \d+ are infinite"
    assert re.match(start, message), message
    assert f"{file}: {NORM} has values" in refusal_here("inspect", model, "--verify")


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"architectures": ["NoSuchForCausalLM"], "model_type": "no_such"}, "NoSuchForCausalLM"),
        ({"rope_scaling": {"type": "no_such"}}, "no_such"),
        ({"hidden_act": "swish_squared"}, "swish_squared"),
        ({"num_attention_heads": "eight"}, "num_attention_heads"),
    ],
)
def test_a_configuration_that_is_not_implemented(copy, change, sentence):
    file = copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    message = refusal_here("generate", copy, "--prompt", "a")
    assert str(file) in message and sentence in message


def test_malformed_json(copy):
    (copy / "config.json").write_text('{"vocab_size": 61,\n "x": }')
    message = refusal(2, "generate", copy, "--prompt", "a")
    assert message == (f"{copy}/config.json is not valid JSON: Expecting value at line 2, column 7")
