"""How byte-level vocabularies write bytes as characters (GPT-2: Radford et al. 2019)."""

from __future__ import annotations


def _characters() -> list[str]:
    """The character of each byte: itself where it is visible, else the next beyond Latin-1."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte if byte in visible else 256 + hidden.index(byte)) for byte in range(256)]


CHARACTER_OF = _characters()
BYTE_OF = {character: byte for byte, character in enumerate(CHARACTER_OF)}


def to_bytes(word: str) -> bytes:
    """The bytes that a token stands for; one that has other characters than those for bytes was
    added as it is."""
    values = [BYTE_OF[character] for character in word if character in BYTE_OF]
    return bytes(values) if len(values) == len(word) else word.encode()


def to_word(data: bytes) -> str:
    """Bytes as a vocabulary writes them."""
    return "".join(CHARACTER_OF[byte] for byte in data)
