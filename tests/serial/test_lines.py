"""Lines of a batch: what they may ask for, what they are refused for, the form of their answers."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from mpishard.batch.answers import CHAT, COMPLETION, PLAIN
from mpishard.batch.chat import with_text_contents
from mpishard.batch.requests import NEUTRAL, UNRELATED, BatchRequest, is_error, read_request
from mpishard.engine.sampling_params import SamplingParams
from mpishard.errors import UserError

PARAM_NAMES = [field.name for field in fields(SamplingParams)]
PARAMS = SamplingParams(temperature=0.5, seed=3, max_tokens=7, stop=("x",))
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]


def read(line: Any, number: int = 3) -> BatchRequest:
    content = line if isinstance(line, bytes) else json.dumps(line).encode()
    return read_request(content, number, PARAMS, f"IN line {number}")


def plain(**fields: Any) -> BatchRequest:
    return read({"id": "a", "prompt": "b", **fields})


def openai(url: str = CHAT, outside: dict[str, Any] | None = None, **body: Any) -> BatchRequest:
    asked = {"messages": MESSAGES} if url == CHAT else {"prompt": "b"}
    line = {"custom_id": "a", "method": "POST", "url": url, "body": {**asked, **body}}
    return read(line | (outside or {}))


def called(arguments: Any) -> dict[str, Any]:
    """A turn of an assistant that calls a function, as an SDK dumps it."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]}


def output(text: str | None, ids: list[int], reason: str, logprobs: Any = ()) -> dict[str, Any]:
    return {"text": text, "output_ids": ids, "finish_reason": reason, "logprobs": list(logprobs)}


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
    nothing = dict.fromkeys([*own, *PARAM_NAMES, "never_heard_of"])
    assert form(**nothing) == form(), "null is as good as nothing, in fields known or not"


def test_a_prompt_may_be_the_one_item_of_a_list():
    assert plain(prompt=["b"]) == plain()
    for prompt in ([1, 2], [[1, 2]]):
        assert plain(prompt=prompt).prompt == openai(COMPLETION, prompt=prompt).prompt == [1, 2]
        assert read({"id": "a", "input_ids": prompt}).prompt == [1, 2]
    assert openai(COMPLETION, prompt=["b"]).prompt == "b"
    assert plain(prompt=[]).prompt == []  # refused where it is encoded, as an empty text is


@pytest.mark.parametrize("form", [plain, openai])
def test_what_says_nothing_in_other_words(form):
    assert form(top_k=-1) == form(top_k=0) and form(top_k=-1).params.top_k == 0
    assert form(top_p=0, temperature=2).params.greedy
    assert form(seed=-1) == form(), "the job's"
    assert form(logprobs=False) == form()
    assert form(max_tokens=9.0, seed=3.0) == form(max_tokens=9), "as data frames write them"
    assert form(logit_bias={}) == form() and form(n=1) == form()
    assert form(logit_bias={"9": 1, "7": -100}).params.logit_bias == ((7, -100.0), (9, 1.0))


def test_log_probabilities_are_asked_for_in_three_ways():
    assert plain(logprobs=3).params.logprobs == 3
    assert openai(COMPLETION, logprobs=0, top_logprobs=0).params.logprobs == 0
    assert openai(logprobs=True).params.logprobs == openai(
        logprobs=True, top_logprobs=0
    ).params.logprobs == 0  # fmt: skip
    assert openai(logprobs=True, top_logprobs=5).params.logprobs == 5
    assert openai(logprobs=False, top_logprobs=None).params.logprobs is None


def test_conversations_with_tools_reach_the_template():
    """Arguments as objects, as templates have them; nothing that is null."""
    tool = {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "4"}]}
    dumped: dict[str, Any] = {
        "role": "assistant",
        "content": "so",
        "tool_calls": None,
        "annotations": [],
    }
    function = {"name": "f", "arguments": {"x": [None, 2]}}
    for arguments in ('{"x": [null, 2]}', {"x": [None, 2]}):
        assert openai(messages=[*MESSAGES, called(arguments), tool, dumped]).prompt == [
            *MESSAGES,
            {
                "role": "assistant",
                "tool_calls": [{"id": "c", "type": "function", "function": function}],
            },
            tool,
            {"role": "assistant", "content": "so"},
        ]
    empty = openai(messages=[called("")]).prompt[0]
    assert isinstance(empty, dict) and empty["tool_calls"][0]["function"]["arguments"] == {}


