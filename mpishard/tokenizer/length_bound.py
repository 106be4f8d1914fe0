"""How many tokens a text has at least, found without making them.

Encoding a text of many megabytes takes gigabytes and most of a minute, only to refuse it as too
long for the model. But no token is longer than the longest of the vocabulary, so that characters
bound tokens from below. Let a character weigh 1 over the length of the longest token that has it:
then the characters of any token weigh 1 at most together, and a text has at least as many tokens as
its characters weigh.

Characters are counted as the tokenizer's model sees them, after normalizer and pre-tokenizer, chunk
by chunk, and no further than it takes to know enough.
"""

from __future__ import annotations

from collections import Counter

import tokenizers

CHUNK = 2**16  # characters that are looked at together

# What a chunk may weigh more than the same characters within the text: a normalizer may put a
# space before it, and compose characters that its end divides.
CHUNK_SLACK = 8.0

# Models that make at least one token of each word, however many characters it has.
OF_WORDS = ("WordLevel", "WordPiece")
OF_CHARACTERS = ("BPE", "Unigram")


class LengthBound:
    """A lower bound of the number of tokens that `tokenizer` makes of a text, without those that it
    adds to one. It is 0 for models that it does not know."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer, self._kind = tokenizer, type(tokenizer.model).__name__
        self._added = tokenizer.get_added_tokens_decoder().values()
        words = [len(self._words(token.content)) for token in self._added]
        self._word_weight = 1 / max([1, *words])
        is_bytes = getattr(tokenizer.model, "byte_fallback", False)
        self._has_bytes = is_bytes and all(
            tokenizer.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256)
        )
        self._weights: dict[str, float] = {}
        if self._kind in OF_CHARACTERS:
            self._weights = self._weigh()
        # Such tokens take the spaces beside them in, however many.
        self._spaces_vanish = any(token.lstrip or token.rstrip for token in self._added)

    def at_least(self, text: str, enough: int) -> int:
        """A number of tokens that `text` has at least; no more than `enough` is looked for."""
        if self._kind not in OF_CHARACTERS + OF_WORDS:
            return 0
        tokens = 0.0
        for start in range(0, len(text), CHUNK):
            tokens += max(0.0, self._weight(text[start : start + CHUNK]) - CHUNK_SLACK)
            if tokens >= enough:
                break
        return int(tokens)

    def _weight(self, chunk: str) -> float:
        if self._kind in OF_WORDS:
            return self._word_weight * len(self._words(chunk))
        if self._spaces_vanish:
            chunk = "".join(chunk.split())
        counts = Counter("".join(self._words(chunk)))
        weights, unknown = self._weights, 1.0 if self._has_bytes else 0.0
        return sum(weights.get(one, unknown) * number for one, number in counts.items())

    def _weigh(self) -> dict[str, float]:
        """The weight of each character that a token has. Of those that no token is by itself, many
        neighbours may become one unknown token, so that they weigh nothing; unless there are tokens
        for their bytes."""
        longest: dict[str, int] = {}
        vocab = self._tokenizer.get_vocab(with_added_tokens=False)
        added = ["".join(self._words(token.content)) for token in self._added]
        for token in (*vocab, *added):
            for character in set(token):
                if longest.get(character, 0) < len(token):
                    longest[character] = len(token)
        prefix = getattr(self._tokenizer.model, "continuing_subword_prefix", None) or ""
        suffix = getattr(self._tokenizer.model, "end_of_word_suffix", None) or ""
        return {
            one: 1 / length
            for one, length in longest.items()
            if self._has_bytes
            or {one, prefix + one, one + suffix, prefix + one + suffix} <= vocab.keys()
        }

    def _words(self, text: str) -> list[str]:
        """What the model is given for a `text` without added tokens."""
        if self._tokenizer.normalizer is not None:
            text = self._tokenizer.normalizer.normalize_str(text)
        if self._tokenizer.pre_tokenizer is None:
            return [text] if text else []
        return [word for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text)]
