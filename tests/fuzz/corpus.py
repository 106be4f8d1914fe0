"""The inputs before they are damaged, and what is answered to them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from tiny_models import write_checkpoint
from tiny_text import CHAT_TEMPLATE, write_speaker

from fuzz.judge import read_logits
from fuzz.running import Room
from mpishard.batch.job import BatchJob

FAMILIES = (
    *("llama-gqa", "llama-linear-old", "mistral-window", "qwen2-yarn-new", "qwen3-mixed"),
    *("mixtral-full", "qwen2_moe-shared", "gpt_oss-plain", "deepseek_v2-lite"),
    "deepseek_v3-groups",
)
DENSE, MIXTURE = "llama-gqa", "mixtral-full"
EP = 2  # of placements

SEQUENCES: list[dict[str, Any]] = [
    {"id": "a", "input_ids": [3, 17, 5, 40, 41, 9, 28]},
    {"id": "b", "input_ids": [1, 30, 31]},
    {"id": "text", "prompt": "the in a re"},
]
GENERATE = ("--max-tokens", 4, "--compute-dtype", "float64", "--json")

# Requests of a batch, in both forms; those with a temperature depend on their place.
ANSWERED = ("--max-tokens", 5, "--compute-dtype", "float64")
REQUESTS: list[dict[str, Any]] = [
    {"id": "plain", "prompt": "the in"},
    {"id": 7, "input_ids": [3, 4, 5], "max_tokens": 3},
    {"id": "é €", "prompt": "a é (€) re"},
    {"id": "warm", "prompt": "in the", "temperature": 0.8, "top_p": 0.9, "seed": 3},
    {"id": "stop", "prompt": "lad", "stop": ["e", "th"], "ignore_eos": True},
    {"id": "long", "input_ids": list(range(5, 45)), "max_tokens": 2},
    {
        "custom_id": "chat",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "m",
            "messages": [
                {"role": "system", "content": "in"},
                {"role": "user", "content": [{"type": "text", "text": "the"}]},
            ],
            "max_completion_tokens": 4,
        },
    },
    {
        "custom_id": "complete",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": [9, 8, 7], "max_tokens": 3, "temperature": 0, "n": 1, "user": "u"},
    },
    {"id": "wrong", "prompt": 3},
    {"id": "tail", "prompt": "on", "max_tokens": 1, "top_k": 3, "min_p": 0.1, "temperature": 2},
]


@dataclass
class Corpus:
    """Everything sound, below a directory."""

    path: Path
    limit: float
    requests: list[bytes] = field(default_factory=list)  # as lines
    answers: list[bytes] = field(default_factory=list)  # to the requests

    def __post_init__(self) -> None:
        self.path.mkdir()
        self.room = Room(self.path, 1, self.limit)
        for variant in FAMILIES:
            self._write_model(variant)
        self.sequences = self.path / "sequences.jsonl"
        self.sequences.write_text("".join(json.dumps(line) + "\n" for line in SEQUENCES))
        self._write_shards()
        self._answer_requests()
        self._route()

    def model(self, variant: str) -> Path:
        """The Hugging Face directory of a tiny model."""
        return self.path / variant

    def logits(self, name: str) -> dict[str, np.ndarray]:
        """The logits of `SEQUENCES` in float64, of shards or of a model."""
        return read_logits(self.path / f"{name}.npz")

    def _run(self, *words: object, makes: tuple[str, ...] = ()) -> None:
        if not self.room.run(*words, makes=makes):
            raise SystemExit(f"what is sound was refused: {self.room.refused}")

    def _write_model(self, variant: str) -> None:
        """A model in one file, in two with an index, in float16, and with experts stored
        together."""
        path = write_speaker(variant, self.model(variant))
        ids = {"eos_token_id": [2], "bos_token_id": 1}
        (path / "generation_config.json").write_text(json.dumps(ids))
        if variant in (DENSE, MIXTURE):
            (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        forms: dict[str, dict[str, Any]] = {"parts": {"shards": 2}, "float16": {"dtype": "float16"}}
        if variant == MIXTURE:
            forms["stacked"] = {"stacked": True}
        for form, how in forms.items():
            other = write_checkpoint(variant, self.path / f"{variant}-{form}", **how)
            for file in path.iterdir():
                if not (other / file.name).exists() and file.suffix != ".safetensors":
                    shutil.copyfile(file, other / file.name)

    def _write_shards(self) -> None:
        """Shards for one rank and for two, of a dense model and of a mixture."""
        for variant in (DENSE, MIXTURE):
            ep = ["--ep", EP] if variant == MIXTURE else []
            for name, flags in (
                ("tp1", ["--tp", 1]),
                ("tp1-bfloat16", ["--tp", 1, "--dtype", "bfloat16"]),
                ("tp2", ["--tp", 2, *ep]),
            ):
                out = f"{variant}-{name}"
                self._make("shard", self.model(variant), self.path / out, *flags, out=out)
            self._score(variant, self.model(variant))

    def _make(self, *words: object, out: str) -> None:
        """Run a command that makes a directory."""
        self._run(*words, makes=(f"{out}/",))

    def _score(self, name: str, model: Path, *flags: object) -> None:
        files = "--input", self.sequences, "--output", self.path / f"{name}.npz"
        made = (f"{name}.npz", f"{name}.routing.npz")
        self._run("logits", model, *files, "--compute-dtype", "float64", *flags, makes=made)

    def _answer_requests(self) -> None:
        """A batch, done, and its journal as it was just before the end."""
        texts = (json.dumps(line, ensure_ascii=False) for line in REQUESTS)
        self.requests = [text.encode() for text in texts]
        (self.path / "in.jsonl").write_bytes(b"".join(line + b"\n" for line in self.requests))
        with patch.object(BatchJob, "finish", lambda task: None):
            self._batch("unfinished.jsonl")
        journal = self.path / "unfinished.jsonl.journal"
        self.journal = journal.rename(self.path / "journal").read_bytes()
        self._batch("other.jsonl", "--seed", 5)
        with patch.object(BatchJob, "finish", lambda task: None):
            self._batch("foreign.jsonl", "--seed", 6)
        self.foreign = (self.path / "foreign.jsonl.journal").read_bytes()
        self._batch("out.jsonl")
        self.answers = (self.path / "out.jsonl").read_bytes().splitlines()

    def _batch(self, out: str, *flags: object) -> None:
        files = "--input", self.path / "in.jsonl", "--output", self.path / out
        makes = (out, f"{out}.journal")
        self._run("batch", self.model(DENSE), *files, *ANSWERED, *flags, makes=makes)

    def _route(self) -> None:
        """A recorded routing, counted loads and a placement that comes of them."""
        routing = self.path / f"{MIXTURE}.routing.npz"
        self._score(MIXTURE, self.model(MIXTURE), "--record-routing", routing)
        words = ["generate", self.model(MIXTURE), "--prompt", "the in a", *GENERATE]
        self._run(*words, "--expert-load", self.path / "load.json", makes=("load.json",))
        words = ["eplb", self.path / "load.json", "--ep", EP, "--redundant-experts", 2, "-o"]
        self._run(*words, self.path / "places.json", makes=("places.json",))