def test_openais_form():
    assert openai() == BatchRequest(3, CHAT, "a", MESSAGES, PARAMS)
    assert openai(COMPLETION, model="m") == BatchRequest(3, COMPLETION, "a", "b", PARAMS, "m")
    assert openai(COMPLETION, prompt=[1, 2]).prompt == [1, 2]
    assert openai(max_completion_tokens=4).params.max_tokens == 4
    assert openai(max_completion_tokens=4, max_tokens=4).params.max_tokens == 4
    unrelated: dict[str, Any] = dict.fromkeys(UNRELATED, "x")
    for url in (CHAT, COMPLETION):
        for values in zip(*(value * 2 for value in NEUTRAL.values()), strict=False):
            assert openai(url, **dict(zip(NEUTRAL, values, strict=True))).error == ""
        assert openai(url, **unrelated, echo=False, best_of=1).error == ""
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    conversation = openai(messages=[{"role": "user", "content": parts}]).prompt
    assert conversation == [{"role": "user", "content": parts}], "some templates take parts"
    assert with_text_contents(conversation) == [  # type: ignore[arg-type]
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
        ({"id": "a", "prompt": 5}, '"prompt" must be one string or one list of token ids, not 5'),
        ({"id": "a", "prompt": ["b", "c"]}, '"prompt" has several prompts, but a line has one: it'),
        ({"id": "a", "prompt": [["b"]]}, '"prompt" must be one string or one list of token ids'),
        ({"id": "a", "prompt": [[1], [2]]}, '"prompt" must be one string or one list of token ids'),
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
        ("top_k", -2, "top_k -2 is out of range: it must be 0 or -1 (no filter), or more"),
        ("top_k", 1.5, '"top_k" must be a whole number, not 1.5'),
        ("top_p", -0.1, "top_p -0.1 is out of range: it must be 0 to 1"),
        ("top_p", 10**400, "top_p 1.8446744073709552e+19 is out of range"),
        ("min_p", 2, "min_p 2.0 is out of range"),
        ("seed", 2**64, "seed 18446744073709551616 is out of range: it must be 0 to 2**64 - 1"),
        ("seed", -2, "seed -2 is out of range"),
        ("repetition_penalty", 0, "repetition_penalty 0.0 is out of range: it must be 1e-6 to 1e6"),
        ("presence_penalty", 2.5, "presence_penalty 2.5 is out of range: it must be -2 to 2"),
        ("frequency_penalty", float("nan"), "frequency_penalty nan is out of range"),
        ("logit_bias", [1], '"logit_bias" must be an object with numbers by token id, not [1]'),
        ("logit_bias", {"a": 1}, '"logit_bias" has "a", which is no token id'),
        ("logit_bias", {"-1": 1}, '"logit_bias" has "-1", which is no token id'),
        ("logit_bias", {"7": "x"}, '"logit_bias 7" must be a number, not "x"'),
        ("logit_bias", {"7": 101}, "a logit_bias of 101.0 is out of range: it must be -100 to 100"),
        ("logit_bias", {"7": float("nan")}, "a logit_bias of nan is out of range"),
        ("n", 0, "n 0 is out of range: it must be 1 to 128"),
        ("n", "1", '"n" must be a whole number, not "1"'),
        ("seed", "7", '"seed" must be a whole number, not "7"'),
        ("max_tokens", 0, "max_tokens 0 is out of range"),
        ("max_tokens", 3.5, '"max_tokens" must be a whole number, not 3.5'),
        ("max_tokens", float("inf"), '"max_tokens" must be a whole number, not Infinity'),
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
        (lambda: openai(stream=True), '"stream" true is not built: leave it out, or say false'),
        (lambda: openai(echo=True), '"echo" true is not built: leave it out, or say false'),
        (lambda: openai(COMPLETION, echo=1), '"echo" must be true or false, not 1'),
        (lambda: openai(COMPLETION, echo=True, logprobs=0), '"echo" with "logprobs" is not built'),
        (lambda: openai(best_of=2), '"best_of" 2 is not built, except if it is "n", which is 1'),
        (lambda: openai(n=2, best_of=1), '"best_of" 1 is not built, except if it is "n", which'),
        (lambda: openai(logprobs=0), '"logprobs" must be true or false, not 0; the number of tok'),
        (lambda: openai(top_logprobs=2), '"top_logprobs" 2 needs "logprobs" true'),
        (lambda: openai(top_logprobs=2, logprobs=False), '"top_logprobs" 2 needs "logprobs" true'),
        (lambda: openai(top_logprobs="2", logprobs=True), '"top_logprobs" must be a whole number'),
        (lambda: openai(top_logprobs=21, logprobs=True), "logprobs 21 is out of range: it must be"),
        (lambda: openai(COMPLETION, top_logprobs=2), '"top_logprobs" 2 needs a chat: give the num'),
        (lambda: openai(COMPLETION, logprobs=True), '"logprobs" must be a whole number, not true'),
        (lambda: openai(tool_choice="required"), '"tool_choice" "required" is not built'),
        (lambda: openai(COMPLETION, tools=[{}]), '"tools" [{}] is not built: leave it out'),
        (lambda: plain(tools=[{}]), 'unknown field "tools"'),
        (lambda: openai(guided_json="x"), 'its body has the unknown field "guided_json"'),
        (lambda: openai(prompt="x"), 'its body has the unknown field "prompt"'),
        (lambda: openai(model=4), '"model" must be a string, not 4'),
        (lambda: openai("/v1/embeddings"), f'"url" must be "{CHAT}" or "{COMPLETION}", not "/v1/e'),
        (lambda: openai(outside={"method": "GET"}), '"method" must be "POST", not "GET"'),
        (lambda: openai(outside={"body": []}), '"body" must be an object, not []'),
        (lambda: openai(outside={"custom_id": 4.5}), 'must be an object with an "custom_id"'),
        (lambda: openai(outside={"extra": 1}), 'has the unknown field "extra"'),
        (lambda: openai(COMPLETION, prompt=None), '"prompt" must be one string or one list of tok'),
        (lambda: openai(COMPLETION, prompt=["a", "b"]), '"prompt" has several prompts, but a line'),
        (lambda: openai(messages=[]), '"messages" must be a list of messages, not []'),
        (lambda: openai(messages=["hi"]), 'a message must have a "role" and a "content" of text'),
        (lambda: openai(messages=[{"content": "a"}]), 'must have a "role" and a "content"'),
        (
            lambda: openai(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
            'a message has a part of the type "image_url", but only "text" is built',
        ),
        (
            lambda: openai(messages=[{"role": "user", "content": "a", "function_call": {}}]),
            'a message has the unknown field "function_call"',
        ),
        (
            lambda: openai(messages=[{"role": "assistant", "content": None}]),
            'a message must have a "role" and a "content" of text, or "tool_calls", not',
        ),
        (
            lambda: openai(messages=[{"role": "assistant", "tool_calls": [{"id": "x"}]}]),
            'one of the "tool_calls" must have a "function" with a "name", not {"id": "x"}',
        ),
        (
            lambda: openai(messages=[called("{")]),
            'the "arguments" of a tool call must be a JSON object, not "{"',
        ),
        (
            lambda: openai(messages=[called("[]")]),
            'the "arguments" of a tool call must be a JSON object, not []',
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
    said = output("é", [7, 8], "stop")
    assert json.loads(plain().answer([said], 5)) == {
        "id": "a",
        "prompt": "b",
        "text": "é",
        "output_ids": [7, 8],
        "finish_reason": "stop",
        "prompt_tokens": 5,
        "completion_tokens": 2,
    }
    assert "é".encode() in plain().answer([said], 5)
    half = read(b'{"id": "\\ud800", "prompt": "b"}')
    assert json.loads(half.answer([output("", [], "stop")], 1))["id"] == "\ud800"


@pytest.mark.parametrize(
    "url, kind, said",
    [
        (CHAT, "chat.completion", {"message": {"role": "assistant", "content": "é"}}),
        (COMPLETION, "text_completion", {"text": "é"}),
    ],
)
def test_answers_have_the_form_of_their_line(url, kind, said):
    said_here = output("é", [7, 8], "length")
    answer = json.loads(openai(url, model="m").answer([said_here], 5))
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
    assert json.loads(plain(top_k=-2).error_response("why"))["id"] == "a"
    answer = json.loads(openai(n=0).error_response("why"))
    assert (answer["custom_id"], answer["response"]["status_code"]) == ("a", 400)
    assert answer["response"]["body"]["error"]["message"] == answer["error"]["message"] == "why"


def test_parameters_of_a_whole_job_are_checked():
    with pytest.raises(UserError, match="max_tokens 0 is out of range"):
        SamplingParams(max_tokens=0)
    with pytest.raises(UserError, match="none of them empty"):
        SamplingParams(stop=("",))


# Several answers, log-probabilities, echo

TEXTS = {7: "é", 8: " b", 9: "\ufffd", 5: " b"}
LOGPROBS = [{"7": -0.5, "9": -1.0}, {"5": -0.25, "8": -2.0, "9": -np.inf}]


def test_several_answers_to_a_plain_line():
    outputs = [output("é", [7], "length"), output(" b", [8, 9], "stop", LOGPROBS[1:])]
    assert json.loads(plain(n=2).answer(outputs, 5)) == {
        "id": "a",
        "prompt": "b",
        "choices": [
            {"index": 0, "text": "é", "output_ids": [7], "finish_reason": "length"},
            {
                "index": 1,
                "text": " b",
                "output_ids": [8, 9],
                "finish_reason": "stop",
                "logprobs": [{"5": -0.25, "8": -2.0, "9": -9999.0}],
            },
        ],
        "prompt_tokens": 5,
        "completion_tokens": 3,
    }


def test_log_probabilities_of_a_completion():
    """Of tokens that look alike the likeliest counts; infinity is no number of JSON."""
    said = output("é b", [7, 8], "length", LOGPROBS)
    line = openai(COMPLETION, logprobs=1, n=2)
    body = json.loads(line.answer([said, said], 5, TEXTS.__getitem__))["response"]["body"]
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["choices"][1]["logprobs"] == {
        "tokens": ["é", " b"],
        "token_logprobs": [-0.5, -2.0],
        "top_logprobs": [{"é": -0.5, "\ufffd": -1.0}, {" b": -0.25, "\ufffd": -9999.0}],
        "text_offset": [0, 1],
    }


def test_log_probabilities_of_a_chat():
    """The chosen token is not among the likeliest unless it is one; half a character has no bytes
    that the text would show."""
    said = output("é b", [7, 8], "length", LOGPROBS)
    line = openai(logprobs=True, top_logprobs=2)
    body = json.loads(line.answer([said], 5, TEXTS.__getitem__))["response"]["body"]
    first, second = body["choices"][0]["logprobs"]["content"]
    assert first == {
        "token": "é",
        "logprob": -0.5,
        "bytes": [0xC3, 0xA9],
        "top_logprobs": [
            {"token": "é", "logprob": -0.5, "bytes": [0xC3, 0xA9]},
            {"token": "\ufffd", "logprob": -1.0, "bytes": None},
        ],
    }
    assert second["logprob"] == -2.0 and [top["logprob"] for top in second["top_logprobs"]] == [
        -0.25,
        -2.0,
    ]


def test_an_echo_stands_before_every_answer():
    line = openai(COMPLETION, echo=True)
    body = json.loads(line.answer([output("é", [7], "stop")], 1, str, "b"))["response"]["body"]
    assert body["choices"][0]["text"] == "bé"


def test_errors_are_told_from_answers():
    for line in (plain(), openai(), openai(COMPLETION)):
        assert is_error(line.error_response("why"))
        assert not is_error(line.answer([output("error", [7], "stop")], 1))
