"""How many tokens a text has at least: never more than there are, for tokenizers of every kind, and
enough to refuse what is far too long without encoding it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from tiny_text import make_tokenizer
from tokenizers import (
    AddedToken,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
)

from mpishard import tokenizer as package
from mpishard.errors import UserError
from mpishard.tokenizer.length_bound import LengthBound

DATA = Path(__file__).parents[2] / "data"
BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}


def bpe(tokens: list[str], merges: list[tuple[str, str]] = (), **options: Any) -> Tokenizer:  # type: ignore[assignment]
    vocab = {token: place for place, token in enumerate(dict.fromkeys(tokens))}
    return Tokenizer(models.BPE(vocab, list(merges), **options))


def with_special(tokenizer: Tokenizer, **flags: bool) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken("<|a long special token|>", special=True, **flags)])
    return tokenizer


def byte_level(**flags: bool) -> Tokenizer:
    tokenizer = with_special(make_tokenizer(), **flags)
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def sentencepiece(**options: Any) -> Tokenizer:
    """As Llama 2's: a space is ▁, the whole text is one word, unknown characters are bytes."""
    letters = [*"▁abcdefgh", "▁a", "▁▁", "▁▁▁▁", "abc", "bc"]
    merges = [("▁", "a"), ("▁", "▁"), ("▁▁", "▁▁"), ("b", "c"), ("a", "bc")]
    tokenizer = bpe(
        ["<unk>", *BYTES, *letters], merges, unk_token="<unk>", fuse_unk=True, **options
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return with_special(tokenizer)


def unigram() -> Tokenizer:
    """Unknown neighbours become one token; q stands in a token, but is none."""
    pieces = [
        ("<unk>", 0.0),
        ("▁", -2.0),
        ("▁abc", -3.0),
        *((one, -4.0) for one in "abcde"),
        ("qe", -3.0),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return with_special(tokenizer)


def of_words(kind: Callable[..., Any], **options: Any) -> Tokenizer:
    vocab = {one: place for place, one in enumerate(["[UNK]", "abc", "a", "##b", "##c", "the"])}
    tokenizer = Tokenizer(kind(vocab, unk_token="[UNK]", **options))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return with_special(tokenizer)


def end_of_word() -> Tokenizer:
    """As CLIP's: the last token of a word differs."""
    letters = [*"abc", *(f"{one}</w>" for one in "abcd"), "bc</w>"]
    tokenizer = bpe(["<unk>", *letters], [("b", "c</w>")], unk_token="<unk>", fuse_unk=True,
                    end_of_word_suffix="</w>")  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return with_special(tokenizer)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "byte level, spaces vanish": lambda: byte_level(lstrip=True, rstrip=True),
    "byte level of few characters": lambda: with_special(make_tokenizer(120)),
    "sentencepiece": lambda: sentencepiece(byte_fallback=True),
    "sentencepiece, fused": sentencepiece,
    "unigram": unigram,
    "words": lambda: of_words(models.WordLevel),
    "word pieces": lambda: of_words(models.WordPiece),
    "end of word": end_of_word,
    "data": lambda: Tokenizer.from_file(str(DATA / "cpython-4m" / "tokenizer.json")),
}
PIECES = [
    *(
        " ",
        "     ",
        "\n",
        "\t",
        "a",
        "abc",
        "qqqq",
        "qe",
        "bc",
        "the",
        "e\u0301",
        "\u0301" * 9,
        "é",
    ),
    *("€", "😀😀", "\u200d", "\ufdfa", "Straße", "<|a long special token|>", "=" * 40, "0123", "ﬁ"),
    *("\u1100\u1161\u11a8", "def f(x):", ".", "\u0000", "<unk>", "</s>"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bound_is_never_more_than_there_are(kind, monkeypatch):
    """In chunks of any size, of texts of all kinds of characters."""
    tokenizer, draw = KINDS[kind](), random.Random(kind)
    bound = LengthBound(tokenizer)
    for size in (7, 50, 2**16):
        monkeypatch.setattr("mpishard.tokenizer.length_bound.CHUNK", size)
        for _ in range(60):
            few = draw.choices(PIECES, k=draw.choice([1, 3, len(PIECES)]))
            text = "".join(draw.choices(few, k=draw.choice([3, 40, 200])))
            there_are = len(tokenizer.encode(text, add_special_tokens=False).ids)
            assert bound.at_least(text, 10**9) <= there_are, text


@pytest.mark.parametrize("kind", KINDS)
def test_a_bound_grows_with_the_text(kind):
    """It is worth something: at least a fortieth of the tokens of an ordinary text, although the
    longest token has 24 characters and more."""
    tokenizer = KINDS[kind]()
    text = "the abc a bc, def e(abc):\n" * 500
    there_are = len(tokenizer.encode(text, add_special_tokens=False).ids)
    assert LengthBound(tokenizer).at_least(text, 10**9) >= there_are / 40


def test_no_more_is_looked_at_than_is_needed():
    bound = LengthBound(make_tokenizer())
    words = bound._words = Mock(side_effect=bound._words)  # type: ignore[method-assign]
    assert bound.at_least("a b " * 10**6, 100) >= 100
    assert words.call_count == 1


def test_a_model_that_is_not_known_has_no_bound():
    class Other:
        model = normalizer = pre_tokenizer = None

        def get_added_tokens_decoder(self) -> dict[int, AddedToken]:
            return {}

    assert LengthBound(Other()).at_least("a" * 10**6, 9) == 0  # type: ignore[arg-type]


def test_a_prompt_of_megabytes_is_refused_before_it_is_encoded(monkeypatch):
    text = package.Tokenizer(DATA / "cpython-4m", most_tokens=1024)
    monkeypatch.setattr(text, "tokenizer", Mock(wraps=text.tokenizer, spec=text.tokenizer))
    text._length_bound = LengthBound(Tokenizer.from_file(str(DATA / "cpython-4m/tokenizer.json")))
    with pytest.raises(UserError) as refused:
        text.encode("x = [y for y in z]\n" * 600_000)
    assert "the prompt of 11400000 characters has at least " in str(refused.value)
    assert str(refused.value).endswith(
        " tokens, but the model has only 1024 positions; shorten it, or allow more with "
        "--max-model-len"
    )
    text.tokenizer.encode.assert_not_called()  # type: ignore[attr-defined]
    assert len(text.encode("=" * 8193)) <= 1024, "what may fit is encoded"
