"""Files and requests as people hand them over: what is no file of requests, packed files, links,
prompts of any length, and what the lines of other programs ask for."""

from __future__ import annotations

import errno
import gzip
import io
import json
import shutil
import tempfile
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from mpi4py import MPI
from tiny_models import rewrite
from tiny_text import write_spacious, write_speaker

import mpishard
from commands.shell import answered, completions, refusal, refusal_here
from commands.shell import mpishard as run
from commands.test_batch import GREEDY, Job, asked
from mpishard.batch.job import BatchJob
from mpishard.cli import run_command
from mpishard.commands import batch, common
from mpishard.errors import UserError

LINES = b'{"id": 0, "prompt": "a"}\n{"id": 1, "prompt": "re"}\n'


def here(*words: object) -> None:
    """A command, in this process."""
    with ExitStack() as job:
        run_command(["mpishard", *map(str, words)], MPI.COMM_SELF, job)


def packed() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("in.jsonl", LINES)
    return file.getvalue()


# Files that are not lines of JSON

RECORDS = [json.loads(line) for line in LINES.splitlines()]
JQ = "is one JSON array, not a JSON object a line: `jq -c '.[]'` makes lines of it"
NOT_LINES = {
    "UTF-16": (LINES.decode().encode("utf-16"), "is UTF-16: convert it to UTF-8, `iconv -f UTF-16"),
    "big-endian": (b"\xfe\xff" + LINES.decode().encode("utf-16-be"), "is UTF-16: convert it"),
    "no mark": (LINES.decode().encode("utf-16-le"), "is UTF-16: convert it to UTF-8"),
    "no Latin": ("語語語語".encode("utf-16"), "is UTF-16: convert it to UTF-8"),
    "UTF-32": (LINES.decode().encode("utf-32"), "is UTF-32: convert it to UTF-8"),
    "array": (json.dumps(RECORDS).encode(), JQ),
    "array, indented": (json.dumps(RECORDS, indent=2).encode(), JQ),
    "array of lines": (b"[" + LINES.strip().replace(b"\n", b",\n") + b"]", JQ),
    "object, indented": (
        json.dumps(RECORDS[0], indent=1).encode(),
        "has a JSON object over sev",
    ),
    "carriage returns": (
        LINES.replace(b"\n", b"\r"),
        "has lone carriage returns for line ends",
    ),
    "zip": (
        packed(),
        "is a zip archive (or an .npz or .xlsx file), not text: unpack",
    ),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x00", "is a zstd file, not text: unpack or convert it first"),
    "Parquet": (b"PAR1\x15\x04", "is a Parquet file, not text"),
    "noise": (b"\7ELF\0\3" + LINES[1:24], "is not text: it has NULs, and begins with \\x07ELF"),
    "CSV": (
        b"id,prompt\n0,a\n",
        "has no line that is a JSON object; the first begins with id,p",
    ),
    "Latin-1": (
        "é\n".encode("latin-1"),
        "has no line that is a JSON object; the first begins",
    ),
    "no lines": (b"\n \n", "has no line to "),
    "packed array": (gzip.compress(json.dumps(RECORDS).encode()), JQ),
    "packed twice": (gzip.compress(packed()), "is a zip archive"),
    "cut short": (gzip.compress(LINES)[:-9], "is a gzip file that is damaged or cut short: "),
    "damaged": (
        gzip.compress(LINES)[:-8] + 8 * b"x",
        "is a gzip file that is damaged or cut short",
    ),
}


