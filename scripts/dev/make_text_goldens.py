"""Writes ``tests/golden/text.json``: what transformers makes of the tokenizers, texts, chat
templates and conversations of ``tests/text_cases.py``.

    pip install 'transformers>=5' && python scripts/dev/make_text_goldens.py

It needs no torch. ``--compare`` writes nothing and prints where the installed version of
transformers differs from the file; that is how an older version is looked at.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import text_cases  # noqa: E402
import tiny_tokenizers  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "text.json"


class Today(datetime):
    """The day on which all templates are rendered."""

    @classmethod
    def now(cls, tz: Any = None) -> Today:
        return cls(2026, 2, 3, 4, 5)


def tokens(directory: Path) -> dict[str, Any]:
    """The ids of all texts, and the ids that decoding leaves out; nothing of what is refused."""
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory))
    except Exception:
        return {"ids": None, "special": None}
    skipped = [
        token
        for token in range(len(tokenizer))
        if not tokenizer.decode([token], skip_special_tokens=True) and tokenizer.decode([token])
    ]
    return {"ids": [tokenizer(text)["input_ids"] for text in text_cases.TEXTS], "special": skipped}


def rendered(directory: Path) -> list[str | None]:
    """What the chat template makes of all conversations; None where it is refused."""
    texts: list[str | None] = []
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory))
    except Exception:
        return [None for _ in text_cases.CONVERSATIONS]
    for conversation in text_cases.CONVERSATIONS.values():
        given = {"add_generation_prompt": True, **conversation}
        messages = json.loads(json.dumps(given.pop("messages")))
        try:
            texts.append(tokenizer.apply_chat_template(messages, tokenize=False, **given))
        except Exception:
            texts.append(None)
    return texts


def collect(room: Path) -> dict[str, Any]:
    """All of it, by the names of the cases."""
    content: dict[str, Any] = {"tokens": {}, "templates": {}}
    for place, (name, make) in enumerate(text_cases.DIRECTORIES.items()):
        directory = text_cases.write(room / f"tokens-{place}", *make())
        content["tokens"][name] = tokens(directory)
    for place, (name, files) in enumerate(text_cases.TEMPLATES.items()):
        tokenizer = tiny_tokenizers.byte_level()
        directory = text_cases.write(room / f"templates-{place}", tokenizer, files)
        content["templates"][name] = rendered(directory)
    return content


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """The places at which two collections differ."""
    if isinstance(old, dict):
        return [line for key in new for line in differences(old[key], new[key], f"{where}/{key}")]
    if (
        isinstance(old, list)
        and isinstance(new, list)
        and len(old) == len(new)
        and not all(isinstance(x, int) for x in old)
    ):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for place, pair in pairs for line in differences(*pair, f"{where}/{place}")]
    return [] if old == new else [f"{where}\n  {old!r}\n  {new!r}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compare", action="store_true")
    args = parser.parse_args()
    chat_template_utils.datetime = Today
    with tempfile.TemporaryDirectory() as room:
        content = collect(Path(room))
    if args.compare:
        print("\n".join(differences(json.loads(GOLDEN.read_text()), content)))
        return
    content = {"transformers": transformers.__version__, **content}
    # One case a line.
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    text = text.replace('"ids":[[', '\n"ids":[[').replace('],"', '],\n"')
    GOLDEN.write_text(text + "\n", encoding="utf-8")
    pairs = [
        len(content[kind]) * len(cases)
        for kind, cases in (("tokens", text_cases.TEXTS), ("templates", text_cases.CONVERSATIONS))
    ]
    print(f"{GOLDEN}: {pairs[0]} of text and tokenizer, {pairs[1]} of template and conversation")


if __name__ == "__main__":
    main()
