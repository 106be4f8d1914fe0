"""Text: tokens of a prompt, the text of an answer as it grows, chat templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tiny_text import make_tokenizer, write_speaker
from tokenizers import decoders, models, pre_tokenizers

from mpishard.engine.sampling_params import SamplingParams
from mpishard.errors import UserError
from mpishard.tokenizer import IncrementalDetokenizer, Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MIXED = "naïve café: 3 €, 漢字 and 👩‍🚀!\n\tdef f(x):  return x"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bytes")
    make_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def text(directory: Path) -> Tokenizer:
    """A tokenizer of single bytes: every character beyond ASCII spans tokens."""
    return Tokenizer(directory)


def grow(
    text: Tokenizer, ids: list[int], stops: list[str] | None = None
) -> tuple[IncrementalDetokenizer, list[str]]:
    """The text of `ids`, fed one by one, and the pieces in which it was written."""
    pieces: list[str] = []
    params = SamplingParams(stop=tuple(stops or ()))
    growing = IncrementalDetokenizer(text, [], params, pieces.append)
    for end in range(1, len(ids) + 1):
        if growing.update(ids[:end]):
            break
    growing.flush()
    return growing, pieces


# Prompts


def test_a_prompt_comes_back(text):
    assert text.decode(text.encode(MIXED)) == MIXED


def test_settings_of_a_training_run_do_not_cut_or_pad_a_prompt(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).decode(Tokenizer(tmp_path).encode(MIXED)) == MIXED
    assert len(Tokenizer(tmp_path).encode(MIXED)) == len(MIXED.encode())


def test_a_model_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="tokenizer.json does not exist.*give token ids instead"):
        Tokenizer(tmp_path)


def test_a_tokenizer_for_newer_libraries(directory, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    names = ["tokenizer.json", "tokenizer.4.0.0.json"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"fast_tokenizer_files": names}))
    assert Tokenizer(tmp_path).encode("a")
    (tmp_path / names[1]).touch()
    with pytest.raises(UserError, match=r"the tokenizer tokenizer.4.0.0.json for newer libraries"):
        Tokenizer(tmp_path)


LONG = f'{{"model": {{"type": "{5000 * "x"}"}}}}'


@pytest.mark.parametrize(
    "content, problem",
    [
        ("", "is empty (0 bytes): download or copy it again"),
        (
            "version https://git-lfs.github.com/spec/v1\noid",
            "is a pointer of git-lfs, not the",
        ),
        ("<!doctype html><title>Sign in</title>", "is a web page, not the file itself"),
    ],
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_what_stands_in_for_a_file(tmp_path, name, content, problem):
    write_speaker("llama-gqa", tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        Tokenizer(tmp_path).chat("a")
    assert str(caught.value).startswith(f"{tmp_path / name} {problem}")


@pytest.mark.parametrize("content", ["{", '{"model": 3}', "\n\n[1,\n 2", LONG, LONG[10:-1]])
def test_a_damaged_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer.json is not a tokenizer") as refusal:
        Tokenizer(tmp_path)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 600


def test_what_is_not_unicode_is_no_prompt(text):
    with pytest.raises(UserError, match="character 2 is no character of Unicode"):
        text.encode(b"ab\xff".decode(errors="surrogateescape"))


# The text of an answer as it grows


def test_pieces_are_whole_characters_and_make_the_whole_text(text):
    growing, pieces = grow(text, text.encode(MIXED))
    assert "".join(pieces) == str(growing) == MIXED
    assert REPLACEMENT not in "".join(pieces)
    assert len(pieces) == len(MIXED), "each character is written as soon as it is whole"


def test_a_half_character_at_the_end_is_not_shown(text):
    ids = text.encode("5 €")
    assert str(grow(text, ids[:-1])[0]) == "5 "
    assert str(grow(text, ids)[0]) == "5 €"


def test_special_tokens_are_not_shown(text):
    ids = text.encode("one</s>two<pad>")
    assert {0, 2} < set(ids)
    assert str(grow(text, ids)[0]) == "onetwo"


def test_following_takes_in_many_tokens_at_once(text):
    growing = IncrementalDetokenizer(text, [])
    growing.update(text.encode("one"))
    growing.update(text.encode("one, two"))
    growing.flush()
    assert str(growing) == "one, two"


def test_unknown_ids_are_passed_over(text):
    """Models often have more rows in their embedding than their tokenizer has tokens."""
    ids = text.encode("ab")
    assert str(grow(text, [ids[0], 5000, ids[1]])[0]) == "ab"


def test_the_first_word_keeps_its_space(tmp_path):
    """Decoders of the SentencePiece kind strip it from a text's first word, which the first word
    of an answer is not."""
    vocab = {"<unk>": 0, "▁Hello": 1, "▁world": 2, "!": 3}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = Tokenizer(tmp_path)
    assert text.decode([2, 3]) == "world!"
    growing = IncrementalDetokenizer(text, [1])
    growing.update([2, 3])
    assert str(growing) == " world!"


# Stop strings


def test_nothing_of_a_stop_string_is_ever_written(text):
    growing, pieces = grow(text, text.encode("one\n\ntwo"), ["\n\n"])
    assert growing.stopped
    assert pieces == ["o", "n", "e"]


def test_what_only_begins_like_a_stop_string_is_written_when_that_is_clear(text):
    growing, pieces = grow(text, text.encode("a##b#"), ["###"])
    assert not growing.stopped
    assert pieces == ["a", "##b", "#"]


def test_a_stop_string_of_characters_that_span_tokens(text):
    growing, _ = grow(text, text.encode("one 漢字 two"), ["漢字"])
    assert growing.stopped and str(growing) == "one "


def test_of_several_stop_strings_the_first_complete_one_counts(text):
    growing, _ = grow(text, text.encode("abcdef"), ["f", "cd", "bcde"])
    assert growing.stopped and str(growing) == "ab"


@pytest.mark.parametrize("stops", [["bcd", "c"], ["c", "bcd"], ["in", "hin"], ["Ġ", " t"]])
def test_where_an_answer_stops_does_not_depend_on_its_tokens(tmp_path, text, stops):
    make_tokenizer(67).save(str(tmp_path / "tokenizer.json"))
    merging = Tokenizer(tmp_path)
    whole = "abcd the in hind the a"
    assert len(merging.encode(whole)) < len(text.encode(whole))
    by_bytes, by_words = (grow(one, one.encode(whole), stops)[0] for one in (text, merging))
    assert by_bytes.stopped == by_words.stopped
    assert str(by_bytes) == str(by_words)


def test_a_stop_string_in_the_last_token_beside_half_a_character(tmp_path):
    """The token "a" + first byte of "é": only at the end is it clear that nothing follows."""
    vocab = {"aÃ": 0, "b": 1}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    growing, _ = grow(Tokenizer(tmp_path), [1, 0], ["a"])
    assert growing.stopped and str(growing) == "b"


# Chat


def chat(directory: Path, template: object, files: dict[str, str] | None = None, **settings) -> str:
    """What the chat template makes of the message "hi"."""
    make_tokenizer().save(str(directory / "tokenizer.json"))
    content = json.dumps({"chat_template": template, **settings})
    (directory / "tokenizer_config.json").write_text(content)
    for name, content in (files or {}).items():
        (directory / name).write_text(content)
    text = Tokenizer(directory)
    return text.tokenizer.decode(text.chat("hi"), skip_special_tokens=False)


TURN = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m.content }}\n{% endfor %}"


def test_a_conversation_ends_where_the_assistant_answers(tmp_path):
    template = TURN + "{% if add_generation_prompt %}[assistant]{% endif %}"
    assert chat(tmp_path, template, bos_token="<s>") == "<s>[user] hi\n[assistant]"


def test_special_tokens_may_be_objects_or_in_a_file_of_their_own(tmp_path):
    assert chat(tmp_path, TURN, bos_token={"content": "<s>"}) == "<s>[user] hi\n"
    specials = {"special_tokens_map.json": '{"bos_token": "</s>"}'}
    assert chat(tmp_path, TURN, specials, add_bos_token=True) == "</s>[user] hi\n"


def test_the_template_may_be_one_of_several_or_a_file(tmp_path):
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert chat(tmp_path, several) == "yes"
    assert chat(tmp_path, "no", {"chat_template.jinja": "file"}) == "file"


def test_the_post_processor_adds_nothing_to_a_template(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    special = [("<s>", 1)]
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=special)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("<s>{{ messages[0].content }}")
    text = Tokenizer(tmp_path)
    assert text.encode("hi") == text.chat("hi")


def test_what_templates_expect_of_their_surroundings(tmp_path):
    """The variables, functions, filters and tags that transformers gives to a template."""
    assert chat(tmp_path, "{{ tools is none and documents is none }}") == "True"
    assert chat(tmp_path, "{{ {'é': [1, '<']} | tojson }}") == '{"é": [1, "<"]}'
    assert chat(tmp_path, "{{ [1] | tojson(indent=1) }}") == "[\n 1\n]"
    assert chat(tmp_path, "{{ strftime_now('%Y') | int > 2000 }}") == "True"
    assert chat(tmp_path, "{% for i in [1, 2] %}{% break %}{% endfor %}ok") == "ok"
    assert chat(tmp_path, "a{% generation %}{{ messages[0].role }}{% endgeneration %}") == "auser"
    assert chat(tmp_path, "{% if true %}\n    x\n{% endif %}\n") == "    x\n"


@pytest.mark.parametrize(
    "template, problem",
    [
        ("{{ raise_exception('only\nfor tools') }}", "only for tools"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages + 1 }}", "can only concatenate"),
        ("{{ missing.attribute }}", "'missing' is undefined"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe;"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_template_that_fails(tmp_path, template, problem):
    with pytest.raises(UserError, match="the chat template of .* failed: ") as refusal:
        chat(tmp_path, template)
    assert problem in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_model_without_a_template(directory):
    with pytest.raises(UserError, match="a chat needs a chat template, but .* omit --chat"):
        Tokenizer(directory).chat("hi")