@pytest.mark.parametrize("kind", NOT_LINES)
@pytest.mark.parametrize("command", ["batch", "logits"])
def test_what_is_not_lines_is_refused_as_a_whole(model, tmp_path, monkeypatch, command, kind):
    """Before the model is loaded, and nothing is written."""
    content, sentence = NOT_LINES[kind]
    source = tmp_path / "in"
    source.write_bytes(content)
    monkeypatch.setattr(common, "load", None)
    message = refusal_here(command, model, "--input", source, "--output", tmp_path / "out")
    assert message.startswith(f"--input {source} {sentence}")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    "first",
    [
        b"[1, 2]\n",
        b"[\n",
        b"{\n",
        b"\r\n[1\n",
        b'{"id": 0, "prompt": "a"},\n',
        b"\xff\xfe\0\n",
        b"\0\n",
    ],
)
def test_a_damaged_line_does_not_make_it_another_kind_of_file(model, tmp_path, first):
    job = Job(tmp_path, [])
    job.source.write_bytes(first + LINES)
    answers = job.here(model, *GREEDY)
    assert "error" in answers[0] and len(answers) == 3
    assert all("error" not in answer for answer in answers[1:])


# Packed files


def test_packed_input_is_read(model, tmp_path):
    job = Job(tmp_path, asked())
    right = job.here(model, *GREEDY)
    job.source.write_bytes(gzip.compress(job.source.read_bytes()))
    assert job.here(model, *GREEDY) == right
    job.source.write_bytes(2 * gzip.compress(b"") + job.source.read_bytes())
    assert job.here(model, *GREEDY) == right, "several members, as of `cat a.gz b.gz`"


def test_output_whose_name_says_so_is_packed(model, tmp_path):
    job = Job(tmp_path, asked())
    right = job.here(model, *GREEDY)
    here("batch", model, *GREEDY, "--input", job.source, "--output", tmp_path / "out.gz")
    lines = gzip.decompress((tmp_path / "out.gz").read_bytes()).splitlines()
    assert [json.loads(line) for line in lines] == right


def test_packed_input_is_scored(model, tmp_path):
    scores = []
    for pack in (bytes, gzip.compress):
        (tmp_path / "in").write_bytes(pack(LINES))
        here("logits", model, "--input", tmp_path / "in", "--output", tmp_path / "out.npz")
        scores.append(dict(np.load(tmp_path / "out.npz")))
    for name in ("0", "1"):
        np.testing.assert_array_equal(scores[0][name], scores[1][name])


def test_a_packed_file_that_does_not_fit_the_disk(model, tmp_path, monkeypatch):
    (tmp_path / "in").write_bytes(gzip.compress(LINES))
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr("mpishard.storage.input_file.shutil.copyfileobj", full)
    message = refusal_here("batch", model, "--input", tmp_path / "in", "--output", tmp_path / "out")
    folder = tempfile.gettempdir()
    assert message.endswith(f"cannot be unpacked into {folder}: No space left on device")


# A batch in which every line failed

BAD = [{"id": 0, "prompt": ""}, {"id": 1, "prompt": "a", "top_k": -5}, {"id": 2, "input_ids": [99]}]


def test_a_batch_of_errors_alone_has_a_status_of_its_own(model, tmp_path, capfd):
    job = Job(tmp_path, BAD)
    with pytest.raises(SystemExit) as end:
        job.here(model, *GREEDY)
    assert end.value.code == batch.ALL_REFUSED == 65
    assert ["error" in answer for answer in job.result()] == [True] * 3
    said = capfd.readouterr().err
    assert f"{job.target}: all 3 lines failed, and have an error in place of an answer" in said


@pytest.mark.parametrize("first", [{"id": 9, "prompt": "a"}, {"id": 9, "prompt": ""}])
def test_answers_of_earlier_runs_count(model, tmp_path, monkeypatch, first):
    """The first run has answered all lines, and could not write the output."""
    job, finish = Job(tmp_path, [first, *BAD]), BatchJob.finish
    monkeypatch.setattr(BatchJob, "finish", Mock(side_effect=UserError("disk full")))
    with pytest.raises(UserError):
        job.here(model, *GREEDY)
    monkeypatch.setattr(BatchJob, "finish", finish)
    if first["prompt"]:
        assert len(job.here(model, *GREEDY)) == 4
    else:
        with pytest.raises(SystemExit, match="65"):
            job.here(model, *GREEDY)


# Where output goes


