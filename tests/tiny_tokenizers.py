"""Tiny tokenizers of the kinds that language models have, each with every byte or a few words."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["he", "hell", "hello", "wor", "world", "the", "in", "on", "é", "€", "漢", "\ufffd", "�"]
# A space, then letters: as the vocabularies of SentencePiece have it.
SPACED = [f"▁{word}" for word in ("hello", "the", "world", "in", "é")]
LETTERS = list(" abcdefghijklmnopqrstuvwxyz.,!?'\n0123")
CHAT = ("<|im_start|>", "<|im_end|>")


def byte_level(merges: bool = True, *, prefix: bool = False) -> Tokenizer:
    """Byte-level BPE, as of gpt2, llama 3 and qwen."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "t"), ("Ġt", "he")]
    pairs += [("Ã", "©"), ("â", "Ĥ"), ("âĤ", "¬"), ("o", "Ã"), ("ð", "Ł"), ("ï", "¿"), ("ï¿", "½")]
    pairs = pairs if merges else []
    words = [*alphabet, *(left + right for left, right in pairs)]
    tokenizer = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_specials(tokenizer)


def byte_level_split() -> Tokenizer:
    """Byte-level BPE behind a splitting of its own and Unicode's composition, as of qwen."""
    tokenizer = byte_level()
    pattern = (
        r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def _sentencepiece() -> models.BPE:
    words = ["<unk>", "<s>", "</s>", *BYTES, "▁", *LETTERS[1:-5], "é", "€", "�"]
    pairs = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello"), ("▁", "t")]
    pairs += [("▁t", "he"), ("e", "r")]
    words += [left + right for left, right in pairs]
    vocab = {word: place for place, word in enumerate(dict.fromkeys(words))}
    return models.BPE(vocab, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def byte_fallback() -> Tokenizer:
    """BPE with byte fallback, and a space before the first word, as of llama 2 and mistral."""
    tokenizer = Tokenizer(_sentencepiece())
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
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return _with_specials(tokenizer, "<unk>", "<s>", "</s>")


def byte_fallback_plain() -> Tokenizer:
    """BPE with byte fallback, and no space before the first word, as of gemma."""
    tokenizer = Tokenizer(_sentencepiece())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _with_specials(tokenizer, "<unk>", "<s>", "</s>")


def unigram() -> Tokenizer:
    """Unigram behind Metaspace, as of T5 and its like."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0)]
    pieces += [(word, -3.0) for word in SPACED] + [(letter, -5.0) for letter in LETTERS[1:]]
    pieces += [(word, -4.0) for word in WORDS[:9]]
    tokenizer = Tokenizer(models.Unigram([*dict(pieces).items()], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return _with_specials(tokenizer, "<unk>", "</s>")


def word_piece() -> Tokenizer:
    """WordPiece, as of bert."""
    words = ["[UNK]", "[CLS]", "[SEP]", *LETTERS[1:], *(f"##{one}" for one in LETTERS[1:]), "hello"]
    words += ["world", "##llo", "the"]
    vocab = {word: place for place, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return _with_specials(tokenizer, "[UNK]", "[CLS]", "[SEP]")


def word_end() -> Tokenizer:
    """BPE whose words end in a mark, as of GPT-1."""
    letters = [letter for letter in LETTERS if letter.isalnum()]
    words = ["<unk>", *letters, *(f"{one}</w>" for one in letters), "he", "hello</w>"]
    pairs = [("h", "e")]
    vocab = {word: place for place, word in enumerate(words)}
    model = models.BPE(vocab, pairs, unk_token="<unk>", end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder()
    return _with_specials(tokenizer, "<unk>")


def word_level() -> Tokenizer:
    """Whole words, and no decoder."""
    vocab = {word: place for place, word in enumerate(["<unk>", *WORDS, *LETTERS[1:]])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _with_specials(tokenizer, "<unk>")


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "single bytes": lambda: byte_level(merges=False),
    "byte level, prefix space": lambda: byte_level(prefix=True),
    "byte level, split": byte_level_split,
    "byte fallback": byte_fallback,
    "byte fallback, plain": byte_fallback_plain,
    "unigram": unigram,
    "word piece": word_piece,
    "word end": word_end,
    "word level": word_level,
}


def _with_specials(tokenizer: Tokenizer, *own: str) -> Tokenizer:
    """With a model's own special tokens, those of a chat, and a token that is not special."""
    special = [AddedToken(text, special=True) for text in (*own, *CHAT)]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer
