#!/usr/bin/env python3
"""Remake the table of published configurations: which are read, and why the others are not.

    python scripts/dev/tabulate_configs.py [DIRECTORY]

tests/golden/configs.txt has a line for each: its name, its verdict, and the family or the sentence
that refuses it. The configurations are in tests/golden/configs.jsonl.gz. With a DIRECTORY of files
OWNER__MODEL.json, that is made first: the fields of each ``config.json``, without those of towers,
labels and task settings, which nothing reads, and with the first of the modules that are not
quantized.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mpishard.config.reader import read_model_config  # noqa: E402
from mpishard.errors import UserError  # noqa: E402

CONFIGS = ROOT / "tests" / "golden" / "configs.jsonl.gz"
TABLE = ROOT / "tests" / "golden" / "configs.txt"

UNREAD = ("id2label", "label2id", "task_specific_params")
MOST_MODULES = 8  # that a list of a quantization_config keeps
TOWERS = ("vision_config", "audio_config", "audio_processor", "image_embd_layer", "embd_layer")


def main() -> None:
    if sys.argv[1:]:
        collect(Path(sys.argv[1]))
    lines = [f"{name}: {': '.join(verdict(raw))}\n" for name, raw in configs().items()]
    TABLE.write_text("".join(lines))
    accepted = sum(": accepted: " in line for line in lines)
    print(f"{accepted} of {len(lines)} configurations are accepted")


def configs() -> dict[str, dict[str, Any]]:
    """The content of each ``config.json``, by the name of the model."""
    with gzip.open(CONFIGS, "rt") as file:
        return dict(json.loads(line) for line in file)


def verdict(raw: dict[str, Any]) -> tuple[str, str]:
    """``accepted`` and the family, or ``refused`` and the sentence."""
    try:
        config = read_model_config(raw, None, "config.json")
    except UserError as error:
        return "refused", str(error)
    within = f" in {config.wrapper}" if config.wrapper else ""
    stored = f", {config.quantization.method}" if config.quantization else ""
    return "accepted", f"{config.family}{within}{stored}"


def collect(directory: Path) -> None:
    lines = []
    for path in sorted(directory.glob("*.json")):
        raw = json.loads(path.read_text())
        for fields in (raw, raw.get("text_config")):
            if isinstance(fields, dict):
                _drop_unread(fields)
        lines.append(json.dumps([path.stem.replace("__", "/"), raw], separators=(",", ":")) + "\n")
    with gzip.GzipFile(CONFIGS, "wb", mtime=0) as file:
        file.write("".join(lines).encode())


def _drop_unread(fields: dict[str, Any]) -> None:
    if "quantization_config" in fields:
        fields["quantization_config"] = _shortened(fields["quantization_config"])
    for name in UNREAD:
        fields.pop(name, None)
    for name in TOWERS:
        if isinstance(fields.get(name), dict):
            fields[name] = {"model_type": fields[name].get("model_type", "")}


def _shortened(value: Any) -> Any:
    """A value of a quantization_config with at most the first of its many modules."""
    if isinstance(value, list):
        return [_shortened(one) for one in value[:MOST_MODULES]]
    if isinstance(value, dict):
        kept = list(value)[:MOST_MODULES] if len(value) > 30 else list(value)  # by module
        return {name: _shortened(value[name]) for name in kept}
    return value


if __name__ == "__main__":
    main()
