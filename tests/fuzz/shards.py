"""Damaged shard directories.

Acceptable is a refusal, or the answer of the sound shards. Numbers that are mapped into memory are
not looked at before they are used: there, the answer may be another if ``inspect --verify`` refuses
the directory. Where shards are converted on the way (another dtype, resharding) it may not.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import h5py
import numpy as np

from fuzz import damage
from fuzz.corpus import DENSE, MIXTURE, Corpus
from fuzz.judge import compare_logits, read_logits
from fuzz.running import Finding, Room

BFLOAT16_TOLERANCE = 0.2  # of the sound model's numbers: only tells that nothing else went wrong
FLOAT32 = 1e-4


def shards(room: Room, corpus: Corpus, random: Random) -> str:
    """Damage a directory of shards; score with it, or convert it and score with that."""
    variant = random.choice([DENSE, MIXTURE])
    reshard = room.ranks == 1 and random.random() < 0.3
    made_for = 2 if reshard else room.ranks
    dtype = random.choice(["float32", "float32", "float64"])
    name = f"{variant}-tp{made_for}"
    model = room.path / "model"
    shutil.copytree(corpus.path / name, model)
    note = f"{name} {dtype} {'resharded ' * reshard}{_damage(model, random)}"
    inspected = room.run("inspect", model, ranks=1)
    sound = inspected and room.run("inspect", model, "--verify", ranks=1)
    flags = ["--input", corpus.sequences, "--output", room.path / "out.npz"]
    mapped = dtype == "float32" and not reshard
    if reshard:
        again = room.path / "again"
        if not room.run("shard", model, again, "--tp", 1, makes=("again/",)):
            return note
        model = again
    if room.run("logits", model, *flags, "--compute-dtype", dtype, makes=("out.npz",)):
        found, right = read_logits(room.path / "out.npz"), corpus.logits(variant)
        wrong = compare_logits(found, right, FLOAT32)
        if wrong and not mapped:
            raise Finding(f"{wrong}, though every number was converted")
        if wrong and sound:
            raise Finding(f"{wrong}, and inspect --verify found nothing")
        room.warned &= not wrong
    return note


def _damage(model: Path, random: Random) -> str:
    files = sorted(model.glob("rank-*.h5"))
    file = random.choice(files)
    what = random.choice([_bytes, _bytes, _structure, _structure, _structure, _small, _files])
    return what(model, file, random)


def _bytes(model: Path, file: Path, random: Random) -> str:
    """Damage bytes, more often where descriptions are than where numbers are."""
    stop = None if random.random() < 0.4 else random.choice([200, 2000, 8000, 66000])
    data, note = damage.damage_bytes(file.read_bytes(), random, stop)
    file.write_bytes(data)
    return f"{file.name}: {note}"


def _small(model: Path, file: Path, random: Random) -> str:
    """Damage the manifest or the configuration."""
    path = model / random.choice(["mpishard.json", "mpishard.json", "config.json"])
    if random.random() < 0.2:
        data, note = damage.damage_bytes(path.read_bytes(), random)
    else:
        tree = json.loads(path.read_bytes())
        likely = ("tp", "ep", "ranks", "mapping", "dtype", "format_version", "conversion")
        note = damage.damage_tree(tree, random, likely)
        data = damage.write_tree(tree, random)
    path.write_bytes(data)
    return f"{path.name}: {note}"


def _files(model: Path, file: Path, random: Random) -> str:
    """Take files away, swap them, or put others in their places."""
    what = random.choice(
        ["gone", "empty", "directory", "swapped", "surplus", "renamed", "no manifest"]
    )
    other = random.choice(sorted(model.glob("rank-*.h5")))
    data, others = file.read_bytes(), other.read_bytes()
    if what == "surplus":
        shutil.copyfile(file, model / "rank-00007-of-00009.h5")
    elif what == "no manifest":
        (model / "mpishard.json").unlink()
    elif what == "swapped":
        file.write_bytes(others)
        other.write_bytes(data)
    elif what == "renamed":
        file.rename(model / "rank-0.h5")
    else:
        file.unlink()
        if what == "empty":
            file.touch()
        elif what == "directory":
            file.mkdir()
    return f"{file.name} {what}"


def _structure(model: Path, file: Path, random: Random) -> str:
    """Change what HDF5 itself would let anybody change."""
    with h5py.File(file, "r+", locking=False) as content:
        name = random.choice(sorted(content))
        change = random.choice([*CHANGES, _attribute, _attribute, _attribute])
        return f"{file.name}: {change(content, name, random)}"


def _attribute(content: h5py.File, name: str, random: Random) -> str:
    holder = random.choice([content, content[name], content[name]])
    attribute = random.choice(sorted(holder.attrs))
    value = random.choice(ODD_ATTRIBUTES)
    del holder.attrs[attribute]
    note = f"{attribute} of {name if holder.name != '/' else 'the file'}"
    if random.random() < 0.2:
        return f"{note} removed"
    holder.attrs[attribute] = value
    return f"{note} = {value!r:.60}"


ODD_ATTRIBUTES = [
    *(0, 1, -1, 2.5, np.nan, "", "x", "float32", b"\xff\xfe", np.bool_(True), 2**63, -(2**63)),
    *(np.arange(3), np.zeros((2, 2)), np.array(["a", "b"], dtype="S1"), np.float64(1e300)),
    *(h5py.Empty("f4"), np.array([-1, 2**40]), np.array([0.5, 1.5]), np.zeros(0), "é" * 100),
    np.zeros(1, [("a", "i4"), ("b", "f8")]),
]


def _rewritten(array_of: Callable[[np.ndarray], np.ndarray], **options: object):
    """A change that writes a dataset anew, with its attributes."""

    def change(content: h5py.File, name: str, random: Random) -> str:
        attributes = dict(content[name].attrs)
        array = array_of(content[name][()])
        del content[name]
        new = content.create_dataset(name, data=array, **options)
        new.attrs.update(attributes)
        return f"{name} rewritten as {array.dtype} {array.shape} {options}"

    return change


def _moved(content: h5py.File, name: str, random: Random) -> str:
    other = random.choice(sorted(content))
    content.move(name, "between")
    if other != name:
        content.move(other, name)
    content.move("between", other if random.random() < 0.7 else "elsewhere")
    return f"{name} and {other} renamed"


def _removed(content: h5py.File, name: str, random: Random) -> str:
    del content[name]
    return f"{name} removed"


def _replaced(content: h5py.File, name: str, random: Random) -> str:
    attributes = dict(content[name].attrs)
    del content[name]
    what = random.choice(["group", "soft", "dangling", "external", "null", "type", "outside"])
    if what == "group":
        content.create_group(name).attrs.update(attributes)
    elif what == "soft":
        content[name] = h5py.SoftLink("/" + random.choice(sorted(content)))
    elif what == "dangling":
        content[name] = h5py.SoftLink("/nowhere")
    elif what == "external":
        content[name] = h5py.ExternalLink("../../nowhere.h5", "/x")
    elif what == "null":
        content.create_dataset(name, data=h5py.Empty("f4")).attrs.update(attributes)
    elif what == "type":
        content[name] = np.dtype("f4")
        content[name].attrs.update(attributes)
    else:
        data = content.create_dataset(
            name, (3, 4), "f4", external=[("outside.bin", 0, h5py.h5f.UNLIMITED)]
        )
        data.attrs.update(attributes)
    return f"{name} replaced: {what}"


def _added(content: h5py.File, name: str, random: Random) -> str:
    extra = random.choice(["extra", "model.layers.99.mlp.gate.weight", "a\nb", "x" * 3000])
    content[extra] = np.zeros(3, np.float32)
    if random.random() < 0.5:
        content[extra].attrs.update(dict(content[name].attrs))
    return f"{extra[:20]!r} added"


CHANGES = [
    _rewritten(lambda array: array[..., :-1]),
    _rewritten(lambda array: array.astype(np.float64)),
    _rewritten(lambda array: array.astype(np.int32)),
    _rewritten(lambda array: array.astype(">f4")),
    _rewritten(lambda array: array.reshape(-1)),
    _rewritten(lambda array: array + 1),
    _rewritten(lambda array: array, chunks=True),
    _rewritten(lambda array: array, chunks=True, compression="gzip"),
    _rewritten(lambda array: array),
    _moved,
    _removed,
    _replaced,
    _replaced,
    _added,
]