def test_output_goes_where_a_link_leads(model, tmp_path):
    """Through two links, to a file that is not there yet; the journal goes there as well."""
    work, far = tmp_path / "work", tmp_path / "far"
    work.mkdir()
    far.mkdir()
    (work / "out").symlink_to("between")
    (work / "between").symlink_to(far / "real")
    (tmp_path / "in").write_bytes(LINES)
    words = [model, "--input", tmp_path / "in", "--output", work / "out"]
    for command, read in (("batch", Path.read_text), ("logits", np.load)):
        here(command, *words)
        assert sorted(path.name for path in far.iterdir()) == ["real"]
        assert read(far / "real") and (work / "out").is_symlink()
        assert sorted(path.name for path in work.iterdir()) == ["between", "out"]
        (far / "real").unlink()
    (far / "real").write_text("precious")
    assert "out exists already and no job is to be" in refusal_here("batch", *words)
    assert (far / "real").read_text() == "precious"


def test_links_that_lead_nowhere(model, tmp_path):
    (tmp_path / "in").write_bytes(LINES)
    words = ["batch", model, "--input", tmp_path / "in", "--output", tmp_path / "out"]
    (tmp_path / "out").symlink_to(tmp_path / "none" / "real")
    assert refusal_here(*words).endswith(f"there is no directory {tmp_path}/none; make it first")
    (tmp_path / "out").unlink()
    (tmp_path / "out").symlink_to("out")
    assert refusal_here(*words).endswith("is a symbolic link that leads back to itself: remove it")
    (tmp_path / "out").unlink()
    (tmp_path / "out").symlink_to(tmp_path)
    assert "is a directory: give the name of a file" in refusal_here(*words)
    (tmp_path / "out").unlink()
    (tmp_path / "out").symlink_to("/dev/null")
    assert "is no regular file: give the name of one" in refusal_here(*words)
    (tmp_path / "out").unlink()
    (tmp_path / "out").symlink_to("in")
    assert "is the --input: give another name" in refusal_here(*words)


OUTPUTS = {
    "batch": ["--input", "IN", "--output", "OUT"],
    "logits": ["--input", "IN", "--output", "OUT"],
    "generate": ["--prompt", "a", "--record-routing", "OUT"],
    "bench": ["--expert-load", "OUT"],
}


@pytest.mark.parametrize("command", OUTPUTS)
def test_a_directory_that_cannot_be_written_is_found_first(model, tmp_path, monkeypatch, command):
    """Before the model is loaded; its permissions need not tell, where it is mounted read-only."""
    (tmp_path / "in").write_bytes(LINES)
    files = {"IN": tmp_path / "in", "OUT": tmp_path / "out"}
    words = [files.get(word, word) for word in OUTPUTS[command]]
    monkeypatch.setattr(common, "load", None)
    refused = Mock(side_effect=OSError(errno.EROFS, "Read-only file system"))
    monkeypatch.setattr("mpishard.storage.output_file.tempfile.TemporaryFile", refused)
    message = refusal_here(command, model, *words)
    assert message == (
        f"{words[-2]} {tmp_path}/out: the directory {tmp_path} cannot be written to: Read-only "
        "file system"
    )
    monkeypatch.undo()
    long = refusal_here(command, model, *words[:-1], tmp_path / (250 * "x"))
    assert long == f"{words[-2]}: the name {40 * 'x'}… is longer than 244 bytes"


# Prompts of any length

SPACES = 300_000


@pytest.fixture(scope="module")
def spacious(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_spacious(tmp_path_factory.mktemp("spacious") / "model")


def test_a_prompt_of_300_kb_through_every_way(spacious, tmp_path):
    text = f"w5{SPACES * ' '}w9\nw7"
    (short,) = completions(None, spacious, "--prompt", "w5 w9 w7", *GREEDY)
    right = short | {"prompt": text}
    file = tmp_path / "long.txt"
    file.write_text(text)
    way = [spacious, *GREEDY]
    assert completions(2, *way, "--tp", 2, "--prompt-file", file) == [right]
    assert completions(4, *way, "--tp", 2, "--cp", 2, "--prompt-file", file) == [right]
    assert completions(None, *way, "--prompt", "-", input=text) == [right]
    file.write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.encode()))
    assert completions(None, *way, "--prompt-file", file) == [right]
    job = Job(tmp_path, [{"id": 0, "prompt": text}])
    (answer,) = job_answers(job, 2, *way, "--tp", 2)
    assert answer == right
    (whole,) = mpishard.load(spacious).generate(text, mpishard.SamplingParams(max_tokens=11))
    assert whole.output_ids == right["output_ids"]


