"""Lines of a batch: what they may ask for, what they are refused for, the form of their answers."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from mpishard.batch.requests import (
    CHAT,
    COMPLETION,
    NEUTRAL,
    PLAIN,
    BatchRequest,
    read_request,
)
from mpishard.engine.sampling_params import SamplingParams
from mpishard.errors import UserError

PARAMS = SamplingParams(temperature=0.5, seed=3, max_tokens=7, stop=("x",))
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]


def read(fields: Any, number: int = 3) -> BatchRequest:
    content = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return read_request(content, number, PARAMS, f"IN line {number}")


def plain(**fields: Any) -> BatchRequest:
    return read({"id": "a", "prompt": "b", **fields})


def openai(url: str = CHAT, outside: dict[str, Any] | None = None, **body: Any) -> BatchRequest:
    asked = {"messages": MESSAGES} if url == CHAT else {"prompt": "b"}
    fields = {"custom_id": "a", "method": "POST", "url": url, "body": {**asked, **body}}
    return read(fields | (outside or {}))


def test_a_plain_line():
    assert plain() == BatchRequest(3, PLAIN, "a", "b", PARAMS)
    assert read({"id": 5, "input_ids": [1, 2]}) == BatchRequest(3, PLAIN, 5, [1, 2], PARAMS)
    assert read(b' {"id": "\xc3\xa9", "prompt": ""}\r\n').name == "é"


@pytest.mark.parametrize("form", [plain, openai])
def test_a_lines_own_parameters_come_before_the_commands(form):
    own = {"temperature": 1, "top_k": 4, "top_p": 0.9, "min_p": 0, "seed": 2**64 - 1}
    line = form(**own, max_tokens=1, stop=["u", "v"], ignore_eos=True)
    sampling = SamplingParams(1.0, 4, 0.9, 0.0, 2**64 - 1)
    assert line.error == "" and line.params == replace(
        sampling, max_tokens=1, stop=("u", "v"), ignore_eos=True
    )
    assert form(stop="u").params.stop == ("u",) and form(stop=[]).params.stop == ()
    nothing = dict.fromkeys([*own, "max_tokens", "stop", "ignore_eos"])
    assert form(**nothing).params == PARAMS, "null is as good as nothing"


def test_openais_form():
    assert openai() == BatchRequest(3, CHAT, "a", MESSAGES, PARAMS)
    assert openai(COMPLETION, model="m") == BatchRequest(3, COMPLETION, "a", "b", PARAMS, "m")
    assert openai(COMPLETION, prompt=[1, 2]).prompt == [1, 2]
    assert openai(max_completion_tokens=4).params.max_tokens == 4
    assert openai(max_completion_tokens=4, max_tokens=4).params.max_tokens == 4
    assert openai(**NEUTRAL, user="me", metadata={}).error == ""
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert openai(messages=[{"role": "user", "content": parts}]).prompt == [
        {"role": "user", "content": "one\ntwo"}
    ]


def test_what_a_line_gives_to_the_chat_template():
    tools, documents = [{"type": "function"}], [{"title": "t", "text": "u"}]
    line = openai(
        tools=tools, tool_choice="auto", documents=documents, chat_template_kwargs={"a": 1}
    )
    assert line.error == ""
    assert line.chat_template_kwargs == {"a": 1, "tools": tools, "documents": documents}
    assert openai(tools=[], documents=None, chat_template_kwargs=None).chat_template_kwargs == {}
    assert plain(chat_template_kwargs={"a": None}).chat_template_kwargs == {"a": None}
    assert '"chat_template_kwargs" must be an object' in plain(chat_template_kwargs=[1]).error


@pytest.mark.parametrize("form", [plain, openai])
def test_what_ends_an_answer_and_what_of_it_is_shown(form):
    own = {"stop_token_ids": [1, 2], "skip_special_tokens": False}
    line = form(**own, include_stop_str_in_output=True)
    expected = replace(PARAMS, stop_token_ids=(1, 2), skip_special_tokens=False)
    assert line.params == replace(expected, include_stop_str_in_output=True)
    assert '"stop_token_ids" must be a list of integers' in form(stop_token_ids="1").error
    assert "stop_token_ids -1 is out of range" in form(stop_token_ids=[-1]).error
    assert '"skip_special_tokens" must be true or false' in form(skip_special_tokens=0).error


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"{", "is not valid JSON: Expecting property name"),
        (b'{"id": "a", "prompt": "b"', "is not valid JSON: Expecting ',' delimiter"),
        (b'{"id": "a", "prompt": "b"} {}', "is not valid JSON: Extra data"),
        (b"[" * 99999, "is not valid JSON"),
        (b'{"id": 1' + 5000 * b"0" + b"}", "is not valid JSON"),
        (
            b'{"id": ' + 950 * b"[" + 950 * b"]" + b"}",
            "is not valid JSON: it is nested more than 64 levels deep",
        ),
        ({"id": "a", "prompt": "b", 500 * "x": 3}, f'has the unknown field "{100 * "x"}…"; known'),
        (b'{"id": "\xff"}', "is not UTF-8 text: invalid start byte at byte 8"),
        (b"\0\0\0", "is not valid JSON"),
        ([1], 'must be an object with an "id", not [1]'),
        ("text", 'must be an object with an "id", not "text"'),
        ({"prompt": "a"}, 'must be an object with an "id", not {"prompt": "a"}'),
        ({"id": None, "prompt": "a"}, 'must be an object with an "id"'),
        ({"id": True, "prompt": "a"}, 'must be an object with an "id"'),
        ({"id": 1.5, "prompt": "a"}, 'must be an object with an "id"'),
        ({"id": ["a"], "prompt": "a"}, 'must be an object with an "id"'),
        ({"id": "a"}, 'must have either "input_ids" or "prompt"'),
        ({"id": "a", "prompt": "a", "input_ids": [1]}, 'must have either "input_ids" or "prompt"'),
        ({"id": "a", "prompt": 5}, '"prompt" must be a string, not 5'),
        ({"id": "a", "prompt": ["b", "c"]}, '"prompt" must be a string, not ["b", "c"]'),
        ({"id": "a", "input_ids": "1 2"}, '"input_ids" must be a list of integers, not "1 2"'),
        ({"id": "a", "input_ids": [1, 2.0]}, '"input_ids" must be a list of integers'),
        ({"id": "a", "input_ids": [True]}, '"input_ids" must be a list of integers'),
        ({"id": "a", "prompt": "b", "maxtokens": 3}, 'has the unknown field "maxtokens"; known'),
    ],
)
def test_a_damaged_line_says_what_is_wrong(content, sentence):
    line = read(content)
    assert line.error.startswith("IN line 3") and sentence in line.error


@pytest.mark.parametrize("form", [plain, openai])
@pytest.mark.parametrize(
    "name, value, sentence",
    [
        ("temperature", -1, "temperature -1.0 is out of range: it must be 0 (greedy) or"),
        ("temperature", "0", '"temperature" must be a number, not "0"'),
        ("temperature", float("nan"), "temperature nan is out of range"),
        ("temperature", float("inf"), "temperature inf is out of range"),
        ("temperature", -(10**400), "temperature -1.8446744073709552e+19 is out of range"),
        ("temperature", True, '"temperature" must be a number, not true'),
        ("top_k", -1, "top_k -1 is out of range"),
        ("top_k", 1.5, '"top_k" must be a whole number, not 1.5'),
        ("top_p", 0, "top_p 0.0 is out of range: it must be above 0 and at most 1"),
        ("top_p", 10**400, "top_p 1.8446744073709552e+19 is out of range"),
        ("min_p", 2, "min_p 2.0 is out of range"),
        ("seed", 2**64, "seed 18446744073709551616 is out of range: it must be 0 to 2**64 - 1"),
        ("seed", "7", '"seed" must be a whole number, not "7"'),
        ("max_tokens", 0, "max_tokens 0 is out of range"),
        ("max_tokens", 3.0, '"max_tokens" must be a whole number, not 3.0'),
        ("stop", [""], "stop ('',) must be a list of texts, none of them empty"),
        ("stop", "", "stop ('',) must be a list of texts, none of them empty"),
        ("stop", 5, '"stop" must be a string or a list of strings, not 5'),
        ("stop", ["a", 5], '"stop" must be a string or a list of strings, not ["a", 5]'),
        ("ignore_eos", 1, '"ignore_eos" must be true or false, not 1'),
    ],
)
def test_a_wish_that_cannot_be_is_refused(form, name, value, sentence):
    error = form(**{name: value}).error
    assert error.startswith("IN line 3: ") and sentence in error


@pytest.mark.parametrize(
    "line, sentence",
    [
        (lambda: openai(n=2), '"n" 2 is not built: leave it out, or say 1'),
        (lambda: openai(stream=True), '"stream" true is not built: leave it out, or say false'),
        (lambda: openai(logprobs=0), '"logprobs" 0 is not built: leave it out, or say false'),
        (lambda: openai(frequency_penalty=0.5), '"frequency_penalty" 0.5 is not built'),
        (lambda: openai(tool_choice="required"), '"tool_choice" "required" is not built'),
        (lambda: openai(COMPLETION, tools=[{}]), 'unknown field "tools"'),
        (lambda: plain(tools=[{}]), 'unknown field "tools"'),
        (lambda: openai(guided_json="x"), 'its body has the unknown field "guided_json"'),
        (lambda: openai(prompt="x"), 'its body has the unknown field "prompt"'),
        (lambda: openai(model=4), '"model" must be a string, not 4'),
        (lambda: openai("/v1/embeddings"), f'"url" must be "{CHAT}" or "{COMPLETION}", not "/v1/e'),
        (lambda: openai(outside={"method": "GET"}), '"method" must be "POST", not "GET"'),
        (lambda: openai(outside={"body": []}), '"body" must be an object, not []'),
        (lambda: openai(outside={"custom_id": 4.5}), 'must be an object with an "custom_id"'),
        (lambda: openai(outside={"extra": 1}), 'has the unknown field "extra"'),
        (lambda: openai(COMPLETION, prompt=None), '"prompt" must be a string or a list of token'),
        (lambda: openai(COMPLETION, prompt=["a"]), '"prompt" must be a string or a list of token'),
        (lambda: openai(messages=[]), '"messages" must be a list of messages, not []'),
        (lambda: openai(messages=["hi"]), 'a message must have a "role" and a "content" of text'),
        (lambda: openai(messages=[{"content": "a"}]), 'must have a "role" and a "content"'),
        (
            lambda: openai(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
            'must have a "role" and a "content" of text',
        ),
        (
            lambda: openai(messages=[{"role": "user", "content": "a", "tool_calls": []}]),
            'a message has the unknown field "tool_calls"',
        ),
        (
            lambda: openai(max_tokens=4, max_completion_tokens=5),
            '"max_tokens" 4 and "max_completion_tokens" 5 say the same thing differently',
        ),
    ],
)
def test_what_openai_has_and_this_has_not_is_refused(line, sentence):
    assert sentence in line().error


def test_answers_bear_the_name_of_their_line():
    assert json.loads(plain().answer("é", [7, 8], "stop", 5)) == {
        "id": "a",
        "prompt": "b",
        "text": "é",
        "output_ids": [7, 8],
        "finish_reason": "stop",
        "prompt_tokens": 5,
        "completion_tokens": 2,
    }
    assert "é".encode() in plain().answer("é", [7, 8], "stop", 5)
    half = read(b'{"id": "\\ud800", "prompt": "b"}')
    assert json.loads(half.answer("", [], "stop", 1))["id"] == "\ud800"


@pytest.mark.parametrize(
    "url, kind, said",
    [
        (CHAT, "chat.completion", {"message": {"role": "assistant", "content": "é"}}),
        (COMPLETION, "text_completion", {"text": "é"}),
    ],
)
def test_answers_have_the_form_of_their_line(url, kind, said):
    answer = json.loads(openai(url, model="m").answer("é", [7, 8], "length", 5))
    body = answer["response"].pop("body")
    assert answer == {
        "id": "line-3",
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": "line-3"},
        "error": None,
    }
    assert type(body.pop("created")) is int
    assert body == {
        "id": "cmpl-3",
        "object": kind,
        "model": "m",
        "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
    }


def test_refusals_have_the_form_of_their_line():
    line = read(b"{")
    assert json.loads(line.error_response("why")) == {"id": None, "line": 3, "error": "why"}
    assert json.loads(plain(top_k=-1).error_response("why"))["id"] == "a"
    answer = json.loads(openai(n=2).error_response("why"))
    assert (answer["custom_id"], answer["response"]["status_code"]) == ("a", 400)
    assert answer["response"]["body"]["error"]["message"] == answer["error"]["message"] == "why"


def test_parameters_of_a_whole_job_are_checked():
    with pytest.raises(UserError, match="max_tokens 0 is out of range"):
        SamplingParams(max_tokens=0)
    with pytest.raises(UserError, match="none of them empty"):
        SamplingParams(stop=("",))
