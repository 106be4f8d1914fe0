"""Tokenizers of checkpoints without ``tokenizer.json``, from the vocabularies that they do have.

tekken.json              Mistral: the bytes of tokens, in the order in which they merge
tokenizer.model          SentencePiece; its protocol buffer is read with the library of this name
vocab.json, merges.txt   byte-level BPE, of the classes whose way to split text is known

A tokenizer that is made here encodes as the library does that a vocabulary belongs to.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

try:
    from sentencepiece import sentencepiece_model_pb2
except ImportError:  # an optional extra
    sentencepiece_model_pb2 = None

from mpishard.errors import UserError, brief
from mpishard.storage.model_dir import read_json
from mpishard.tokenizer import byte_level

TEKKEN, SENTENCEPIECE, VOCAB, MERGES = "tekken.json", "tokenizer.model", "vocab.json", "merges.txt"

# Vocabularies that are known by name, and not read.
OTHERS = {
    "*.tiktoken": "a tiktoken vocabulary, without the pattern that splits text",
    "tiktoken.model": "a tiktoken vocabulary, without the pattern that splits text",
    "tokenizer.model.v*": "a vocabulary of an older version of mistral-common",
    "spiece.model": "a SentencePiece model of an encoder",
    "sentencepiece.bpe.model": "a SentencePiece model of an encoder",
    "vocab.txt": "a WordPiece vocabulary",
}
CONVERT = (
    'make a tokenizer.json of it where transformers is installed: `python -c "from transformers '
    "import AutoTokenizer as A; A.from_pretrained('DIR').save_pretrained('DIR')\"`"
)

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

BYTE_LEVEL_CLASSES = ("GPT2Tokenizer", "Qwen2Tokenizer")

Settings = dict[str, Any]
Made = tuple[Tokenizer, Settings]


def find_vocabulary(directory: Path, settings: Settings) -> Callable[[], Made] | str:
    """What makes a tokenizer of the vocabulary that a directory has, and says which fields of
    ``tokenizer_config.json`` have other defaults then; or a sentence that says why there is none
    that is read: "" where there is nothing."""
    if (directory / TEKKEN).is_file():
        return partial(read_tekken, directory / TEKKEN)
    if (path := directory / SENTENCEPIECE).is_file():
        if sentencepiece_model_pb2 is None:
            return (
                f"{path} is read with sentencepiece and protobuf, which are not installed: "
                f"`pip install 'mpishard[sentencepiece]'`, or {CONVERT}"
            )
        return partial(read_sentencepiece, path, settings)
    if (directory / VOCAB).is_file() and (directory / MERGES).is_file():
        if (name := _class_name(settings)) in BYTE_LEVEL_CLASSES:
            return partial(read_merges, directory, settings)
        return (
            f"{directory} has {VOCAB} and {MERGES} of the tokenizer_class {brief(repr(name))}, and "
            f"no tokenizer.json; without one only those of {' and '.join(BYTE_LEVEL_CLASSES)} are "
            f"read: {CONVERT}"
        )
    for pattern, what in OTHERS.items():
        for path in sorted(directory.glob(pattern)):
            return f"{path} is {what}, which is not read: {CONVERT}"
    return ""


def _class_name(settings: Settings) -> str:
    return str(settings.get("tokenizer_class") or "").removesuffix("Fast")


def read_tekken(path: Path) -> Made:
    """The tokenizer of a ``tekken.json``. Raises UserError for a file that is none."""
    fields = read_json(path)
    try:
        config = fields["config"]
        special = [
            one["token_str"]
            for one in sorted(fields["special_tokens"], key=lambda one: one["rank"])
        ]
        reserved = config.get("default_num_special_tokens") or len(special)
        special += [f"<SPECIAL_{place}>" for place in range(len(special), reserved)]
        count = (config.get("default_vocab_size") or len(fields["vocab"]) + reserved) - reserved
        words = [base64.b64decode(one["token_bytes"]) for one in fields["vocab"][:count]]
        pattern = Regex(config["pattern"])
    except Exception as error:  # the fields may be of any type, and the pattern none
        raise UserError(
            f"{path} is not a tekken vocabulary that can be read: {brief(repr(error))}; {CONVERT}"
        ) from None
    spelled = {byte_level.to_word(word): place for place, word in enumerate(words)}
    vocab = {word: reserved + place for word, place in spelled.items()}
    vocab |= {token: place for place, token in enumerate(special)}
    merges = [pair for word in spelled for pair in _halves(word, spelled)]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _split(pattern)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}


def read_merges(directory: Path, settings: Settings) -> Made:
    """The byte-level BPE of ``vocab.json`` and ``merges.txt``, of one of the
    `BYTE_LEVEL_CLASSES`. Raises UserError for files that cannot be read."""
    prefix = settings.get("add_prefix_space") is True
    try:
        model = models.BPE.from_file(str(directory / VOCAB), str(directory / MERGES))
    except Exception as error:  # the library raises plain Exception
        raise UserError(
            f"{directory} has a {VOCAB} and {MERGES} that cannot be read: {brief(str(error))}"
        ) from None
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.ByteLevel()
    if _class_name(settings) == "GPT2Tokenizer":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    else:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = _split(Regex(QWEN2_PATTERN), prefix)
    return tokenizer, dict.fromkeys(("unk_token", "eos_token"), "<|endoftext|>")


def _split(pattern: Regex, prefix: bool = False) -> pre_tokenizers.PreTokenizer:
    byte_level_only = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), byte_level_only])


def _halves(word: str, known: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs of known pieces that merge to a word, those of the earliest pieces first."""
    pairs = [(word[:place], word[place:]) for place in range(1, len(word))]
    pairs = [(left, right) for left, right in pairs if left in known and right in known]
    return sorted(pairs, key=lambda pair: (known[pair[0]], known[pair[1]]))


# SentencePiece (Kudo and Richardson 2018, arXiv 1808.06226): what its model files say.
UNIGRAM, BPE = 1, 2  # types of models
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # types of pieces


def read_sentencepiece(path: Path, settings: Settings) -> Made:
    """The tokenizer of a SentencePiece model, of the types BPE and Unigram. ``legacy`` in the
    settings says that the space before the first word also comes after each added token. Raises
    UserError where the library is missing and for a file that is not such a model."""
    model = _parse_model(path)
    pieces, unk = model.pieces, model.trainer_spec.unk_id
    fallback = model.trainer_spec.byte_fallback
    user_defined = [piece.piece for piece in pieces if piece.type == USER_DEFINED]
    if model.trainer_spec.model_type == BPE:
        vocab = {piece.piece: place for place, piece in enumerate(pieces)}
        tokenizer = Tokenizer(
            models.BPE(
                vocab,
                _merges_by_score(pieces),
                unk_token=pieces[unk].piece,
                fuse_unk=True,
                byte_fallback=fallback,
                ignore_merges=bool(user_defined),
            )
        )
    elif model.trainer_spec.model_type == UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in pieces]
        tokenizer = Tokenizer(models.Unigram(scores, unk, fallback))
    else:
        raise UserError(f"{path} is a SentencePiece model of neither type BPE nor Unigram")
    spec = model.normalizer_spec
    legacy = settings.get("legacy", _class_name(settings) != "LlamaTokenizer") is not False
    tokenizer.normalizer = normalizers.Sequence(_sentencepiece_normalizers(spec, legacy))
    steps: list[Any] = []
    if spec.add_dummy_prefix:
        scheme = "always" if legacy else "first"
        steps.append(pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False))
    if user_defined:  # whole, and never merged with others
        steps.append(pre_tokenizers.Split(Regex(_any_of(user_defined)), "isolated"))
    if steps:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    strip = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    for piece in pieces:
        if piece.type in (CONTROL, USER_DEFINED):
            token = AddedToken(piece.piece, special=piece.type == CONTROL, normalized=False)
            tokenizer.add_tokens([token])
    tokenizer.add_special_tokens([AddedToken(pieces[unk].piece, special=True)])
    ids = {name: getattr(model.trainer_spec, f"{name}_id") for name in ("bos", "eos", "unk")}
    return tokenizer, {f"{name}_token": pieces[one].piece for name, one in ids.items() if one >= 0}


def _parse_model(path: Path) -> Any:
    """The protocol buffer of a SentencePiece model (UserError)."""
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception:  # protobuf's DecodeError
        model.Clear()
    if not model.pieces or not 0 <= model.trainer_spec.unk_id < len(model.pieces):
        raise UserError(
            f"{path} is not a SentencePiece model; if it is a tiktoken vocabulary, {CONVERT}"
        )
    return model


def _merges_by_score(pieces: Iterable[Any]) -> list[tuple[str, str]]:
    """The merges of a BPE model: the halves of each piece, the piece of the highest score first."""
    normal = {
        piece.piece: (-piece.score, place)
        for place, piece in enumerate(pieces)
        if piece.type == NORMAL
    }
    pairs = [
        (rank, word[:place], word[place:])
        for word, rank in normal.items()
        for place in range(1, len(word))
        if word[:place] in normal and word[place:] in normal
    ]
    return [(left, right) for _, left, right in sorted(pairs)]


def _sentencepiece_normalizers(spec: Any, legacy: bool) -> list[Any]:
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", "▁"))
    if spec.add_dummy_prefix and legacy:  # Metaspace adds none where there is one
        steps.append(normalizers.Replace(Regex(r"\A▁"), "▁▁"))
    return steps


def _any_of(words: list[str]) -> str:
    """A pattern of these words, the longest first."""
    quoted = ["".join(f"\\x{{{ord(one):X}}}" for one in word) for word in words]
    return "|".join(sorted(quoted, key=len, reverse=True))
