"""``mpishard generate``: the same text from every layout and every way to store the weights."""

from __future__ import annotations

import os
import subprocess
import threading
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI
from mpi_runner import Launch
from tiny_models import tiny_config, tiny_weights

from commands.shell import VARIANT, answered, completions, mpishard, refusal
from mpishard.cli import run_command
from mpishard.commands import generate
from mpishard.communication.group import CallTracker
from mpishard.model import Decoder
from mpishard.reference import Reference
from mpishard.sequences.step import Step
from mpishard.tokenizer import IncrementalDetokenizer, Tokenizer

PROMPTS = ["the in", "def on(a):\n", "é", "a man, a plan", "0123"]
MANY = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
GREEDY = ["--max-tokens", "24"]
SAMPLED = [*GREEDY, "--temperature", "1.3", "--top-p", "0.9", "--top-k", "40", "--seed", "7"]
PURE = [*GREEDY, "--temperature", "0.9", "--seed", "18446744073709551615"]


@pytest.fixture(scope="module")
def expected(model: Path):
    """The answers of one rank to `PROMPTS`, for each way to choose tokens."""

    @cache
    def of(*how: str) -> list[dict]:
        return completions(None, model, *MANY, *how)

    return of


def test_greedy_answers_are_those_of_the_oracle(model, expected):
    oracle, text = Reference(tiny_config(VARIANT), tiny_weights(VARIANT)), Tokenizer(model)
    for place, (prompt, answer) in enumerate(zip(PROMPTS, expected(*GREEDY), strict=True)):
        ids = text.encode(prompt)
        right = oracle.greedy(ids, 24)
        ends = right.index(2) + 1 if 2 in right else 24
        growing = IncrementalDetokenizer(text, ids)
        growing.update(right[:ends])
        growing.flush()
        assert answer == {
            "id": place,
            "prompt": prompt,
            "text": str(growing),
            "output_ids": right[:ends],
            "finish_reason": "stop" if ends < 24 or right[-1] == 2 else "length",
            "prompt_tokens": len(ids),
            "completion_tokens": ends,
        }


@pytest.mark.parametrize("tp, dp", [(2, 1), (1, 3), (4, 1), (2, 2), (8, 1), (4, 2)])
def test_every_layout_gives_the_same_greedy_answers(model, expected, tp, dp):
    answers = completions(tp * dp, model, *MANY, *GREEDY, "--tp", tp)  # dp is what is left
    assert answers == expected(*GREEDY)


@pytest.mark.parametrize("tp, dp", [(1, 2), (3, 1), (2, 2), (8, 1)])
def test_every_layout_draws_the_same_random_numbers(model, expected, tp, dp):
    answers = completions(tp * dp, model, *MANY, *SAMPLED, "--dp", dp, "--tp", tp)
    assert answers == expected(*SAMPLED) != expected(*GREEDY)


@pytest.mark.parametrize("tp, dp", [(3, 1), (2, 4)])
def test_every_layout_draws_the_same_from_the_whole_softmax(model, expected, tp, dp):
    answers = completions(tp * dp, model, *MANY, *PURE, "--tp", tp)
    assert answers == expected(*PURE) != expected(*SAMPLED)


@pytest.mark.parametrize("tp, dp", [(8, 1), (2, 2), (3, 1)])
def test_shards_and_shards_of_shards_give_the_same_answers(shards, expected, tp, dp):
    """Without --tp: the shards say what they were made for."""
    assert completions(tp * dp, shards(tp), *MANY, *SAMPLED) == expected(*SAMPLED)


LONG = {  # ways to divide long sequences, and their ranks
    "--cp 2": 2,
    "--tp 2 --cp 2": 4,
    "--tp 6 --flash-decoding --chunked-prefill-size 5": 6,  # two of four key/value heads
    "--tp 3 --sequence-parallel": 3,
    "--tp 8 --flash-decoding --decode-merge all-to-all --cp-kv-cache-interleave-size 2": 8,
    "--tp 5 --flash-decoding --sequence-parallel": 5,  # only one is shared
    "--cp 3 --cp-prefill all-gather --cp-order contiguous --dp 2": 6,
    "--cp 2 --tp 2 --dp 2 --sequence-parallel --decode-merge all-reduce "
    "--chunked-prefill-size 3": 8,
    "--context-parallel-size 3 --kv-interleave 4 --prefill-chunk 1 --max-positions 60": 3,
    "--data-parallel-size 1 --tensor-parallel-size 2 --context-parallel-size=2": 4,
}


@pytest.mark.parametrize("words, n", LONG.items(), ids=LONG)
def test_every_way_to_divide_sequences_gives_the_same_greedy_answers(model, expected, words, n):
    assert completions(n, model, *MANY, *GREEDY, *words.split()) == expected(*GREEDY)


