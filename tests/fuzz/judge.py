"""What the right answer is, as the oracle, the safetensors and the tokenizers library see it.

What a configuration means is for `mpishard.config.reader` to say; that the ranks compute what
it means is checked against `mpishard.reference`, which reads no file itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from fuzz.running import Finding
from mpishard.reference import Reference
from mpishard.storage.model_dir import read_config

TOLERANCE = 1e-6  # of the largest logit, in float64, where damage can make numbers large
FLOAT32_TOLERANCE = 1e-4


def reference(model: Path) -> Reference:
    """The oracle of a Hugging Face directory."""
    if (model / "model.safetensors").exists():
        return _oracle(model, load_file(model / "model.safetensors"))
    index = json.loads((model / "model.safetensors.index.json").read_bytes())
    places = index["weight_map"]
    files = {name: load_file(model / name) for name in dict.fromkeys(places.values())}
    weights = {name: array for arrays in files.values() for name, array in arrays.items()}
    weights |= {name: files[file][name] for name, file in places.items()}
    return _oracle(model, weights)


def _oracle(model: Path, weights: dict[str, np.ndarray]) -> Reference:
    with np.errstate(all="ignore"):  # numbers may be damaged
        return Reference(read_config(model), weights)


def right_logits(model: Path, lines: Path) -> dict[str, np.ndarray]:
    """The logits of each line of sequences to score."""
    oracle, right = reference(model), {}
    for line in map(json.loads, lines.read_text().splitlines()):
        ids = line["input_ids"] if "input_ids" in line else tokens(model, line["prompt"])
        with np.errstate(all="ignore"):
            right[str(line["id"])] = oracle.forward(ids)[0]
    return right


def compare_logits(
    found: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray], tolerance: float = TOLERANCE
) -> str:
    """How the answers differ, "" if they do not. float32 holds no more than its largest number."""
    if sorted(found) != sorted(right):
        return f"answers are {sorted(found)}, not {sorted(right)}"
    for name, right_SV in right.items():
        with np.errstate(all="ignore"):
            right_SV = right_SV.astype(np.float32).astype(np.float64)
        bound = tolerance * max([1.0, *np.abs(right_SV[np.isfinite(right_SV)])])
        if found[name].shape != right_SV.shape:
            return f"{name} has shape {found[name].shape}, not {right_SV.shape}"
        if not np.allclose(found[name], right_SV, FLOAT32_TOLERANCE, bound, equal_nan=True):
            return f"the logits of {name} are wrong"
    return ""


def read_logits(path: Path) -> dict[str, np.ndarray]:
    """What ``mpishard logits`` wrote."""
    with np.load(path) as archive:
        return dict(archive)


def tokens(model: Path, text: str, add_special_tokens: bool = True) -> list[int]:
    """The token ids of a text."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


def chat_tokens(model: Path, messages: list[dict[str, Any]]) -> list[int]:
    """The token ids of a conversation, in a template as simple as the tiny models' is."""
    settings = json.loads((model / "tokenizer_config.json").read_bytes())
    own = model / "chat_template.jinja"
    template = own.read_text(encoding="utf-8") if own.exists() else settings["chat_template"]
    if isinstance(template, list):
        template = next(one["template"] for one in template if one["name"] == "default")
    named = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in settings.items()
        if name.endswith("_token")
    }
    named = {name: value for name, value in named.items() if isinstance(value, str)}
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(template).render(
        messages=messages, add_generation_prompt=True, **named
    )
    return tokens(model, text, add_special_tokens=False)


def right_answer(
    oracle: Reference, ids: Sequence[int], most: int, ignore_eos: bool = False
) -> tuple[list[int], str]:
    """The greedy answer of at most so many tokens, and why it ends."""
    room = oracle.config.max_position_embeddings - len(ids) + 1
    answer: list[int] = []
    with np.errstate(all="ignore"):
        while len(answer) < min(most, room):
            answer += oracle.greedy([*ids, *answer], 1)
            if answer[-1] in oracle.config.eos_ids and not ignore_eos:
                return answer, "stop"
    return answer, "length"


def check_answer(found: dict[str, Any], right: tuple[list[int], str], prompt_tokens: int) -> None:
    """Raises Finding unless a plain answer is the right one."""
    said = found["output_ids"], found["finish_reason"]
    if said != right or found["prompt_tokens"] != prompt_tokens:
        raise Finding(f"the answer {said} to {prompt_tokens} tokens should be {right}: {found}")
