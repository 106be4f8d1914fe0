"""Texts of single tokens, which stand beside log-probabilities."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_text import make_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from mpishard.batch.texts import AnswerTexts
from mpishard.tokenizer import Tokenizer as ModelTokenizer


def texts_of(tokenizer: Tokenizer, directory: Path) -> tuple[AnswerTexts, ModelTokenizer]:
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    read = ModelTokenizer(directory)
    return AnswerTexts(read), read


def test_a_token_keeps_its_space_where_decoders_strip_the_first(tmp_path):
    """As Llama 2's, whose bytes are tokens, too."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁b"]
    vocab = {piece: place for place, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "b")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    texts, read = texts_of(tokenizer, tmp_path)
    assert [texts.of_token(vocab[one]) for one in ("▁b", "b", "▁")] == [" b", "b", " "]
    assert texts.of_token(vocab["<0x41>"]) == "A"
    assert texts.of_token(vocab["<0xC3>"]) == "\N{REPLACEMENT CHARACTER}"
    assert texts.of_token(len(vocab)) == "</s>", "a special token is shown"
    assert texts.of_prompt(read.encode("b b")) == "b b" == texts.of_prompt("b b")


def test_parts_of_characters_at_byte_level(tmp_path):
    texts, read = texts_of(make_tokenizer(), tmp_path)
    first, second = read.encode("é")
    half = "\N{REPLACEMENT CHARACTER}"
    assert [texts.of_token(first), texts.of_token(second)] == [half, half]
    assert texts.of_prompt([first, second]) == "é"


def test_ids_stand_for_texts_where_there_is_no_tokenizer():
    texts = AnswerTexts(None)
    assert texts.of_token(7) == "token_id:7" and texts.of_prompt([7]) == ""