@pytest.mark.parametrize(
    "n, words",
    [
        (4, "--tp 2 --cp 2 --sequence-parallel"),
        (3, "--cp 3 --chunked-prefill-size 2"),
    ],
)
def test_every_way_to_divide_sequences_draws_the_same_random_numbers(model, expected, n, words):
    assert completions(n, model, *MANY, *SAMPLED, *words.split()) == expected(*SAMPLED)


@pytest.mark.parametrize(
    "tp, n, words",
    [
        (2, 4, "--cp 2"),
        (2, 8, "--cp 2 --tp 2 --sequence-parallel"),
        (8, 8, "--flash-decoding --sequence-parallel"),
    ],
)
def test_context_parallel_ranks_read_the_same_shards(shards, expected, tp, n, words):
    assert completions(n, shards(tp), *MANY, *PURE, *words.split()) == expected(*PURE)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_prompts_may_be_taken_in_by_pieces(model, expected, chunk):
    assert completions(None, model, *MANY, *SAMPLED, "--chunked-prefill-size", chunk) == expected(
        *SAMPLED
    )


def test_a_step_takes_in_no_more_of_a_prompt_than_a_piece(model, monkeypatch, capfd):
    fed: list[int] = []
    forward = Decoder.forward

    def counting(decoder: Decoder, step: Step) -> np.ndarray:
        fed.append(len(step.ids_N))
        return forward(decoder, step)

    monkeypatch.setattr(Decoder, "forward", counting)
    for chunk, steps in ((3, [3, 3, 2, 1]), (8, [8, 1]), (None, [8, 1])):
        how = ["--prompt", "a" * 8, "--max-tokens", "2", "--ignore-eos"]
        how += [] if chunk is None else ["--chunked-prefill-size", str(chunk)]
        with ExitStack() as job:
            run_command(["mpishard", "generate", str(model), *how], MPI.COMM_SELF, job)
        assert fed == steps
        fed.clear()
    assert len(set(capfd.readouterr().out.splitlines())) == 1


@pytest.mark.parametrize(
    "n, words", [(None, ""), (2, "--cp 2"), (2, "--tp 2 --chunked-prefill-size 7")]
)
def test_positions_can_be_added(model, n, words):
    """The configuration has 64 of them."""
    how = ["--prompt", "a" * 70, "--max-tokens", 40, "--ignore-eos", "--max-model-len", 90]
    (answer,) = completions(n, model, *how, *words.split())
    ids = Tokenizer(model).encode("a" * 70)
    oracle = Reference(tiny_config(VARIANT), tiny_weights(VARIANT))
    assert answer["output_ids"] == oracle.greedy(ids, 21)
    assert answer["prompt_tokens"] == 70 and answer["finish_reason"] == "length"


def test_double_precision_gives_the_same_answers(model, expected):
    double = completions(2, model, *MANY, *GREEDY, "--tp", 2, "--compute-dtype", "float64")
    assert double == expected(*GREEDY)


def test_other_seeds_give_other_answers(model, expected):
    other = completions(None, model, *MANY, *SAMPLED[:-1], "8")
    assert [answer["text"] for answer in other] != [a["text"] for a in expected(*SAMPLED)]


def test_one_answer_does_not_depend_on_the_others(model, expected):
    """Greedy, since the random numbers belong to the place of a prompt among all."""
    alone = completions(None, model, "--prompt", PROMPTS[3], *GREEDY)[0]
    assert {**alone, "id": 3} == expected(*GREEDY)[3]


def test_several_prompts_are_printed_in_their_order(model, expected):
    out = answered(2, "generate", model, *MANY, *GREEDY)
    answers = expected(*GREEDY)
    assert out == "".join(f"=== {answer['prompt']}\n{answer['text']}\n\n" for answer in answers)


@pytest.mark.parametrize("place, n", [(0, None), (2, 2), (4, 3)])
def test_the_text_of_one_prompt_is_streamed(model, expected, place, n):
    finished = mpishard(n, "generate", model, "--prompt", PROMPTS[place], *GREEDY, "--tp", n or 1)
    assert finished.stdout == expected(*GREEDY)[place]["text"] + "\n"
    layout, summary = finished.stderr.splitlines()
    assert f"--tp {n or 1} --dp 1" in layout and "threads per rank: 1" in layout
    for part in ("prefill: ", "decode: ", " tokens/s", "communication: ", "peak memory: "):
        assert part in summary


@pytest.mark.parametrize(
    "n, words",
    [
        (5, "--tp 5 --dp 1 --sequence-parallel --flash-decoding"),
        (6, "--tp 1 --cp 3 --dp 2 --cp-prefill all-gather --decode-merge all-reduce"),
    ],
)
def test_streamed_text_is_printed_once_by_all_that_make_it(model, expected, n, words):
    how = ["--prompt", PROMPTS[1], *GREEDY, *words.split(), "--chunked-prefill-size", 2]
    finished = mpishard(n, "generate", model, *how)
    assert finished.stdout == expected(*GREEDY)[1]["text"] + "\n"
    layout, summary = finished.stderr.splitlines()
    assert f"{model}: {words}, float32, threads per rank: 1" in layout
    prompt = expected(*GREEDY)[1]["prompt_tokens"]
    assert f"prefill: {prompt} tokens" in summary, "counted once, however many compute them"


