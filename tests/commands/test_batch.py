"""``mpishard batch``: every line answered in its place, by whatever layout, whatever runs beside
it; and nothing lost or doubled, however the job is ended on its way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from mpi4py import MPI
from mpi_runner import Launch, run_mpi
from tiny_models import rewrite, write_checkpoint
from tiny_text import write_speaker

from commands.shell import answered, completions, mpishard, refusal, refusal_here
from mpishard import SamplingParams, load
from mpishard.batch.job import BatchJob
from mpishard.cli import run_command
from mpishard.commands import batch, common
from mpishard.errors import UserError
from mpishard.tokenizer import Tokenizer

SMALL = Path(__file__).parents[2] / "data" / "cpython-4m"
PROMPTS = ["the in", "def on(a):\n", "é", "a man, a plan", "0123", "re", "s = (1, 2)", "on the in"]
GREEDY = ["--max-tokens", "11"]
SAMPLED = [*GREEDY, "--temperature", "1.3", "--top-p", "0.9", "--top-k", "40", "--seed", "7"]
NARROW = ["--max-num-seqs", "2", "--max-num-batched-tokens", "5"]


class Job:
    """A batch in a directory of its own."""

    def __init__(self, directory: Path, lines: list[Any]) -> None:
        self.source, self.target = directory / "in.jsonl", directory / "out.jsonl"
        self.journal = directory / "out.jsonl.journal"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        self.source.write_text("".join(f"{text}\n" for text in texts))
        self.files = ["--input", self.source, "--output", self.target]

    def run(self, n: int | None, *words: object) -> list[dict[str, Any]]:
        """The answers of a job that succeeds; its files are taken away, for another."""
        assert answered(n, "batch", *words, *self.files) == ""
        return self.result()

    def here(self, *words: object) -> list[dict[str, Any]]:
        """The same, in this process."""
        command = ["mpishard", "batch", *map(str, [*words, *self.files])]
        with ExitStack() as job:
            run_command(command, MPI.COMM_SELF, job)
        return self.result()

    def result(self) -> list[dict[str, Any]]:
        assert not self.journal.exists()
        lines = self.target.read_text().split("\n")
        self.target.unlink()
        assert sorted(self.source.parent.iterdir()) == [self.source] and lines.pop() == ""
        return [json.loads(line) for line in lines]

    def finished(self) -> dict[int, str]:
        """What the journal has, by the place in the input; no place twice."""
        lines = [line.split(" ", 2) for line in self.journal.read_text().split("\n")[1:-1]]
        places = {int(place): answer for _, place, answer in lines}
        assert len(places) == len(lines)
        return places


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Job]:
    """Makes a job of some lines."""
    return lambda *lines: Job(tmp_path, list(lines))


@pytest.fixture(autouse=True)
def _signals():
    """Commands that run in this process hear signals; afterwards it does what it did before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def asked(prompts: list[str] = PROMPTS) -> list[dict[str, Any]]:
    return [{"id": place, "prompt": prompt} for place, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def expected(model: Path):
    """What ``mpishard generate`` answers to `PROMPTS`."""

    @cache
    def of(*how: str) -> list[dict]:
        words = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
        return completions(None, model, *words, *how)

    return of


# The same answers


LAYOUTS = {
    "": None,
    "--dp 2": 2,
    "--dp 3 --chunked-prefill-size 2": 3,
    "--tp 3": 3,
    "--tp 2 --dp 2 --sequence-parallel": 4,
    "--cp 2 --tp 2": 4,
    "--cp 3 --cp-kv-cache-interleave-size 4": 3,
    "--tp 8 --flash-decoding": 8,
    "--tp 2 --cp 2 --dp 2 --sequence-parallel": 8,
}


@pytest.mark.parametrize("layout, n", LAYOUTS.items(), ids=LAYOUTS)
def test_every_layout_answers_as_generate_does(model, job, expected, layout, n):
    """More requests than places, and prompts of more tokens than a step has."""
    work = job(*asked())
    for how in (GREEDY, SAMPLED):
        assert work.run(n, model, *how, *NARROW, *layout.split()) == expected(*how)


def test_with_room_for_all_the_answers_are_the_same(model, job, expected):
    work = job(*asked())
    assert work.run(2, model, *SAMPLED, "--dp", 2) == expected(*SAMPLED)
    assert work.here(model, *SAMPLED, "--kv-cache-memory-bytes", "1 GiB") == expected(*SAMPLED)


@pytest.mark.parametrize(
    "n, layout",
    [(2, "--tp 2 --ep 2"), (3, "--dp 3 --ep 3"), (4, "--tp 2 --dp 2 --ep 4"), (4, "--dp 4 --ep 2")],
)
def test_mixtures_whose_replicas_step_together(job, tmp_path_factory, n, layout):
    mixture = write_speaker("mixtral-full", tmp_path_factory.mktemp("mixture"))
    work = job(*asked())
    for how in (GREEDY, SAMPLED):
        alone = work.run(None, mixture, *how)
        assert work.run(n, mixture, *how, *NARROW, *layout.split()) == alone


def test_a_line_has_its_own_sampling(model, job, expected):
    """The seed's random numbers belong to the place of the line."""
    own = {"temperature": 1.3, "top_p": 0.9, "top_k": 40, "seed": 7, "max_tokens": 11}
    lines = [{**line, **own} if line["id"] % 2 else line for line in asked()]
    lines[4] |= {"max_tokens": 2}
    lines[6] |= {"stop": [expected(*GREEDY)[6]["text"][3:5]]}
    answers = job(*lines).run(2, model, *GREEDY, "--dp", 2)
    for place in (1, 3, 5, 7):
        assert answers[place] == expected(*SAMPLED)[place]
    for place in (0, 2):
        assert answers[place] == expected(*GREEDY)[place]
    assert answers[4]["output_ids"] == expected(*GREEDY)[4]["output_ids"][:2]
    whole = expected(*GREEDY)[6]["text"]
    assert answers[6]["text"] == whole[: whole.index(lines[6]["stop"][0])]
    assert answers[6]["finish_reason"] == "stop"


def test_one_can_chat_and_give_ids(model, job):
    (right,) = completions(None, model, "--prompt", "hi", "--chat", *GREEDY)
    say = {"messages": [{"role": "user", "content": "hi"}]}
    openai = {"custom_id": "c", "url": "/v1/chat/completions", "body": say}
    (plain, ids, formal) = job({"id": 0, "prompt": "hi"}, {"id": 1, "input_ids": [1]}, openai).here(
        model, "--chat", *GREEDY
    )
    assert plain == right
    assert ids["error"].endswith("line 2: a chat needs the text that opens it, not token ids; "
                                 "omit --chat")  # fmt: skip
    choice = formal["response"]["body"]["choices"][0]
    assert choice["message"]["content"] == right["text"]
    ids = Tokenizer(model).encode("hi")
    (given,) = job({"id": 0, "input_ids": ids}).here(model, *GREEDY)
    assert given == {**completions(None, model, "--prompt", "hi", *GREEDY)[0], "prompt": ids}


def test_python_can_chat(model, tmp_path):
    (right,) = completions(None, model, "--prompt", "hi", "--chat", "--max-tokens", 3)
    lines, answers = tmp_path / "lines.jsonl", tmp_path / "answers.jsonl"
    lines.write_text('{"id": 0, "prompt": "hi"}\n')
    params = SamplingParams(max_tokens=3)
    load(model, MPI.COMM_SELF).batch(lines, answers, params, chat=True)
    assert json.loads(answers.read_text()) == right


def test_damaged_lines_are_answered_in_their_place(model, job, expected, capfd):
    long = {"id": "long", "input_ids": [1] * 65}
    damaged: list[Any] = [
        ("{", "line 3 is not valid JSON"),
        ('"text"', 'line 4 must be an object with an "id"'),
        ({"id": "a", "prompt": ""}, "line 5: the prompt is empty: it has no token"),
        (
            {"id": "b", "input_ids": [67]},
            "line 6: the prompt has token id 67, but the model's",
        ),
        (long, "line 7: the prompt has 65 tokens, but the model has only 64 positions; "),
        ({"id": "c", "prompt": "\ud800"}, "line 8: the prompt '\\ud800' is not valid text"),
        ({"id": "d", "prompt": "a", "top_k": -2}, "line 9: top_k -2 is out of range"),
        ({"id": 0, "prompt": "a"}, "line 10 has the id 0 of line 1"),
    ]
    lines = asked()
    work = job(*lines[:2], *(line for line, _ in damaged), "", "  ", *lines[2:])
    answers = work.here(model, *GREEDY, "--max-num-seqs", 3)
    assert [answers[0], answers[1], *answers[10:]] == expected(*GREEDY)
    for number, (answer, (line, sentence)) in enumerate(
        zip(answers[2:10], damaged, strict=True), 3
    ):
        assert answer["line"] == number and sentence in answer["error"]
        assert answer["id"] == (line["id"] if isinstance(line, dict) else None)
    said = capfd.readouterr().err.splitlines()
    assert said[-1].startswith(f"{work.target}: 16 lines answered, 8 with an error; ")


def test_bytes_that_are_no_text_damage_one_line(model, job, expected):
    work = job(*asked())
    lines = work.source.read_bytes().split(b"\n")
    lines[0], lines[3] = b"\xef\xbb\xbf" + lines[0] + b"\r", b'{"id": "\xff"}'
    work.source.write_bytes(b"\n".join(lines).rstrip())
    answers = work.here(model, *GREEDY)
    assert answers[3]["error"].endswith("line 4 is not UTF-8 text: invalid start byte at byte 8")
    right = expected(*GREEDY)
    assert answers[:3] + answers[4:] == right[:3] + right[4:]


def test_what_never_fits_the_memory_is_refused_in_its_answer(model, job, expected):
    """A position takes 2 layers * (keys and values) * 4 heads * 5 numbers of 4 bytes."""
    lines = [*asked(), {"id": 8, "prompt": "a", "max_tokens": 40}]
    work = job(*lines)
    config = json.loads((model / "config.json").read_text())
    position = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * 4
    position *= config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    answers = work.run(None, model, *GREEDY, "--kv-cache-memory-bytes", f"{30 * position}B")
    assert answers[:8] == expected(*GREEDY)
    assert answers[8]["error"].endswith(
        f"line 9: its 1 prompt tokens and up to 40 more need {40 * position} bytes of KV cache on "
        f"a rank, but there are {30 * position}; shorten it, or allow more with "
        "--kv-cache-memory-bytes"
    )


@pytest.mark.parametrize(
    "variant, n, how",
    [
        ("llama-mha", 1, ""),
        ("llama-mha", 4, "--tp 2 --dp 2"),
        ("mistral-full", 2, "--cp 2"),
        ("mixtral-full", 4, "--tp 2 --dp 2 --ep 4"),
        ("gpt_oss-plain", 2, "--tp 2 --ep 2 --moe-token-dispatcher all-gather"),
        ("deepseek_v2-lite", 2, "--cp 2 --ep 2"),
    ],
)
def test_a_line_whose_logits_are_not_numbers_is_answered_so(tmp_path_factory, job, variant, n, how):
    """And the others as ever: here the embedding of one token is damaged."""
    model = write_speaker(variant, tmp_path_factory.mktemp("odd") / "model")
    lines = [{"id": str(place), "input_ids": [place + 1, 3, 4]} for place in range(6)]
    right = job(*lines).run(1, model, *GREEDY)
    used = {token for answer in right for token in answer["output_ids"]}
    odd = min(set(range(9, 50)) - used)
    rewrite(
        model / "model.safetensors",
        lambda tensors: tensors["model.embed_tokens.weight"][odd].put(0, np.nan),
    )
    lines[2]["input_ids"] = [3, odd]
    answers = job(*lines).run(n, model, *GREEDY, *how.split())
    assert "line 3: its logits for position 2 are infinite or not" in answers.pop(2)["error"]
    del right[2]
    assert answers == right


def test_without_a_tokenizer_ids_are_answered(job, tmp_path_factory):
    bare = write_checkpoint("llama-mqa", tmp_path_factory.mktemp("bare"))
    work = job({"id": 0, "input_ids": [3, 4]}, {"id": 1, "prompt": "a"},
               {"id": 2, "input_ids": [3], "stop": "a"})  # fmt: skip
    given, text, stop = work.here(bare, *GREEDY)
    assert given["text"] is None and given["completion_tokens"] == len(given["output_ids"]) > 0
    for answer, number in ((text, 2), (stop, 3)):
        assert f"line {number}: {bare / 'tokenizer.json'} does not exist" in answer["error"]


def test_what_is_said_on_the_way(model, job, capfd, monkeypatch):
    monkeypatch.setattr(batch, "REPORT_SECONDS", 0.0)
    work = job(*asked())
    work.here(model, *GREEDY, "--max-num-seqs", 1)
    layout, *paces, totals = capfd.readouterr().err.splitlines()
    assert layout.startswith(f"{model}: --tp 1 --dp 1, float32")
    assert [pace.split(",")[0] for pace in paces] == [
        f"{done} of 8 lines answered" for done in range(1, 9)
    ]
    assert all(" tokens/s, about 0:00:0" in pace and pace.endswith(" left") for pace in paces)
    prompt = sum(len(Tokenizer(model).encode(text)) for text in PROMPTS)
    assert totals.startswith(f"{work.target}: 8 lines answered; {prompt} prompt tokens and ")
    for part in (
        " completion tokens in ",
        " completion tokens/s; communication: ",
        "peak memory: ",
    ):
        assert totals.count(part) == 1


def test_a_terminal_shows_a_bar(model, job, capfd, monkeypatch):
    monkeypatch.setattr(batch, "reaches_terminal", lambda: True)
    job(*asked()).here(model, *GREEDY)
    err = capfd.readouterr().err
    assert "answering:   0%|" in err and "0/8 " in err and "lines answered," not in err


# Ended on the way


LINES = [
    {"id": f"r{place}", "prompt": prompt + " " * (place % 3), "max_tokens": 8 + 5 * (place % 7)}
    for place, prompt in enumerate(["class Queue", "def read(self", "import", "The"] * 7)
]
COUNT = len(LINES)
WORDS = [SMALL, "--temperature", "0.7", "--ignore-eos", "--max-num-seqs", "3"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return Job(tmp_path_factory.mktemp("undisturbed"), LINES).run(2, *WORDS, "--dp", 2)


# Steps that leave time to end them.
SLOW = """
import runpy, time
from mpi4py import MPI
from mpishard.runtime import launch

start = launch.start

def slower():
    world = start()
    from mpishard.model import Decoder
    forward = Decoder.forward
    Decoder.forward = lambda *arguments: (time.sleep(0.01), forward(*arguments))[1]
    return world

launch.start = slower
runpy.run_module("mpishard", run_name="__main__", alter_sys=True)
"""


def begin(work: Job, n: int = 2, words: list[Any] = WORDS) -> Launch:
    command = ["-c", SLOW, "batch", *map(str, [*words, *work.files])]
    return Launch(n, command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)


def wait_for(work: Job, lines: int, running: Launch) -> None:
    """Until the journal has so many lines, its header among them."""
    deadline = time.monotonic() + 60
    while not work.journal.exists() or work.journal.read_bytes().count(b"\n") < lines:
        assert running.process.poll() is None, running.process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill(running: Launch, victims: list[int]) -> None:
    """Kill ranks, or with none everything at once, the launcher included."""
    pids = [running.pid(rank) for rank in victims] or [pid for pid, _ in running.members()]
    for pid in [*([] if victims else [running.process.pid]), *pids]:
        os.kill(pid, signal.SIGKILL)
    assert running.process.wait(30) != 0


def test_a_killed_job_goes_on_where_it_was(job, undisturbed):
    """Killed three times, at several points, one rank or all of them."""
    work = job(*LINES)
    before: dict[int, str] = {}
    for victims, more in (([0], 0), ([], 6), ([1], 3)):
        with begin(work, words=[*WORDS, "--dp", "2"]) as running:
            wait_for(work, 1 + len(before) + more, running)
            kill(running, victims)
        assert not work.target.exists()
        if more or before:
            found = work.finished()
            assert len(found) >= len(before) + more and found.items() >= before.items()
            before = found
    with begin(work, words=[*WORDS, "--dp", "2"]) as running:
        _, err = running.process.communicate(timeout=60)
    assert running.process.returncode == 0, err
    said = f"{work.target}: {COUNT} lines answered, {len(before)} of them by an earlier run"
    assert err.splitlines()[-1].startswith(f"{said}; ")
    answers = work.result()
    assert answers == undisturbed
    assert all(answers[place] == json.loads(text) for place, text in before.items())


def test_another_layout_may_go_on(job, undisturbed):
    work = job(*LINES)
    with begin(work, 1) as running:
        wait_for(work, 10, running)
        kill(running, [0])
    done = len(work.finished())
    finished = mpishard(
        4, "batch", *WORDS, "--tp", 2, "--kv-cache-memory-bytes", "1MB", *work.files
    )
    assert f"{COUNT} lines answered, {done} of them by an earlier run" in finished.stderr
    assert work.result() == undisturbed


def test_a_torn_journal_is_repaired(job, undisturbed):
    work = job(*LINES)
    with begin(work, 1) as running:
        wait_for(work, 8, running)
        kill(running, [0])
    lines = work.journal.read_bytes().splitlines(keepends=True)
    spoilt = lines[3].replace(b'"id"', b'"ID"')
    work.journal.write_bytes(b"".join([*lines[:3], spoilt, *lines[4:6], lines[6][:-4]]))
    finished = mpishard(2, "batch", *WORDS, "--dp", 2, *work.files)
    assert f"{work.journal}: 1 damaged lines are done again\n" in finished.stderr
    assert f"{COUNT} lines answered, 4 of them by an earlier run; " in finished.stderr
    assert work.result() == undisturbed


@pytest.mark.parametrize(
    "notice, rank, n, layout",
    [
        (signal.SIGTERM, None, 2, "--dp 2"),
        (signal.SIGUSR1, None, 2, "--dp 2"),
        (signal.SIGUSR1, 1, 2, "--dp 2"),
        (signal.SIGTERM, 3, 4, "--tp 2"),
    ],
)
def test_a_job_that_is_told_to_stop_stops_after_a_step(job, undisturbed, notice, rank, n, layout):
    """All ranks, if one alone is told; or all by way of the launcher."""
    if rank is None and notice == signal.SIGTERM and MPI.get_vendor()[0] == "Open MPI":
        pytest.skip("the mpirun of Open MPI kills its ranks at SIGTERM")
    work = job(*LINES)
    with begin(work, n, [*WORDS, *layout.split()]) as running:
        wait_for(work, 6, running)
        os.kill(running.process.pid if rank is None else running.pid(rank), notice)
        out, err = running.process.communicate(timeout=30)
    assert running.process.returncode == 75, err
    done = len(work.finished())
    assert 5 <= done < COUNT
    said = f"told to stop: {done} of {COUNT} lines are answered, in {work.journal}"
    assert f"{said}; the same command goes on from there; " in err
    assert "error" not in err
    assert work.run(2, *WORDS, "--dp", 2) == undisturbed


# Told to stop as it imports a module, on some ranks.
TOLD = """
import os, signal, sys
from mpishard import cli
from mpishard.runtime import launch

class Importing:
    def find_spec(self, name, *_):
        if name == "{module}" and launch._env_int(launch.RANK_VARIABLES) in {ranks}:
            os.kill(os.getpid(), signal.{notice})

sys.meta_path.insert(0, Importing())
sys.exit(cli.main())
"""
# The same while Python itself starts, held back by who starts it.
HELD = """
import os, signal, sys

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.{notice}])
os.kill(os.getpid(), signal.{notice})
os.execv(sys.executable, [sys.executable, "-m", "mpishard", *sys.argv[1:]])
"""
EARLY = {
    "mpi4py": TOLD.format(module="mpi4py.MPI", ranks=[0, 1], notice="SIGTERM"),
    "numpy": TOLD.format(module="numpy", ranks=[0, 1], notice="SIGUSR1"),
    "commands": TOLD.format(module="mpishard.commands", ranks=[0, 1], notice="SIGTERM"),
    "one rank": TOLD.format(module="numpy", ranks=[1], notice="SIGTERM"),
    "python": HELD.format(notice="SIGTERM"),
    "python by SIGUSR1": HELD.format(notice="SIGUSR1"),
}


@pytest.mark.parametrize("when", EARLY)
def test_a_job_that_is_told_to_stop_while_it_starts_stops_before_its_first_step(
    job, undisturbed, when
):
    """Told is one rank, and the other replica may begin before it hears of that; or both."""
    work = job(*LINES)
    words = [str(word) for word in (*WORDS, "--dp", "2", *work.files)]
    finished = run_mpi(2, ["-c", EARLY[when], "batch", *words])
    assert finished.returncode == 75, finished.stderr
    done = len(work.finished())
    assert done == 0 or when == "one rank"
    assert not work.target.exists()
    said = f"told to stop: {done} of {COUNT} lines are answered, in {work.journal}; the same"
    assert said in finished.stderr and "error" not in finished.stderr
    assert work.run(2, *WORDS, "--dp", 2) == undisturbed


def test_what_is_no_batch_is_ended_by_sigterm(model):
    script = TOLD.format(module="numpy", ranks=[0], notice="SIGTERM")
    finished = run_mpi(None, ["-c", script, "generate", str(model), "--prompt", "a"])
    assert finished.returncode == -signal.SIGTERM


def test_replicas_that_share_experts_stop_together(job, tmp_path_factory):
    mixture = write_speaker("mixtral-full", tmp_path_factory.mktemp("mixture"))
    words = [
        mixture,
        "--max-tokens",
        50,
        "--ignore-eos",
        "--dp",
        2,
        "--ep",
        2,
        "--max-num-seqs",
        1,
    ]
    work = job(*asked(PROMPTS * 3))
    lines = work.source.read_text().splitlines()
    work.source.write_text("".join(f'{{"id": "{place}x", {line.split(",", 1)[1]}\n'
                                   for place, line in enumerate(lines)))  # fmt: skip
    with begin(work, 2, words) as running:
        wait_for(work, 3, running)
        os.kill(running.pid(1), signal.SIGTERM)
        _, err = running.process.communicate(timeout=30)
    assert running.process.returncode == 75, err
    assert len(work.run(2, *words)) == 24


FULL = """
import resource, runpy
from mpi4py import MPI

if MPI.COMM_WORLD.rank == 0:  # after MPI has made files of its own
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
runpy.run_module("mpishard", run_name="__main__", alter_sys=True)
"""


def test_a_full_disk_ends_the_job_and_room_lets_it_go_on(job, undisturbed):
    work = job(*LINES)
    words = [str(word) for word in (*WORDS, *work.files)]
    finished = run_mpi(2, ["-c", FULL, "batch", *words, "--dp", "2"])
    err = finished.stderr
    assert finished.returncode == 2
    assert err.count("mpishard: error: ") == 1 and "Traceback" not in err
    assert f"{work.journal} cannot be written: File too large; make room, and the same" in err
    done = work.finished()
    assert 0 < len(done) < COUNT and not work.target.exists()
    finished = mpishard(2, "batch", *WORDS, *work.files, "--dp", 2)
    assert f"answered, {len(done)} of them by an earlier run" in finished.stderr
    assert work.result() == undisturbed


def test_a_disk_too_full_for_the_output_alone_loses_nothing(model, job, expected, monkeypatch):
    work = job(*asked())
    finish = BatchJob.finish
    monkeypatch.setattr(BatchJob, "finish", Mock(side_effect=UserError("disk full")))
    with pytest.raises(UserError):
        work.here(model, *GREEDY)
    assert len(work.finished()) == 8 and not work.target.exists()
    monkeypatch.setattr(BatchJob, "finish", finish)
    monkeypatch.setattr("mpishard.batch.run.serve", None)  # nothing is computed again
    assert work.here(model, *GREEDY) == expected(*GREEDY)


def test_an_input_that_changes_meanwhile_ends_the_job(model, job, monkeypatch):
    """What was answered stays; what is answered is what was there."""
    work = job(*asked())
    text = work.source.read_text()
    load = common.load

    def late(*arguments: Any, **options: Any) -> Any:
        work.source.write_text(text.replace("a man", "a cat"))
        return load(*arguments, **options)

    monkeypatch.setattr(common, "load", late)
    message = refusal_here("batch", model, *GREEDY, *work.files, "--max-num-seqs", "1")
    assert message.startswith(f"{work.source} line 4 is not what it was when the job began: ")
    assert 4 not in work.finished()


# Refused


def test_a_journal_of_another_job_is_refused(model, job, tmp_path_factory):
    work = job(*asked())
    with begin(work, 1, [model, *GREEDY]) as running:
        wait_for(work, 1, running)
        kill(running, [0])
    before = work.journal.read_bytes()
    for words, sentence in (
        ([model, "--max-tokens", 12], "its max_tokens is 11, here it is 12; give the same command"),
        ([model, *SAMPLED], "its temperature is 0.0, here it is 1.3"),
        ([model, *GREEDY, "--stop", "a"], 'its stop is [], here it is ["a"]'),
        ([model, *GREEDY, "--compute-dtype", "float64"], 'its compute_dtype is "float32", here'),
        ([model, *GREEDY, "--max-model-len", 9], "its max_model_len is 64, here it is 9"),
        ([model, *GREEDY, "--chat"], "its chat is false, here it is true"),
        ([SMALL, *GREEDY], 'its model is "sha256 '),
    ):
        message = refusal_here("batch", *words, *work.files)
        assert f"{work.journal} is the journal of another job: {sentence}" in message
    work.source.write_text(work.source.read_text() + "\n")
    message = refusal(2, "batch", model, *GREEDY, *work.files)
    assert 'another job: its input is "sha256 ' in message
    assert work.journal.read_bytes() == before
    moved = shutil.copytree(model, tmp_path_factory.mktemp("moved") / "model")
    work.source.write_text(work.source.read_text()[:-1])
    assert len(work.here(moved, *GREEDY)) == 8, "wherever the model lies"


def test_two_jobs_do_not_write_one_output(job):
    work = job(*LINES)
    with begin(work, 1) as running:
        wait_for(work, 2, running)
        message = refusal_here("batch", *WORDS, *work.files)
        assert message.startswith(f"{work.journal} is in use: another job writes to it")


def test_outputs_that_cannot_be(model, job, tmp_path):
    work = job(*asked())
    line = ["batch", model, "--input", work.source, "--output"]
    work.target.write_text("precious")
    message = refusal(2, *line, work.target)
    assert message == (
        f"--output {work.target} exists already and no job is to be continued there: give another "
        "name, or remove it"
    )
    assert work.target.read_text() == "precious"
    assert "is a directory" in refusal_here(*line, tmp_path)
    assert "there is no directory" in refusal_here(*line, tmp_path / "none" / "out")
    assert "is the --input" in refusal_here(*line, work.source)
    work.journal.write_text("my thesis")
    assert "is in the way: it is no journal of a job" in refusal_here(*line, work.target)
    assert work.journal.read_text() == "my thesis"


def test_inputs_that_cannot_be(model, tmp_path):
    line = ["batch", model, "--output", tmp_path / "out", "--input"]
    assert refusal(2, *line, tmp_path / "none").endswith(
        "cannot be read: No such file or directory"
    )
    assert "cannot be read: Is a directory" in refusal_here(*line, tmp_path)
    empty = tmp_path / "empty"
    empty.write_text("\n \n")
    assert refusal_here(*line, empty) == f"--input {empty} has no line to answer"
    assert sorted(tmp_path.iterdir()) == [empty]
    os.mkfifo(tmp_path / "pipe")
    message = refusal_here(*line, tmp_path / "pipe")
    assert message.endswith("pipe is no file: lines have to be read more than once")


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (
            "--max-num-seqs 9 --max-num-batched-tokens 8",
            "--max-num-seqs 9 is more than --max-num-ba",
        ),
        (
            "--chunked-prefill-size 9 --max-num-batched-tokens 8",
            "--chunked-prefill-size 9 has no effect with --max-num",
        ),
        ("--max-num-seqs 0", "argument --max-num-seqs: 0 must be at least 1"),
        (
            "--max-num-batched-tokens x",
            "argument --max-num-batched-tokens: 'x' is not a whole number",
        ),
        (
            "--kv-cache-memory-bytes 2GX",
            "argument --kv-cache-memory-bytes: '2GX' is not a size in bytes, such as 500MB or",
        ),
        (
            "--kv-cache-memory-bytes 0",
            "argument --kv-cache-memory-bytes: '0' is not a size in bytes",
        ),
        (
            "--kv-cache-memory-bytes -1GiB",
            "argument --kv-cache-memory-bytes: expected one argument",
        ),
        ("--stop=", "--stop '' is empty: give the text that ends an answer"),
        ("--top-p 2", "top_p 2.0 is out of range: it must be 0 to 1"),
        ("--json", "unrecognized arguments: --json"),
    ],
)
def test_options_that_cannot_be(model, job, flags, sentence):
    work = job(*asked())
    assert sentence in refusal_here("batch", model, *work.files, *flags.split())
    assert not work.journal.exists()
