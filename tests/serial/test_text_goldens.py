"""Tokens of text and rendered conversations are those of transformers, whatever stands beside
tokenizer.json."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import text_cases
import tiny_tokenizers

from mpishard.errors import UserError
from mpishard.tokenizer import Tokenizer, template_environment

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "text.json").read_text("utf-8"))


class Today(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Today:
        return cls(2026, 2, 3, 4, 5)


def test_the_golden_file_has_all_cases():
    assert GOLDEN["tokens"].keys() == text_cases.DIRECTORIES.keys()
    assert GOLDEN["templates"].keys() == text_cases.TEMPLATES.keys()
    assert len(GOLDEN["tokens"]) * len(text_cases.TEXTS) >= 300
    assert len(GOLDEN["templates"]) * len(text_cases.CONVERSATIONS) >= 70


@pytest.mark.parametrize("name", text_cases.DIRECTORIES)
def test_tokens_of_text(tmp_path, name):
    text = Tokenizer(text_cases.write(tmp_path / "model", *text_cases.DIRECTORIES[name]()))
    golden = GOLDEN["tokens"][name]
    for said, ids in zip(text_cases.TEXTS, golden["ids"], strict=True):
        assert text.encode(said) == ids, said
    assert sorted(text.special_texts) == golden["special"]


@pytest.mark.parametrize("name", text_cases.TEMPLATES)
def test_conversations(tmp_path, monkeypatch, name):
    monkeypatch.setattr(template_environment, "datetime", Today)
    tokenizer = tiny_tokenizers.byte_level()
    directory = text_cases.write(tmp_path / "model", tokenizer, text_cases.TEMPLATES[name])
    text = Tokenizer(directory)
    cases = zip(text_cases.CONVERSATIONS.items(), GOLDEN["templates"][name], strict=True)
    for (what, conversation), golden in cases:
        given = dict(conversation)
        messages = given.pop("messages")
        if golden is None:
            with pytest.raises(UserError):
                text.chat_template.render(messages, **given)
        else:
            assert text.chat_template.render(messages, **given) == golden, what
            ids = text.tokenizer.encode(golden, add_special_tokens=False).ids
            assert text.chat(messages, given) == ids