def job_answers(job: Job, n: int, *words: object) -> list[dict[str, Any]]:
    assert answered(n, "batch", *words, *job.files) == ""
    return [json.loads(line) for line in job.target.read_text().splitlines()]


def test_prompts_keep_the_order_in_which_they_are_typed(model, tmp_path):
    (tmp_path / "one").write_text("the in")
    (tmp_path / "two").write_text("é\n")
    words = ["--prompt", "a", "--prompt-file", tmp_path / "two", "--prompt-file", tmp_path / "one"]
    answers = completions(2, model, *words, "--prompt=re", *GREEDY, "--dp", 2)
    assert [answer["prompt"] for answer in answers] == ["a", "é\n", "the in", "re"]
    apart = [
        completions(None, model, f"--prompt={answer['prompt']}", *GREEDY) for answer in answers
    ]
    assert [one["output_ids"] for one in answers] == [one["output_ids"] for (one,) in apart]


def test_prompt_files_that_cannot_be(model, tmp_path, monkeypatch):
    """Found on rank 0, before the model is loaded, and said once."""
    message = refusal(2, "generate", model, "--prompt-file", tmp_path / "none")
    assert message == f"--prompt-file {tmp_path}/none cannot be read: No such file or directory"
    monkeypatch.setattr(common, "load", None)
    file = tmp_path / "prompt"
    for content, sentence in (
        (b"abc\xff", "is not UTF-8 text: invalid start byte at byte 3"),
        ("é".encode("utf-16"), "is UTF-16: convert it to UTF-8, `iconv -f UTF-16 -t UTF-8`"),
        (bytes(9), "is not text: it has NULs"),
        ("語".encode("utf-16"), "is UTF-16: convert it to UTF-8, `iconv -f UTF-16 -t UTF-8`"),
    ):
        file.write_bytes(content)
        assert refusal_here("generate", model, "--prompt-file", file) == (
            f"--prompt-file {file} {sentence}"
        )
    assert "cannot be read: Is a directory" in refusal_here(
        "generate", model, "--prompt-file", tmp_path
    )


def test_a_prompt_may_come_through_a_pipe(model):
    """As a shell makes one of `--prompt-file <(command)`, where there is no launcher."""
    (right,) = completions(None, model, "--prompt", "the in", *GREEDY)
    words = ["--prompt-file", "/dev/stdin", *GREEDY]
    assert completions(None, model, *words, input="the in") == [right]


def test_an_empty_prompt_file_is_an_empty_prompt(model, tmp_path):
    (tmp_path / "empty").touch()
    message = refusal_here("generate", model, "--prompt", "a", "--prompt-file", tmp_path / "empty")
    assert message.startswith("prompt 2 is empty: it has no token")


# Sampling


@pytest.fixture
def configured(model: Path, tmp_path: Path) -> Any:
    """The model with some generation_config.json."""

    def write(**fields: Any) -> Path:
        path = tmp_path / "configured"
        shutil.copytree(model, path, dirs_exist_ok=True)
        (path / "generation_config.json").write_text(json.dumps(fields))
        return path

    return write


