"""Tokenizers of checkpoints without tokenizer.json, beside the libraries that they belong to."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers

from mpishard.errors import UserError
from mpishard.storage.model_dir import companions
from mpishard.tokenizer import Tokenizer, has_tokenizer, vocabularies

TEXTS = (
    *("", "hello", " hello  the world in on", "é€漢 \U0001f680", "\n\n  the\tin\n", "don't 0123"),
    *("<tool>hello<|im_end|> the<tool>", "▁x", "x  ", "HELLO ﬁ Ａ", "cafe\u0301"),
)


def write(directory: Path, **files: Any) -> Path:
    directory.mkdir()
    for name, content in files.items():
        name = name.replace("_DOT_", ".")
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name).write_text(text, encoding="utf-8")
    return directory


# vocab.json and merges.txt


def merges_files() -> dict[str, Any]:
    tree = json.loads(tiny_tokenizers.byte_level().to_str())["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in tree["merges"]]
    vocab = {**tree["vocab"], "<|endoftext|>": len(tree["vocab"])}
    return {"vocab_DOT_json": vocab, "merges_DOT_txt": "#version: 0.2\n" + "\n".join(pairs) + "\n"}


@pytest.mark.parametrize(
    "name, kind", [("GPT2Tokenizer", "byte level"), ("Qwen2TokenizerFast", "byte level, split")]
)
def test_byte_level_vocabularies(tmp_path, name, kind):
    config = {"tokenizer_class": name, "additional_special_tokens": ["<|im_end|>"]}
    directory = write(tmp_path / "m", **merges_files(), tokenizer_config_DOT_json=config)
    assert has_tokenizer(directory)
    text, right = Tokenizer(directory), tiny_tokenizers.KINDS[kind]()
    for said in TEXTS:
        said = said.replace("<tool>", "")
        words = [text.tokenizer.id_to_token(token) for token in text.encode(said)]
        assert words == right.encode(said).tokens
        if kind == "byte level":
            assert text.decode(text.encode(said)) == said.replace("<|im_end|>", "")
    assert text.names["eos_token"] == "<|endoftext|>"


def test_a_class_whose_pattern_is_not_known(tmp_path):
    config = {"tokenizer_class": "RobertaTokenizer"}
    directory = write(tmp_path / "m", **merges_files(), tokenizer_config_DOT_json=config)
    assert not has_tokenizer(directory)
    with pytest.raises(UserError, match="'RobertaTokenizer', and no tokenizer.json; without one"):
        Tokenizer(directory)


# tekken.json


def tekken() -> dict[str, Any]:
    words = [bytes([byte]) for byte in range(256)]
    words += [
        b"he",
        b"ll",
        b"hell",
        b"hello",
        b" t",
        b" the",
        b"\xc3\xa9",
        b"in",
        b" in",
        b"beyond",
    ]
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    return {
        "config": {
            "pattern": r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+",
            "default_vocab_size": len(words) - 1 + 8,
            "default_num_special_tokens": 8,
        },
        "vocab": [
            {"rank": place, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
            for place, word in enumerate(words)
        ],
        "special_tokens": [
            {"rank": place, "token_str": token, "is_control": True}
            for place, token in reversed(list(enumerate(special)))
        ],
    }


def test_a_tekken_vocabulary(tmp_path):
    text = Tokenizer(write(tmp_path / "m", tekken_DOT_json=tekken()))
    words = [text.tokenizer.id_to_token(token) for token in text.encode("hello the é")]
    assert words == ["<s>", "hello", "Ġthe", "Ġ", "Ã©"]
    assert text.encode("h") == [1, 8 + ord("h")], "special tokens, and room for some, come first"
    assert text.tokenizer.token_to_id("<SPECIAL_7>") == 7
    assert text.tokenizer.token_to_id("beyond") is None
    for said in TEXTS:
        assert text.decode(text.encode(said)) == said
    assert Tokenizer(tmp_path / "m", add_bos=False).encode("h") == [8 + ord("h")]


@pytest.mark.parametrize(
    "damage",
    [{"config": 3}, {"vocab": [{}]}, {"special_tokens": None}, {"config": {"pattern": "["}}],
)
def test_a_damaged_tekken_vocabulary(tmp_path, damage):
    directory = write(tmp_path / "m", tekken_DOT_json=tekken() | damage)
    with pytest.raises(UserError, match="tekken.json is not a tekken vocabulary that can be read"):
        Tokenizer(directory)


# tokenizer.model

MODELS: dict[str, dict[str, Any]] = {
    "bpe": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
    "bpe with its own symbols": {
        "model_type": "bpe",
        "byte_fallback": True,
        "user_defined_symbols": ["<tool>", "<|im_end|>"],
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    },
    "unigram": {"model_type": "unigram"},
    "unigram with bytes": {
        "model_type": "unigram",
        "byte_fallback": True,
        "control_symbols": ["<c>"],
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_a_sentencepiece_model(tmp_path, name):
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    sentences = [f"hello the world in on don't 0123 é € {one}" * 2 for one in "abcdefghijklm"]
    options = MODELS[name]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 2),
        model_writer=model,
        vocab_size=310 if options.get("byte_fallback") else 40,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    directory = write(tmp_path / "m")
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    right = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    text = Tokenizer(directory)
    for said in TEXTS:
        ids = right.encode(said)
        assert text.encode(said) == ids, said
        if 0 not in ids and said != "▁x":  # it drops all spaces that begin a text, we drop one
            assert text.decode(ids) == right.decode(ids)
    assert text.names["bos_token"] == "<s>" and {1, 2} <= text.special_texts.keys()
    (directory / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    assert Tokenizer(directory).encode("hello") == [1, *right.encode("hello")]
    (directory / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(UserError, match="not a SentencePiece model; if it is a tiktoken vocab"):
        Tokenizer(directory)


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(vocabularies, "sentencepiece_model_pb2", None)
    directory = write(tmp_path / "m", tokenizer_DOT_model="x")
    assert not has_tokenizer(directory)
    with pytest.raises(UserError, match=r"`pip install 'mpishard\[sentencepiece\]'`, or make a"):
        Tokenizer(directory)


# What is not read


@pytest.mark.parametrize(
    "name, what",
    [
        ("qwen.tiktoken", "a tiktoken vocabulary"),
        ("tiktoken.model", "a tiktoken vocabulary"),
        ("tokenizer.model.v3", "a vocabulary of an older version of mistral-common"),
        ("spiece.model", "a SentencePiece model of an encoder"),
        ("vocab.txt", "a WordPiece vocabulary"),
    ],
)
def test_others_are_refused_by_name(tmp_path, name, what):
    directory = write(tmp_path / "m")
    (directory / name).write_text("x")
    assert not has_tokenizer(directory)
    with pytest.raises(UserError, match=f"{name} is {what}.* which is not read: make a tokenizer"):
        Tokenizer(directory)


def test_a_tokenizer_json_counts_before_all_others(tmp_path):
    directory = write(tmp_path / "m", tekken_DOT_json="{", vocab_DOT_txt="x", vocab_DOT_json="{")
    tiny_tokenizers.byte_level().save(str(directory / "tokenizer.json"))
    assert has_tokenizer(directory) and Tokenizer(directory).encode("hello")


def test_all_of_it_goes_where_shards_go(tmp_path):
    directory = write(
        tmp_path / "m", tekken_DOT_json="{", vocab_DOT_json="{", chat_template_DOT_jinja=""
    )
    for folder in ("chat_templates", "additional_chat_templates"):
        (directory / folder).mkdir()
        (directory / folder / "rag.jinja").write_text(folder)
    assert set(companions(directory)) == {
        *("additional_chat_templates/rag.jinja", "chat_templates/rag.jinja"),
        *("chat_template.jinja", "tekken.json", "vocab.json"),
    }
