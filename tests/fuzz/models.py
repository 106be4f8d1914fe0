"""Damaged Hugging Face directories: the small files, and the weights.

Acceptable is a refusal, or the answer that the oracle gives to what the files now say.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fuzz import damage
from fuzz.corpus import FAMILIES, GENERATE, MIXTURE, Corpus
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

CHAT_FILES = ("chat_template.jinja", "tokenizer_config.json")
SMALL_FILES = (*["config.json"] * 4, "tokenizer.json", *CHAT_FILES, "generation_config.json")
NUMBERS = (
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim"),
    *("vocab_size", "max_position_embeddings", "rope_theta", "factor", "rms_norm_eps", "rope_type"),
    *("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "n_group"),
    *("layer_types", "sliding_window", "eos_token_id", "architectures", "tie_word_embeddings"),
)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def configuration(room: Room, corpus: Corpus, random: Random) -> str:
    """Damage a small file of a model and score with it, or generate."""
    variant = random.choice(FAMILIES)
    model = room.path / "model"
    shutil.copytree(corpus.model(variant), model)
    there = [name for name in SMALL_FILES if (model / name).exists()]
    file = model / random.choice(there)
    note = f"{variant} {file.name}: {_damage_small_file(file, random)}"
    if file.name in CHAT_FILES or file.name == "generation_config.json" or random.random() < 0.2:
        _generate(room, model, chat=file.name in CHAT_FILES)
    else:
        score(room, model, corpus)
    return note


def _damage_small_file(file: Path, random: Random) -> str:
    data = file.read_bytes()
    how = random.random()
    if file.suffix != ".json" or how < 0.15:
        data, note = damage.damage_bytes(data, random)
    elif how < 0.25:
        data, note = damage.recode(data, random)
    else:
        tree = json.loads(data)
        times = random.choice([1, 1, 1, 2])
        note = ", ".join(damage.damage_tree(tree, random, NUMBERS) for _ in range(times))
        data = damage.write_tree(tree, random)
    file.write_bytes(data)
    return note


def score(room: Room, model: Path, corpus: Corpus) -> None:
    """Score with a model that may be damaged; Finding if the answer is wrong."""
    out = room.path / "out.npz"
    out.write_bytes(b"of before")
    files = "--input", corpus.sequences, "--output", out
    if room.run("logits", model, *files, "--compute-dtype", "float64", makes=("out.npz",)):
        found, right = read_logits(out), right_logits(model, corpus.sequences)
        with np.errstate(over="ignore"):  # in float32, in which the answer is
            finite = all(np.isfinite(logits.astype(np.float32)).all() for logits in right.values())
        # A masked key that is not a number reaches the oracle's earlier tokens as well.
        if not finite and not room.run("inspect", model, "--verify", ranks=1):
            room.warned, right = False, found
        room.warned &= finite
        if wrong := compare_logits(found, right):
            raise Finding(wrong)


def _generate(room: Room, model: Path, chat: bool) -> None:
    prompt = "the in"
    flags = ["--chat"] if chat else []
    if not room.run("generate", model, "--prompt", prompt, *GENERATE, *flags):
        return
    if chat:
        ids = chat_tokens(model, [{"role": "user", "content": prompt}])
    else:
        ids = tokens(model, prompt)
    check_answer(json.loads(room.last.out), right_answer(reference(model), ids, 4), len(ids))


def weights(room: Room, corpus: Corpus, random: Random) -> str:
    """Damage a safetensors file or the index, and score."""
    variant = random.choice(FAMILIES)
    in_parts = random.random() < 0.4
    model = room.path / "model"
    form = random.choice(["", "", "-float16", "-stacked" if variant == MIXTURE else ""])
    shutil.copytree(corpus.model(variant + ("-parts" if in_parts else form)), model)
    outside = room.path / "outside"
    if in_parts and random.random() < 0.6:
        note = _damage_index(model, outside, random)
    else:
        file = random.choice(sorted(model.glob("*.safetensors")))
        note = f"{file.name}: {_damage_weights(file, random)}"
    score(room, model, corpus)
    if outside.exists() and not room.refused:
        raise Finding("weights were read from outside of the directory")
    return f"{variant}: {note}"


def _damage_weights(file: Path, random: Random) -> str:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, numbers = data[8 : 8 + length], data[8 + length :]
    what = random.choice(
        ["header", "header", "header", "length", "bytes", "numbers", "twice", "file"]
    )
    if what == "header":
        tree = json.loads(header)
        if random.random() < 0.5:
            note = _damage_entry(tree, random)
        else:
            note = damage.damage_tree(tree, random, ("dtype", "shape", "data_offsets"))
        header = damage.write_tree(tree, random)
        length = len(header)
    elif what == "length":
        length = random.choice([0, 1, length - 1, length + 1, len(data), 2**31, 2**63, 2**64 - 1])
        note = f"length {length}"
    elif what == "bytes":
        header, note = damage.damage_bytes(header, random)
    elif what == "numbers":
        numbers, note = damage.damage_bytes(numbers, random)
    elif what == "twice":
        name, entry = random.choice(list(json.loads(header).items()))
        again = json.dumps({name: entry}).encode()
        header = again[:-1] + b"," + header.lstrip()[1:]
        length, note = len(header), f"{name} twice"
    else:
        return _damage_whole_file(file, random)
    file.write_bytes(length.to_bytes(8, "little") + header + numbers)
    return note


def _damage_entry(tree: dict[str, Any], random: Random) -> str:
    """Make an entry of a header say something possible that is not so."""
    names = [name for name in tree if name != "__metadata__"]
    name, other = random.sample(names, 2)
    entry = tree[name] = dict(tree[name])
    start, end = entry["data_offsets"]
    what, value = random.choice(
        [
            ("dtype", random.choice(["F16", "BF16", "I32", "F64", "F8_E4M3", "BOOL", "U8", "x"])),
            ("shape", entry["shape"][::-1]),
            ("shape", [*entry["shape"], 1]),
            ("shape", [-size for size in entry["shape"]]),
            ("shape", [2**62, 4]),
            ("shape", [0]),
            ("data_offsets", [start + 4, end + 4]),
            ("data_offsets", [end, start]),
            ("data_offsets", [start, 2**63]),
            ("data_offsets", tree[other]["data_offsets"]),
        ]
    )
    if random.random() < 0.2:
        tree[name], tree[other] = tree[other], tree[name]
        return f"{name} and {other} changed places"
    entry[what] = value
    return f"{name} has {what} {value}"


def _damage_whole_file(file: Path, random: Random) -> str:
    what = random.choice(["gone", "empty", "directory", "a page of zeros", "link to itself"])
    file.unlink()
    if what == "empty":
        file.touch()
    elif what == "directory":
        file.mkdir()
    elif what == "a page of zeros":
        file.write_bytes(bytes(4096))
    elif what == "link to itself":
        file.symlink_to(file.name)
    return what


def _damage_index(model: Path, outside: Path, random: Random) -> str:
    path = model / INDEX
    tree = json.loads(path.read_bytes())
    name = random.choice(list(tree["weight_map"]))
    file = tree["weight_map"][name]
    what = random.choice(["outside", "outside", "file", "tree", "tree", "bytes", "swap"])
    note = f"{what} {name}"
    if what == "outside":
        outside.mkdir()
        shutil.copyfile(model / file, outside / file)
        where = random.choice([f"../outside/{file}", str(outside / file)])
        tree["weight_map"] |= {n: where for n, f in tree["weight_map"].items() if f == file}
        (model / file).unlink()
    elif what == "file":
        odd = ["", ".", "..", "config.json", "x" * 300, "a\0b", "\ud800", "/", "/dev/null", "x/y"]
        tree["weight_map"][name] = random.choice([*odd, INDEX, "no.safetensors"])
        note += f" in {tree['weight_map'][name][:20]!r}"
    elif what == "swap":
        files = sorted(set(tree["weight_map"].values()))
        tree["weight_map"] = {n: files[f == files[0]] for n, f in tree["weight_map"].items()}
    elif what == "bytes":
        data, note = damage.damage_bytes(path.read_bytes(), random)
        path.write_bytes(data)
        return f"index: {note}"
    else:
        note = damage.damage_tree(tree, random, ("weight_map",))
    path.write_bytes(damage.write_tree(tree, random))
    return f"index: {note}"
