"""What goes to a model as text and what comes back, as it is typed and asked for in files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_text import write_speaker

import mpishard as package
from commands.shell import VARIANT, completions, mpishard, refusal_here
from mpishard.tokenizer import Tokenizer

LONG = ["--prompt", "the in", "--max-tokens", "12", "--ignore-eos"]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template shows what it is given, and whose configuration says add_bos_token."""
    model = write_speaker(VARIANT, tmp_path_factory.mktemp("models") / "chatty")
    template = (
        "{{ bos_token }}{{ messages[-1].content }}{% if enable_thinking is false %} no{% endif %}"
        "{{ tools | length if tools }}{{ documents | map(attribute='text') | join if documents }}"
    )
    settings = {"bos_token": "<s>", "add_bos_token": True, "chat_template": template}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    return model


def test_tokens_that_stop_and_tokens_that_are_shown(model):
    text = Tokenizer(model)
    (whole,) = completions(None, model, *LONG)
    ids = whole["output_ids"]
    place = next(place for place in range(3, 12) if ids[place] not in ids[:place])
    stopped = [*LONG, "--stop-token-ids", f"5000000000,{ids[place]}"]
    assert "stop_token_ids has token id 5000000000" in refusal_here("generate", model, *stopped)
    stopped[-1] = f"0,{ids[place]}"
    (answer,) = completions(None, model, *stopped)
    assert answer["output_ids"] == ids[: place + 1] and answer["finish_reason"] == "stop"
    assert whole["text"].startswith(answer["text"])
    (shown,) = completions(None, model, *stopped, "--include-stop-str-in-output")
    assert shown["text"] == answer["text"] + text.decode([ids[place]])
    assert shown["output_ids"] == answer["output_ids"]


def test_special_tokens_are_shown_on_request_and_are_stop_strings(chatty):
    """In the sampled answers of an untrained model there are some."""
    how = ["--prompt", "a", "--temperature", "5", "--max-tokens", "40", "--ignore-eos"]
    for seed in range(20):
        (shown,) = completions(
            None, chatty, *how, "--seed", seed, "--no-skip-special-tokens", "--json"
        )[:1]
        if "</s>" in shown["text"]:
            break
    how += ["--seed", str(seed)]
    assert "</s>" in shown["text"]
    (hidden,) = completions(None, chatty, *how)
    assert hidden["output_ids"] == shown["output_ids"] and "</s>" not in hidden["text"]
    (stopped,) = completions(None, chatty, *how, "--stop", "</s>")
    assert stopped["finish_reason"] == "stop"
    assert stopped["output_ids"] == shown["output_ids"][: shown["output_ids"].index(2) + 1]


def test_a_prompt_begins_with_a_token_on_request(chatty):
    plain, with_bos, without = (
        completions(None, chatty, *LONG, *flags)[0]["prompt_tokens"]
        for flags in ([], ["--add-bos"], ["--no-add-bos"])
    )
    assert (with_bos, without) == (plain + 1, plain)
    said = mpishard(None, "generate", chatty, *LONG).stderr
    assert said.count("tokenizer_config.json says add_bos_token, but tokenizer.json adds none") == 1
    for flag in ("--add-bos", "--no-add-bos"):
        assert "add_bos_token" not in mpishard(None, "generate", chatty, *LONG, flag).stderr
    message = refusal_here("generate", chatty, *LONG, "--chat", "--no-add-bos")
    assert message.startswith("--no-add-bos has no effect with --chat")


