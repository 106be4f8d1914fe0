"""The pieces of an answer, whatever its tokens and wherever a prompt ends: joined, they are what
decoding makes of the ids."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import KINDS
from tokenizers import pre_tokenizers

from mpishard.engine.sampling_params import SamplingParams
from mpishard.tokenizer import IncrementalDetokenizer, Tokenizer, finish_output
from mpishard.tokenizer.byte_level import to_bytes, to_word

each_kind = pytest.mark.parametrize("kind", KINDS)


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    with TemporaryDirectory() as directory:
        KINDS[kind]().save(f"{directory}/tokenizer.json")
        return Tokenizer(Path(directory))


def whole_text(text: Tokenizer, ids: list[int], skip: bool = True) -> str:
    """What decoding makes of `ids` at once, but for half a character at the end."""
    ids = [token for token in ids if not (skip and token in text.special_texts)]
    ids = [token for token in ids if text.tokenizer.id_to_token(token) is not None]
    words = [text.tokenizer.id_to_token(token) or "" for token in ids]
    decoder = str(text.tokenizer.decoder)
    if "ByteLevel" in decoder:
        data = b"".join(map(to_bytes, words))
        half = any(begins_character(data[-length:]) for length in (1, 2, 3))
        return text.decode(ids, skip)[: -1 if half else None]
    if "ByteFallback" in decoder:
        found = re.search("(<0x..>)*$", "".join(words))
        run = bytes.fromhex(re.sub("<0x|>", "", found[0])) if found else b""
        for length in (1, 2, 3):
            if begins_character(run[-length:]) and is_utf8(run[:-length]):
                ids = ids[:-length]
                break
    return text.decode(ids, skip)


def begins_character(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start == 0 and error.reason == "unexpected end of data"
    return False


def is_utf8(data: bytes) -> bool:
    try:
        return bool(data.decode()) or not data
    except UnicodeDecodeError:
        return False


def test_bytes_of_byte_level_tokens():
    assert {to_bytes(one) for one in pre_tokenizers.ByteLevel.alphabet()} == {
        bytes([byte]) for byte in range(256)
    }
    assert to_bytes("ĠcafÃ©") == " café".encode()
    assert to_word(" café".encode()) == "ĠcafÃ©"
    assert to_bytes("漢") == "漢".encode()  # no byte is written so: it was added


def token_ids(kind: str) -> st.SearchStrategy[list[int]]:
    """Ids of any token, often of bytes of one character or another, and some that no token has."""
    text = tokenizer_of(kind)
    any_token = st.integers(0, text.tokenizer.get_vocab_size() + 3)
    pieces = st.sampled_from(["é", "€", "漢", "\U0001f680", "\ufffd", " the", "<|im_end|>", "\n"])
    spelled = [text.encode(piece, special=False) for piece in ("é€漢\U0001f680\ufffd",)]
    common = st.sampled_from([token for ids in spelled for token in ids] or [0])
    words = pieces.map(lambda piece: text.encode(piece, special=False))
    one = st.one_of(words, any_token.map(lambda token: [token]), common.map(lambda token: [token]))
    return st.lists(one, max_size=12).map(lambda parts: [token for part in parts for token in part])


def grow(text: Tokenizer, prompt: list[int], ids: list[int], params: SamplingParams) -> list[str]:
    """The pieces in which the text of `ids` is written, fed one by one."""
    pieces: list[str] = []
    growing = IncrementalDetokenizer(text, prompt, params, pieces.append)
    for end in range(1, len(ids) + 1):
        if growing.update(ids[:end]):
            break
        assert str(growing) == "".join(pieces)
    growing.flush()
    return pieces


@each_kind
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_pieces_joined_are_the_whole_text_of_every_prefix(kind, data):
    text, ids = tokenizer_of(kind), data.draw(token_ids(kind))
    skip = data.draw(st.booleans())
    for end in range(len(ids) + 1):
        pieces = grow(text, [], ids[:end], SamplingParams(skip_special_tokens=skip))
        assert "".join(pieces) == whole_text(text, ids[:end], skip)


@each_kind
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_an_answer_goes_on_where_its_prompt_was_cut(kind, data):
    """A text, cut anywhere: what is said of both parts is said of the whole."""
    text = tokenizer_of(kind)
    words = st.sampled_from(["hello", "the", "é", "€", "漢字", " ", "\n", "\U0001f680", "in on"])
    said = " ".join(data.draw(st.lists(words, min_size=1, max_size=8)))
    ids = text.encode("hello " + said, special=False)
    cut = data.draw(st.integers(1, len(ids)))
    answer = "".join(grow(text, ids[:cut], ids[cut:], SamplingParams()))
    assert whole_text(text, ids[:cut]) + answer == whole_text(text, ids)


@each_kind
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_an_answer_ends_at_the_first_token_that_completes_a_stop_string(kind, data):
    text, ids = tokenizer_of(kind), data.draw(token_ids(kind))
    include = data.draw(st.booleans())
    said = whole_text(text, ids, skip=False)
    cuts = st.integers(0, max(0, len(said) - 1))
    stops = tuple(
        said[start : start + length]
        for start, length in data.draw(st.lists(st.tuples(cuts, st.integers(1, 3)), max_size=3))
        if said[start : start + length]
    )
    params = SamplingParams(
        stop=stops, skip_special_tokens=False, include_stop_str_in_output=include
    )
    expected = said
    for end in range(1, len(ids) + 1):
        so_far = whole_text(text, ids[:end], skip=False)
        starts = [(so_far.find(one), len(one)) for one in stops if one in so_far]
        if starts:
            stop_end, start = min((start + length, start) for start, length in starts)
            expected = so_far[: stop_end if include else start]
            break
    assert "".join(grow(text, [], ids, params)) == expected


# Special tokens: hidden or shown, and stopped at


def answer(text: Tokenizer, said: str, finish_reason: str = "length", **params) -> str:
    """The text of an answer of the tokens of `said`."""
    ids = text.encode(said, special=False)
    growing = IncrementalDetokenizer(text, [], SamplingParams(**params))
    for end in range(1, len(ids) + (finish_reason == "length")):  # the last ends it unseen
        if growing.update(ids[:end]):
            ids = ids[:end]
            break
    outcome = finish_output(ids, finish_reason, growing)
    assert outcome["output_ids"] == ids
    return f"{outcome['text']}|{outcome['finish_reason']}"


@pytest.mark.parametrize("kind", ["byte level", "byte fallback, plain"])
@pytest.mark.parametrize(
    "said, params, expected",
    [
        ("on<|im_end|> in", {}, "on in|length"),
        ("on<|im_end|> in", {"skip_special_tokens": False}, "on<|im_end|> in|length"),
        ("on<|im_end|> in", {"stop": ["<|im_end|>"]}, "on|stop"),
        ("on\n<|im_end|>\nin", {"stop": ["\n<|im_end|>\n"]}, "on|stop"),
        ("on\n<|im_end|>in", {"stop": ["\n<|im_end|>\n"]}, "on\nin|length"),
        ("on<|im_end|>", {"stop": ["<|im_start|>", "im_end"]}, "on|stop"),
        ("a<|im_end|>", {"stop": ["<|im_end|>"], "include_stop_str_in_output": True},
         "a<|im_end|>|stop"),
        ("a<|im_start|>b", {"stop": ["b"], "include_stop_str_in_output": True}, "ab|stop"),
        ("one\n\ntwo", {"stop": ["\n\n"]}, "one|stop"),
        ("one\n\ntwo", {"stop": ["\n\n"], "include_stop_str_in_output": True}, "one\n\n|stop"),
        ("hello the", {"stop": ["lo t"]}, "hel|stop"),
        ("hello the", {"stop": ["the"]}, "hello |stop"),
        ("hello the", {"stop": ["then"]}, "hello the|length"),
        ("<tool>hello", {}, "<tool>hello|length"),
    ],
)  # fmt: skip
def test_special_tokens_and_stop_strings(kind, said, params, expected):
    assert answer(tokenizer_of(kind), said, **params) == expected


@pytest.mark.parametrize(
    "said, params, expected",
    [
        ("on in", {}, "on i|stop"),  # the token is left out, special or not
        ("on<|im_end|>", {}, "on|stop"),
        ("on<|im_end|>", {"skip_special_tokens": False}, "on|stop"),
        ("on in", {"include_stop_str_in_output": True}, "on in|stop"),
        ("on<|im_end|>", {"include_stop_str_in_output": True}, "on|stop"),
        (
            "on<|im_end|>",
            {"include_stop_str_in_output": True, "skip_special_tokens": False},
            "on<|im_end|>|stop",
        ),
        (
            "on<|im_end|>",
            {"include_stop_str_in_output": True, "stop": ["<|im_end|>"]},
            "on<|im_end|>|stop",
        ),
    ],
)
def test_the_token_that_ended_an_answer(said, params, expected):
    """An end-of-sequence token, or one of stop_token_ids."""
    text = tokenizer_of("byte level")
    assert text.tokenizer.encode("on in").tokens[-1] == "n"
    assert answer(text, said, "stop", **params) == expected


def test_a_replacement_character_that_the_model_wrote_is_shown():
    for kind in ("byte level", "single bytes", "byte fallback", "byte fallback, plain"):
        text = tokenizer_of(kind)
        ids = text.encode("a\ufffd", special=False)
        assert "".join(grow(text, [], ids, SamplingParams())) == "a\ufffd", kind


@pytest.mark.parametrize("kind", ["single bytes", "byte fallback"])
def test_a_character_that_the_prompt_began_is_of_the_answer(kind):
    text = tokenizer_of(kind)
    ids = text.encode("hello 漢字", special=False)
    for cut, expected in ((-6, "漢字"), (-5, "漢字"), (-4, "漢字"), (-3, "字"), (-2, "字")):
        assert "".join(grow(text, ids[:cut], ids[cut:], SamplingParams())) == expected


def test_a_stop_string_that_a_broken_run_of_bytes_completes():
    """The run was a character before; what stood before that had to wait."""
    text = tokenizer_of("byte fallback")
    vocab, run = text.tokenizer.get_vocab(), "漢".encode() + b"\x80"
    ids = [vocab[word] for word in ("▁", "é", "▁", *(f"<0x{byte:02X}>" for byte in run))]
    for stop, expected in (
        ("é \ufffd", ""),
        ("é 漢", ""),
        ("漢", "é "),
        ("x", "é " + 4 * "\ufffd"),
    ):
        assert "".join(grow(text, [], ids, SamplingParams(stop=(stop,)))) == expected


def test_bytes_of_half_a_surrogate_begin_no_character():
    """Python's own decoder waits for the third; it could not make a character of them."""
    text = tokenizer_of("single bytes")
    ids = [text.tokenizer.get_vocab()[to_word(bytes([byte]))] for byte in (0x61, 0xED, 0xA2)]
    assert "".join(grow(text, [], ids, SamplingParams())) == text.decode(ids) == "a\ufffd\ufffd"