def test_sampling_defaults_are_the_models_where_that_is_said(configured, tmp_path):
    """They are weaker than what is typed, and than a line's own."""
    own: dict[str, Any] = {
        "do_sample": True,
        "temperature": 1.3,
        "top_p": 0.9,
        "top_k": 40,
        "max_new_tokens": 9,
    }
    own |= {"repetition_penalty": 1.2, "min_p": 0.01, "eos_token_id": [2], "bad_words_ids": None}
    path = configured(**own)
    words = [path, "--prompt", "the in", "--seed", 3]
    typed = ["--temperature", 1.3, "--top-p", 0.9, "--top-k", 40, "--max-tokens", 9]
    typed += ["--repetition-penalty", 1.2, "--min-p", 0.01]
    right = completions(None, *words, *typed)
    assert completions(None, *words, "--max-tokens", 9) != right
    assert completions(2, *words, "--tp", 2, "--generation-config", "auto") == right
    assert completions(None, *words, "--generation-config", path) == right
    assert (
        completions(None, *words, "--generation-config", path / "generation_config.json") == right
    )
    auto = ["--generation-config", "auto"]
    greedy = completions(None, *words, *auto, "--temperature", 0)
    assert greedy == completions(None, *words, "--max-tokens", 9, "--repetition-penalty", 1.2)
    job = Job(tmp_path, [{"id": 0, "prompt": "the in"}, {"id": 1, "prompt": "the in", "top_k": 0}])
    first, second = job_answers(job, 2, path, *auto, "--seed", 3, "--tp", 2)
    assert first == right[0]
    assert second["completion_tokens"] <= 9


@pytest.mark.parametrize(
    "fields, params",
    [
        ({}, {}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"temperature": 0.6, "top_k": -1, "num_beams": 1}, {"temperature": 0.6, "top_k": -1}),
        ({"do_sample": None, "top_p": None, "max_length": 4096, "pad_token_id": 0}, {}),
    ],
)
def test_what_a_generation_config_means(configured, fields, params):
    found = mpishard.load(configured(**fields)).default_sampling_params(seed=4)
    assert found == mpishard.SamplingParams(seed=4, **params)


