"""Damaged files of requests.

Acceptable is that every line is answered: one that is as it was with the very answer that it had,
any other with an error that bears its number, or with the answer that the oracle gives to what it
now asks for. A file without a line to answer is refused. Of sequences to score, where one line that
cannot be scored makes the command refuse the file, the oracle answers all.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import Tokenizer

from fuzz import damage
from fuzz.corpus import ANSWERED, DENSE, Corpus
from fuzz.judge import (
    chat_tokens,
    check_answer,
    compare_logits,
    read_logits,
    reference,
    right_answer,
    right_logits,
    tokens,
)
from fuzz.running import Finding, Room

BOM = b"\xef\xbb\xbf"
FIELDS = ("prompt", "input_ids", "id", "max_tokens", "stop", "temperature", "body", "messages")
NOT_A_LINE = [  # each of these is answered with an error, whatever else there is
    b"\xff\xfe\x00",
    b'{"id": "nul", "prompt": "\0"}',
    b'{"id": "utf", "prompt": "\xc3("}',
    b'{"id": "half", "prompt": "\\ud83d"}',
    b'{"id": "torn", "prompt": "the',
    b'{"id": "no"} {"id": "two"}',
    b"[" * 50_000,
    b'{"id": "deep", "prompt": ' + b"[" * 950 + b"]" * 950 + b"}",
    b'{"id": ' + b"[" * 960 + b"]" * 960 + b', "prompt": "a"}',
    b'{"id": "long", "prompt": "' + b"the " * 200_000 + b'"}',
    b'{"id": "many", "input_ids": [' + b"3," * 100_000 + b"3]}",
    b'{"id": "far", "input_ids": [1e9]}',
    b'{"id": "far", "input_ids": [99999999999999999999999999]}',
    b'{"id": "neg", "input_ids": [-1]}',
    b'{"id": "both", "input_ids": [1], "prompt": "a"}',
    b'{"id": "none", "prompt": ""}',
    b'{"id": 1.5, "prompt": "a"}',
    b'{"id": true, "prompt": "a"}',
    b'{"prompt": "a"}',
    b'{"id": "n", "prompt": "a", "temperature": NaN}',
    b'{"id": "n", "prompt": "a", "temperature": 1e999}',
    b'{"id": "n", "prompt": "a", "max_tokens": 0}',
    b'{"id": "n", "prompt": "a", "max_tokens": 2.0}',
    b'{"id": "n", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    b'{"id": "n", "prompt": "a", "top_p": -1}',
    b'{"custom_id": "n", "url": "/v1/embeddings", "body": {}}',
    b'{"custom_id": "n", "url": "/v1/chat/completions", "body": {"messages": [{"role": 1}]}}',
    b'{"custom_id": "n", "url": "/v1/chat/completions", "body": {"messages": [[[]]]}}',
    b'{"custom_id": [], "url": {}, "body": 3}',
    b"null",
    b"1e999",
    b'"\\u0000"',
]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


NOT_NAMES = ["\ud800", "x" * 70_000, "\0", "../a", "/a", "a.npy", "é" * 300]  # of arrays
NOTHING = "which changes nothing"


def requests(room: Room, corpus: Corpus, random: Random) -> str:
    """Damage a file of requests and answer it, or one of sequences and score it."""
    if random.random() < 0.3:
        return _score(room, corpus, random)
    data, note = _damaged(corpus.requests, random)
    source, target = room.path / "in.jsonl", room.path / "out.jsonl"
    source.write_bytes(data)
    files = "--input", source, "--output", target
    makes = ("out.jsonl", "out.jsonl.journal")
    if room.run("batch", corpus.model(DENSE), *files, *ANSWERED, makes=makes):
        if (room.path / "out.jsonl.journal").exists():
            raise Finding("the journal is still there")
        _check_answers(data, target, corpus)
    elif any(_fields(line) for _, line in _lines(data)):
        raise Finding(f"a file with lines to answer was refused: {room.refused}")
    return note


def _score(room: Room, corpus: Corpus, random: Random) -> str:
    lines = corpus.sequences.read_bytes().splitlines()
    data, note = _damaged(lines, random)
    if random.random() < 0.2:
        line, name = random.choice(lines), random.choice(NOT_NAMES)
        data += json.dumps(json.loads(line) | {"id": name}).encode() + b"\n"
        note = f"named {name[:10]!r}, {note}".replace(NOTHING, "")
    source, target = room.path / "in.jsonl", room.path / "out.npz"
    source.write_bytes(data)
    target.write_bytes(b"of before")
    model, files = corpus.model(DENSE), ("--input", source, "--output", target)
    if room.run("logits", model, *files, "--compute-dtype", "float64", makes=("out.npz",)):
        plain = room.path / "plain"
        plain.write_bytes(b"\n".join(content for _, content in _lines(data)))
        if wrong := compare_logits(read_logits(target), right_logits(model, plain)):
            raise Finding(wrong)
    elif NOTHING in note:
        raise Finding(f"a sound file was refused: {room.refused}")
    return f"sequences: {note}"


def _lines(data: bytes) -> list[tuple[int, bytes]]:
    """The lines that are not blank, and their numbers."""
    lines = enumerate(data.removeprefix(BOM).split(b"\n"), 1)
    return [(number, line) for number, line in lines if line.strip()]


def _damaged(lines: list[bytes], random: Random) -> tuple[bytes, str]:
    """The content of a damaged file, and what was done."""
    lines = list(lines)
    what = random.choice(["harmless", "file", "odd line", *["line"] * 5, "twice", "join"])
    note = what
    if what == "harmless":
        return _changed_nothing(lines, random)
    if what == "file":
        return _whole_file(lines, random)
    if what == "line":
        for _ in range(random.choice([1, 1, 2, 4])):
            place = random.randrange(len(lines))
            lines[place], how = _damage_line(lines[place], random)
            note += f" {place + 1}: {how};"
    elif what == "odd line":
        for line in random.sample(NOT_A_LINE, random.choice([1, 3])):
            lines.insert(random.randrange(len(lines) + 1), line)
            note += f" {line[:40]!r}"
    elif what == "twice":
        place = random.randrange(len(lines))
        lines.insert(random.randrange(len(lines) + 1), lines[place])
    else:
        place = random.randrange(len(lines) - 1)
        lines[place : place + 2] = [lines[place] + lines[place + 1]]
    return b"\n".join(lines) + b"\n", note


def _changed_nothing(lines: list[bytes], random: Random) -> tuple[bytes, str]:
    how = random.choice(["CRLF", "BOM", "blank lines", "no end", "spaces", "escapes", "order"])
    end = b"\n"
    if how == "CRLF":
        end = b"\r\n"
    elif how == "spaces":
        lines = [b" \t" + line + b"  " for line in lines]
    elif how == "blank lines":
        lines = [line for one in lines for line in (b"", one, b"  ")]
    elif how == "escapes":
        lines = [json.dumps(json.loads(line)).encode() for line in lines]
    elif how == "order":
        lines = [json.dumps(dict([*json.loads(line).items()][::-1])).encode() for line in lines]
    content = end.join(lines) + (b"" if how == "no end" else end)
    return BOM * (how == "BOM") + content, f"{how}, {NOTHING}"


def _whole_file(lines: list[bytes], random: Random) -> tuple[bytes, str]:
    whole = b"\n".join(lines) + b"\n"
    how = random.choice(["empty", "blank", "utf-16", "noise", "bytes", "NULs", "carriage returns"])
    content = {
        "empty": b"",
        "blank": b"\n \n\t\r\n",
        "utf-16": whole.decode().encode("utf-16"),
        "noise": random.randbytes(3000),
        "bytes": damage.damage_bytes(whole, random)[0],
        "NULs": bytes(5000),
        "carriage returns": whole.replace(b"\n", b"\r"),
    }[how]
    return content, how


def _damage_line(line: bytes, random: Random) -> tuple[bytes, str]:
    if random.random() < 0.3:
        return damage.damage_bytes(line, random)
    try:
        tree = json.loads(line)
        note = damage.damage_tree(tree, random, FIELDS)
    except (ValueError, RecursionError):  # damaged before
        return damage.damage_bytes(line, random)
    return damage.write_tree(tree, random), note


def _check_answers(data: bytes, target: Path, corpus: Corpus) -> None:
    lines = _lines(data)
    written = target.read_bytes()
    answers = [json.loads(answer) for answer in written.decode().removesuffix("\n").split("\n")]
    if len(answers) != len(lines) or not written.endswith(b"\n"):
        raise Finding(f"{len(answers)} answers to {len(lines)} lines")
    clean = {_shape(line): place for place, line in enumerate(corpus.requests)}
    oracle, seen = reference(corpus.model(DENSE)), set[Any]()
    for place, ((number, line), answer) in enumerate(zip(lines, answers, strict=True)):
        fields = _fields(line)
        name = _name(fields)
        before = clean.get(_shape(line))
        twice = "has the id" in json.dumps(answer.get("error")) and name in seen
        seen.add(name)
        if twice:
            continue
        if before is not None and (place == before or not fields.get("temperature")):
            right = _what_is_said(json.loads(corpus.answers[before]), corpus.path / "in.jsonl")
            if _what_is_said(answer, target.with_name("in.jsonl")) != right:
                raise Finding(
                    f"line {number} is as it was, but its answer is {answer}, not {right}"
                )
        elif answer.get("error"):
            if f"line {number}" not in str(answer.get("error")):
                raise Finding(f"line {number} has an error that does not name it: {answer}")
        elif line in NOT_A_LINE:
            raise Finding(f"line {number} cannot be answered, and is: {answer}")
        else:
            _check_other(fields, answer, oracle, corpus.model(DENSE))


def _shape(line: bytes) -> str:
    """What tells whether two lines say the same."""
    try:
        return json.dumps(json.loads(line.decode()), sort_keys=True)
    except (ValueError, RecursionError):
        return repr(line)


def _fields(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line.decode())
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _name(fields: dict[str, Any]) -> Any:
    name = fields.get("custom_id", fields.get("id"))
    return (type(name), name) if isinstance(name, str | int) else None


def _what_is_said(answer: dict[str, Any], source: Path) -> str:
    """An answer as text, without the time at which it was made, the file and the number of its
    line."""
    answer.get("response", {}).get("body", {}).pop("created", None)
    text = json.dumps(answer).replace(str(source), "")
    return re.sub(r'line[ -]\d+|cmpl-\d+|"line": \d+', "", text)


def _check_other(fields: dict[str, Any], answer: dict[str, Any], oracle, model: Path) -> None:
    """Raises Finding unless the answer to a damaged line is the one that it asks for; where it is
    drawn, only its form is looked at."""
    own = fields.get("body", fields)
    most = own.get("max_completion_tokens") or own.get("max_tokens") or 5
    ids = own.get("input_ids")
    if "messages" in own:
        ids = chat_tokens(model, [_plain(message) for message in own["messages"]])
    elif ids is None:
        prompt = own["prompt"]
        ids = tokens(model, prompt) if isinstance(prompt, str) else prompt
    if own.get("temperature"):
        return
    right = right_answer(oracle, ids, most, bool(own.get("ignore_eos")))
    if "body" not in fields:
        if own.get("stop"):
            right = right[0][: len(answer["output_ids"])], answer["finish_reason"]
        check_answer(answer, right, len(ids))
        return
    body = answer["response"]["body"]
    said = body["choices"][0]
    text = said["text"] if "text" in said else said["message"]["content"]
    usage = body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    right_text = tokenizer.decode(right[0])
    same = text.rstrip(REPLACEMENT) == right_text.rstrip(REPLACEMENT)  # half characters go
    if not own.get("stop") and (same, *usage) != (True, len(ids), len(right[0])):
        raise Finding(f"the answer should be {right_text!r}: {answer}")


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content)
    return {**message, "content": content}