def test_the_summary_counts_the_tokens_of_all_replicas(model, expected):
    answers = expected(*GREEDY)
    prompt = sum(answer["prompt_tokens"] for answer in answers)
    generated = sum(answer["completion_tokens"] - 1 for answer in answers)  # the first is prompt's
    for n in (None, 3):
        summary = mpishard(n, "generate", model, *MANY, *GREEDY).stderr.splitlines()[-1]
        assert f"prefill: {prompt} tokens" in summary
        assert f"decode: {generated} tokens" in summary


def test_stop_strings_end_the_text_before_them(model, expected):
    whole = expected(*SAMPLED)[0]["text"]
    stop = whole[5:8]
    how = [*SAMPLED, "--stop", "never so", "--stop", stop]
    answer = completions(2, model, "--prompt", PROMPTS[0], *how, "--tp", 2)[0]
    assert answer["text"] == whole[: whole.index(stop)]
    assert answer["finish_reason"] == "stop"
    assert answer["completion_tokens"] < 24
    assert answered(None, "generate", model, "--prompt", PROMPTS[0], *how) == answer["text"] + "\n"


def test_an_end_of_sequence_token_ends_the_answer_unless_ignored(model):
    how = ["--prompt", "s", "--max-tokens", "60", "--temperature", "1", "--seed"]
    seeds = {seed: completions(None, model, *how, seed)[0] for seed in (1, 2)}
    ended = {seed: answer for seed, answer in seeds.items() if answer["finish_reason"] == "stop"}
    assert ended, "one of these is to meet the end"
    seed, answer = ended.popitem()
    assert answer["output_ids"][-1] == 2 and 2 not in answer["output_ids"][:-1]
    longer = completions(None, model, *how, seed, "--ignore-eos")[0]
    length = answer["completion_tokens"]
    assert longer["output_ids"][:length] == answer["output_ids"]
    assert longer["completion_tokens"] > length


def test_an_answer_ends_where_the_positions_end(model):
    answer = completions(None, model, "--prompt", "a" * 60, "--max-tokens", 10**30)[0]
    assert answer["prompt_tokens"] == 60
    assert answer["finish_reason"] == "length"
    assert answer["completion_tokens"] == 5, "of 64 positions, the last token needs none"


def test_the_chat_template_is_applied(model):
    how = ["--prompt", "hi", "--chat", *GREEDY]
    answer = completions(2, model, *how, "--tp", 2)[0]
    typed = completions(None, model, "--prompt", "<s>user: hi\nassistant:", *GREEDY)[0]
    assert answer["text"] == typed["text"]
    assert answer["prompt_tokens"] == typed["prompt_tokens"]
    assert answer["prompt"] == "hi"


# The mpirun of Open MPI 5.0.11 passes no standard input on: openpmix/prrte issue 2373.
PASSES_STDIN = MPI.get_vendor()[0] != "Open MPI"


def test_standard_input_is_a_prompt(model, expected):
    n = 3 if PASSES_STDIN else None
    words = ["--prompt", "the in", "--prompt", "-", *GREEDY, "--tp", n or 1]
    answers = completions(n, model, *words, input=PROMPTS[1])
    assert answers[1] == expected(*GREEDY)[1]


def test_standard_input_that_does_not_come_is_not_awaited_in_silence(monkeypatch, capfd):
    end, start = os.pipe()

    def send() -> None:
        os.write(start, b"late")
        os.close(start)

    monkeypatch.setattr(generate, "STDIN_PATIENCE", 0.1)
    with open(end) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        threading.Timer(1, send).start()
        given = [("--prompt", "a"), ("--prompt", "-")]
        assert generate.read_prompts(given, MPI.COMM_SELF, CallTracker()) == ["a", "late"]
    assert capfd.readouterr().err.startswith("--prompt -: waiting for standard input")


def test_standard_input_that_is_no_text(model, tmp_path):
    (tmp_path / "noise").write_bytes(b"abc\xff")
    n, pipe = 2 if PASSES_STDIN else None, subprocess.PIPE
    words = ["-m", "mpishard", "generate", model, "--prompt", "-"]
    with (
        (tmp_path / "noise").open() as noise,
        Launch(n, words, stdin=noise, stdout=pipe, stderr=pipe) as job,
    ):
        _, err = job.process.communicate(timeout=30)
    assert job.process.returncode == 2
    assert "mpishard: error: --prompt -: standard input is not UTF-8 text" in err
    assert "invalid start byte at byte 3" in err


def test_standard_input_can_be_read_once(model):
    message = refusal(2, "generate", model, "--prompt", "-", "--prompt", "-", input="a")
    assert "--prompt - is given twice" in message
