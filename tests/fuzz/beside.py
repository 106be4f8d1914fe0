"""Damage of what lies beside a model: the journal of a batch, recorded routing, placements of
experts, and the loads that they come from.

Acceptable is a refusal, or the answer that there was before the damage: what a journal has lost is
computed again, and what is not its own it does not believe.
"""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path
from random import Random

import numpy as np

from fuzz import damage
from fuzz.corpus import ANSWERED, DENSE, EP, MIXTURE, Corpus
from fuzz.judge import compare_logits, read_logits
from fuzz.running import Finding, Room


def beside(room: Room, corpus: Corpus, random: Random) -> str:
    """Damage one of these files and run the command that reads it."""
    if room.ranks == EP:
        return _placement(room, corpus, random)
    return random.choice([_journal, _journal, _routing, _load])(room, corpus, random)


def _journal(room: Room, corpus: Corpus, random: Random) -> str:
    journal, target = room.path / "out.jsonl.journal", room.path / "out.jsonl"
    content, note = _damaged_journal(corpus, random)
    journal.write_bytes(content)
    files = "--input", corpus.path / "in.jsonl", "--output", target
    if room.run("batch", corpus.model(DENSE), *files, *ANSWERED, makes=(target.name, journal.name)):
        if _undated(target.read_bytes()) != _undated(b"\n".join(corpus.answers) + b"\n"):
            raise Finding("the answers are not those of a run without a journal")
        if journal.exists():
            raise Finding("the journal is still there")
    elif journal.read_bytes() != content:
        raise Finding(f"a journal that was refused was changed: {room.refused}")
    return f"journal: {note}"


def _damaged_journal(corpus: Corpus, random: Random) -> tuple[bytes, str]:
    header, *lines = corpus.journal.splitlines(keepends=True)
    lines = random.sample(lines, random.randrange(len(lines) + 1))
    what = random.choice(["bytes", "bytes", "foreign", "header", "shuffled", "twice", "forged"])
    note = what
    if what == "foreign":
        lines += random.sample(corpus.foreign.splitlines(keepends=True)[1:], 4)
        random.shuffle(lines)
    elif what == "header":
        header, how = damage.damage_bytes(header, random)
        note += f" {how}"
    elif what == "twice":
        lines += lines
    elif what == "forged":
        place = random.choice([b"-1", b"10", b"999999", b"x", b"", b"0.5", b"9" * 5000])
        rest = place + b' {"id": "forged"}'
        lines.insert(0, b"%08x %s\n" % (zlib.crc32(rest), rest))
        note += f" {place[:10]!r}"
    content = header + b"".join(lines)
    if what == "bytes":
        content, how = damage.damage_bytes(content, random)
        note += f" {how}"
    return content, note


def _undated(answers: bytes) -> list[str]:
    """The lines of an output without the seconds at which they were made."""
    lines = [json.loads(line) for line in answers.splitlines()]
    for line in lines:
        line.get("response", {}).get("body", {}).pop("created", None)
    return [json.dumps(line) for line in lines]


def _routing(room: Room, corpus: Corpus, random: Random) -> str:
    path, out = room.path / "routing.npz", room.path / "out.npz"
    sound = (corpus.path / f"{MIXTURE}.routing.npz").read_bytes()
    same = False
    if random.random() < 0.5:
        data, note = damage.damage_bytes(sound, random)
    else:
        data, note, same = _other_arrays(sound, random)
    path.write_bytes(data)
    files = "--input", corpus.sequences, "--output", out
    words = ["logits", corpus.model(MIXTURE), *files, "--compute-dtype", "float64"]
    if room.run(*words, "--replay-routing", path, makes=("out.npz",)):
        if wrong := compare_logits(read_logits(out), corpus.logits(MIXTURE)):
            raise Finding(wrong)
    elif same:
        raise Finding(f"a sound routing was refused: {room.refused}")
    return f"routing: {note}"


def _other_arrays(sound: bytes, random: Random) -> tuple[bytes, str, bool]:
    """An archive of other arrays; whether it says the same."""
    with np.load(io.BytesIO(sound)) as archive:
        arrays = dict(archive)
    about = json.loads(str(arrays["about"]))
    name = random.choice([name for name in arrays if name != "about"])
    array = arrays[name]
    what = random.choice(["order", "type", "kind", "short", "flat", "gone", "negative", "about"])
    write = np.savez
    if what == "order":
        order = np.random.default_rng(random.randrange(99)).permutation(len(arrays["token"]))
        arrays = {key: a if key == "about" else a[order] for key, a in arrays.items()}
        write = np.savez_compressed
    elif what == "type":
        arrays[name] = array.astype(np.float64 if name == "weights" else np.int32)
    elif what == "kind":
        other = random.choice([str, complex, bool, "M8[s]"])
        arrays[name] = array.astype(np.int64).astype(other)
    elif what == "short":
        arrays[name] = array[1:]
    elif what == "flat":
        arrays[name] = random.choice([array.reshape(-1, 1, 1), array[..., None], array[0]])
    elif what == "gone":
        del arrays[name]
    elif what == "negative":
        arrays[name] = array - array.max() - 1
    else:
        note = damage.damage_tree(about, random)
        text = damage.write_tree(about, random).decode("utf-8", "backslashreplace")
        arrays["about"] = np.array(text)
        what = f"about: {note}"
    file = io.BytesIO()
    write(file, **arrays)
    return file.getvalue(), f"{name} {what}", what in ("order", "type")


def _placement(room: Room, corpus: Corpus, random: Random) -> str:
    path = room.path / "places.json"
    note = _damage_json(corpus.path / "places.json", path, random, ("layers", "0", "1", "ep"))
    files = "--input", corpus.sequences, "--output", room.path / "out.npz"
    words = ["logits", corpus.model(MIXTURE), *files, "--compute-dtype", "float64"]
    flags = ["--tp", 2, "--ep", EP, "--expert-placement", path]
    if room.run(*words, *flags, makes=("out.npz",)):
        found = read_logits(room.path / "out.npz")
        if wrong := compare_logits(found, corpus.logits(MIXTURE)):
            raise Finding(wrong)
    return f"placement: {note}"


def _load(room: Room, corpus: Corpus, random: Random) -> str:
    path, out = room.path / "load.json", room.path / "places.json"
    likely = ("rows_of_experts", "experts", "loads", "layer")
    note = _damage_json(corpus.path / "load.json", path, random, likely)
    out.write_text("of before")
    if room.run("eplb", path, "--ep", EP, "-o", out, makes=("places.json",)):
        content = json.loads(out.read_bytes())
        for layer, ranks in content["layers"].items():
            experts = sorted(expert for rank in ranks for expert in rank)
            if (
                experts != list(range(content["experts"]))
                or len(ranks) != EP
                or not int(layer) >= 0
            ):
                raise Finding(f"experts are placed so: {content}")
    return f"load: {note}"


def _damage_json(sound: Path, damaged: Path, random: Random, likely: tuple[str, ...]) -> str:
    if random.random() < 0.2:
        data, note = damage.damage_bytes(sound.read_bytes(), random)
    else:
        tree = json.loads(sound.read_bytes())
        note = damage.damage_tree(tree, random, likely)
        data = damage.write_tree(tree, random)
    damaged.write_bytes(data)
    return note
