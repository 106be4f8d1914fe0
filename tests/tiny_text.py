"""Tokenizers for the tiny models: byte-level BPE of exactly so many tokens as a model has, and a
chat template."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_models import raw_config, write_checkpoint
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<pad>", "<s>", "</s>")  # 1 and 2 begin and end a sequence, as the models say
# "é" and "€" are two and three bytes, each a token of its own: the models write half characters.
CHARACTERS = " \netaoinshrdlucmfypgwbvkxjqz.,()_:=#0123é€"
PAIRS = ["h e", "i n", "Ġ the", "Ġ a", "e r", "o n", "Ġ in", "r e", "a t", "o r", "d ef", "Ġ s"]

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ bos_token }}{{ message.role }}: {{ message.content }}
{% endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}"""


def make_tokenizer(vocab: int = 0) -> Tokenizer:
    """A byte-level BPE of `vocab` tokens; 0 is one that knows every byte and merges nothing."""
    alphabet = _bytes_as_characters(CHARACTERS) if vocab else pre_tokenizers.ByteLevel.alphabet()
    tokens = [*SPECIAL, *sorted(alphabet)]
    merges = []
    for pair in PAIRS:
        left, right = pair.split()
        if len(tokens) < vocab and left in tokens and right in tokens:
            merges.append((left, right))
            tokens.append(left + right)
    tokens += [f"<unused{place}>" for place in range(vocab - len(tokens))]
    assert len(tokens) == vocab or not vocab, f"{len(tokens)} tokens are more than {vocab}"
    model = models.BPE({token: place for place, token in enumerate(tokens)}, merges)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_speaker(variant: str, directory: str | Path, dtype: str = "float32") -> Path:
    """`directory`, after writing the tiny model `variant` with a tokenizer and a chat template."""
    directory = write_checkpoint(variant, directory, dtype)
    make_tokenizer(raw_config(variant)["vocab_size"]).save(str(directory / "tokenizer.json"))
    settings = {"bos_token": {"content": "<s>"}, "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def write_spacious(directory: str | Path) -> Path:
    """A model with the words w1 to w66 for tokens, between which any number of spaces is nothing:
    a prompt of 300 KB fits into its 64 positions."""
    path = write_speaker("llama-gqa", directory)
    words = {f"w{place}": place for place in range(raw_config("llama-gqa")["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def _bytes_as_characters(text: str) -> set[str]:
    """The characters by which byte-level BPE writes the bytes of `text`."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return set("".join(piece for piece, _ in split))