def test_a_model_without_such_a_token(chatty, tmp_path):
    shutil.copytree(chatty, tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").unlink()
    message = refusal_here("generate", tmp_path / "model", *LONG, "--add-bos")
    assert message.startswith("--add-bos: ") and "has no bos_token" in message


def test_the_chat_template_is_given_variables(chatty):
    text = Tokenizer(chatty)

    def count(*flags: str) -> int:
        return completions(None, chatty, *LONG, "--chat", *flags)[0]["prompt_tokens"]

    expected = len(text.encode("<s>the in no", special=False))
    assert count("--chat-template-kwargs", '{"enable_thinking": false}') == expected
    assert count() == expected - len(text.encode(" no"))
    message = refusal_here("generate", chatty, *LONG, "--chat-template-kwargs", "{}x")
    assert "--chat-template-kwargs: '{}x' is not valid JSON" in message
    message = refusal_here("generate", chatty, *LONG, "--chat-template-kwargs", '{"a": 1}')
    assert message.startswith("--chat-template-kwargs has no effect without --chat")
    given = ["--chat", "--chat-template-kwargs", '{"tokenize": true}']
    assert '"tokenize" is no variable' in refusal_here("generate", chatty, *LONG, *given)


def test_lines_give_variables_tools_and_documents(chatty, tmp_path):
    messages = [{"role": "user", "content": "a"}]
    bodies = [
        {"messages": messages},
        {"messages": messages, "chat_template_kwargs": {"enable_thinking": True}},
        {"messages": messages, "tools": [{"type": "function"}] * 3, "tool_choice": "auto"},
        {"messages": messages, "documents": [{"text": "the"}, {"text": "in"}]},
    ]
    lines = [
        {"custom_id": str(place), "url": "/v1/chat/completions", "body": body}
        for place, body in enumerate(bodies)
    ]
    lines.append({"id": "plain", "prompt": "a", "chat_template_kwargs": {"a": 1}})
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["--chat-template-kwargs", '{"enable_thinking": false}']
    words = ["batch", chatty, "--input", source, "--output", target, "--max-tokens", 2, *given]
    assert mpishard(None, *words).returncode == 0
    *answers, refused = map(json.loads, target.read_text().splitlines())
    found = [one["response"]["body"]["usage"]["prompt_tokens"] for one in answers]
    text = Tokenizer(chatty)
    said = ["<s>a no", "<s>a", "<s>a no3", "<s>a nothein"]
    assert found == [len(text.encode(one, special=False)) for one in said]
    assert "chat_template_kwargs have no effect without --chat" in refused["error"]


def test_parts_of_a_content_go_to_templates_that_take_them(chatty, tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1}
    line = {"custom_id": "a", "url": "/v1/chat/completions", "body": body}
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(line) + "\n")
    found: list[int] = []
    for template in (
        "{{ messages[0].content }}",
        "{% for p in messages[0]['content'] %}{{ p.text }}{% endfor %}",
        "{% macro say(content) %}{% for p in content %}{{ p.text }}{% endfor %}{% endmacro %}"
        "{{ say(messages[0].content) }}",
    ):
        model = tmp_path / f"model{len(found)}"
        shutil.copytree(chatty, model)
        (model / "chat_template.jinja").write_text(template)
        package.load(model).batch(source, tmp_path / f"out{len(found)}")
        (answer,) = (tmp_path / f"out{len(found)}").read_text().splitlines()
        found.append(json.loads(answer)["response"]["body"]["usage"]["prompt_tokens"])
    text = Tokenizer(chatty)
    assert found == [len(text.encode(said, special=False)) for said in ("a\nb", "ab", "ab")]


def test_the_same_in_python(chatty):
    model = package.load(chatty, add_bos=True)
    params = package.SamplingParams(max_tokens=2, stop_token_ids=[5], skip_special_tokens=False)
    (answer,) = model.generate("a", params)
    text = Tokenizer(chatty)
    assert answer.prompt_tokens == 1 + len(text.encode("a"))
    chat = {"chat": True, "chat_template_kwargs": {"enable_thinking": False}}
    (answer,) = model.generate(["a"], params, **chat)
    assert answer.prompt_tokens == len(text.encode("<s>a no", special=False))
    with pytest.raises(package.UserError, match="no effect without chat"):
        model.generate(["a"], params, chat_template_kwargs={"a": 1})