@pytest.mark.parametrize(
    "fields, sentence",
    [
        (
            {"num_beams": 4},
            "num_beams = 4 chooses tokens in a way that is not built: remove",
        ),
        (
            {"suppress_tokens": [5]},
            "suppress_tokens = [5] chooses tokens in a way that is not b",
        ),
        ({"temperature": "hot"}, 'temperature = "hot" must be a number that is not negative'),
        ({"top_k": 2.5}, "top_k = 2.5 must be a whole number, 0 or -1 for none"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0 must be a positive whole number"),
        ({"do_sample": 1}, "do_sample = 1 must be true or false"),
        ({"top_p": 3}, "top_p 3.0 is out of range"),
    ],
)
def test_generation_configs_that_cannot_be(configured, fields, sentence):
    path = configured(**fields)
    words = ["generate", path, "--prompt", "a", "--generation-config", "auto"]
    assert sentence in refusal_here(*words)


def test_a_generation_config_that_is_not_there(model, tmp_path):
    words = ["generate", model, "--prompt", "a", "--generation-config", tmp_path / "none"]
    assert refusal(2, *words) == f"cannot read {tmp_path}/none: No such file or directory"


def test_penalties_bias_and_several_answers_are_options_and_fields(model, tmp_path):
    changed = ["--repetition-penalty", 1.5, "--presence-penalty", 0.5, "--frequency-penalty", 0.5]
    changed += ["--logit-bias", "9=-5", "--logit-bias", "7=1.5", "--n", 2, "--logprobs", 1]
    changed += ["--temperature", 1, *GREEDY]
    answers = completions(3, model, "--prompt", "the in", "--prompt", "re", *changed, "--tp", 3)
    assert [(one["id"], one["index"]) for one in answers] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    fields: dict[str, Any] = {
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
    }
    fields |= {"logit_bias": {"9": -5, "7": 1.5}, "n": 2, "temperature": 1, "max_tokens": 11}
    completion = {"prompt": "re", **fields, "logprobs": 1, "echo": None, "stream": False}
    chat = {"messages": [{"role": "user", "content": "re"}], **fields}
    chat |= {"logprobs": True, "top_logprobs": 2}
    lines = [
        {"id": 0, "prompt": "the in", **fields, "logprobs": 1},
        {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": completion},
        {"custom_id": "d", "method": "POST", "url": "/v1/chat/completions", "body": chat},
    ]
    plain, formal, said = job_answers(Job(tmp_path, lines), 4, model, "--tp", 2, "--dp", 2)
    for choice, answer in zip(plain["choices"], answers[:2], strict=True):
        for name in ("text", "output_ids", "finish_reason", "index"):
            assert choice[name] == answer[name]
        assert len(choice["logprobs"]) == len(choice["output_ids"])
        for one, other in zip(choice["logprobs"], answer["logprobs"], strict=True):
            assert one.keys() == other.keys() and one == pytest.approx(other, abs=1e-5)
    choices = formal["response"]["body"]["choices"]
    assert [choice["text"] for choice in choices] == [answer["text"] for answer in answers[2:]]
    tokens = mpishard.load(model).text
    for choice, answer in zip(choices, answers[2:], strict=True):
        found, ids = choice["logprobs"], answer["output_ids"]
        assert len(found["tokens"]) == len(found["token_logprobs"]) == len(ids)
        assert found["tokens"] == [tokens.decode([one], skip_special_tokens=False) for one in ids]
        assert max(map(len, found["top_logprobs"])) <= 2
    assert formal["response"]["body"]["usage"]["completion_tokens"] == sum(
        answer["completion_tokens"] for answer in answers[2:]
    )
    content = said["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in content] == [2] * len(content)


def test_an_echo_begins_with_the_prompt(model, tmp_path):
    def line(prompt: Any) -> dict[str, Any]:
        body = {"prompt": prompt, "echo": True, "max_tokens": 3}
        return {"custom_id": str(prompt), "url": "/v1/completions", "body": body}

    text = mpishard.load(model).text
    job = Job(tmp_path, [line("the in"), line([text.encode("the in")])])
    texts = [a["response"]["body"]["choices"][0]["text"] for a in job.here(model)]
    (answer,) = completions(None, model, "--prompt", "the in", "--max-tokens", 3)
    assert texts == [f"the in{answer['text']}"] * 2


def test_a_bias_for_tokens_that_are_not_there_is_refused_in_its_line(model, tmp_path):
    lines = [{"id": 0, "prompt": "a", "logit_bias": {"67": 1}}, {"id": 1, "prompt": "a"}]
    bad, good = Job(tmp_path, lines).here(model, *GREEDY)
    assert bad["error"].endswith(
        "line 1: logit_bias has token id 67, but the model's ids are 0 to 66"
    )
    assert "error" not in good


def test_routing_of_several_answers_is_not_recorded(tmp_path):
    path = write_speaker("mixtral-full", tmp_path / "model")
    words = ["--prompt", "a", "--n", 2, "--record-routing", tmp_path / "routing.npz"]
    message = refusal_here("generate", path, *words)
    assert message.startswith("n 2 makes several answers of one prompt, whose routing is neither")


# Numbers out of range


def test_numbers_that_overflow_are_told_once_and_not_by_numpy(tmp_path):
    """Here the embedding is so large that a norm makes 0 of it, and an answer looks like any."""
    path = write_speaker("llama-gqa", tmp_path / "model")
    rewrite(
        path / "model.safetensors",
        lambda tensors: tensors["model.embed_tokens.weight"].__imul__(np.float32(1e30)),
    )
    said = mpishard_said(2, "generate", path, "--prompt", "a", "--tp", 2, *GREEDY)
    assert "Warning" not in said
    assert said.count("overflow in float32 arithmetic: results may be wrong; `mpishard ins") == 1
    said = mpishard_said(
        None, "generate", path, "--prompt", "a", *GREEDY, "--compute-dtype=float64"
    )
    assert "overflow in" not in said and "Warning" not in said


def mpishard_said(n: int | None, *words: object) -> str:
    """The standard error of a command that succeeds."""
    finished = run(n, *words)
    assert finished.returncode == 0, finished.stderr
    return finished.stderr
