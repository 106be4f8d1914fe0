"""The key to the letters of array names, in the docstring of the package: no letter twice, and none
used that is not in it."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

import mpishard

PACKAGE = Path(mpishard.__file__).parent
FILES = sorted(
    str(file.relative_to(PACKAGE))
    for part in ("arithmetic", "parallel", "sequences")
    for file in (PACKAGE / part).glob("*.py")
) + ["layers.py", "model.py", "rope.py"]

# Names of others that end like an array's: Hugging Face's of weights, vLLM's of sampling.
NO_ARRAYS = {"q_a", "q_b", "kv_a", "kv_b", "top_k", "_top_k", "top_p", "min_p"}


def key() -> list[str]:
    """The letters of the table, row by row."""
    assert mpishard.__doc__ is not None
    rows = re.findall(r"^([A-Z])  (\S.*?)  +([A-Z])  (\S.*)$", mpishard.__doc__, re.MULTILINE)
    return [letter for row in rows for letter in (row[0], row[2])]


def dimensions(name: str) -> str:
    """The letters in which the name of an array ends, "" for other names: ``x_nD`` and ``q_NhK``
    are arrays, ``x``, ``MAX_RANKS`` and ``vocab_start`` are not."""
    found = re.search(r"_([A-Za-z0-9]{1,5})$", name)
    if not found or name.isupper() or name in NO_ARRAYS or name.startswith("__"):
        return ""
    suffix = found[1]
    is_array = re.search("[A-Z]", suffix) or (len(suffix) == 1 and suffix.isalpha())
    return re.sub("[0-9]", "", suffix) if is_array else ""


def test_no_letter_stands_twice():
    letters = key()
    assert len(letters) > 20
    assert len(set(letters)) == len(letters)


@pytest.mark.parametrize("file", FILES)
def test_every_letter_is_in_the_key(file: str):
    tokens = tokenize.generate_tokens(io.StringIO((PACKAGE / file).read_text()).readline)
    names = {token.string for token in tokens if token.type == tokenize.NAME}
    unknown = {n for n in names if not set(dimensions(n).upper()) <= set(key())}
    assert unknown == set()


@pytest.mark.parametrize(
    ("name", "letters"),
    [("x_nD", "nD"), ("squares_N2", "N"), ("ids_v", "v"), ("vocab_start", ""), ("N_RANKS", "")],
)
def test_which_names_are_arrays(name: str, letters: str):
    assert dimensions(name) == letters
