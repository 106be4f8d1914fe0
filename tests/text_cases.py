"""Tokenizer directories, chat templates and conversations in the style of published ones, that
transformers and mpishard both read: ``scripts/dev/make_text_goldens.py`` has what transformers
makes of them, ``tests/serial/test_text_goldens.py`` compares."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tiny_tokenizers
from tokenizers import AddedToken, Tokenizer, processors

TEXTS = (
    "",
    "hello",
    " hello  the world in on",
    "hello<|im_end|>\n",
    "<|im_start|>user\nthe world<|im_end|>",
    "the <tool> in<tool>on <think>hello</think>",
    "hello  <mask>  world<mask>in",
    "<s>the</s> <pad>",
    "é€漢 \U0001f680 cafe\u0301",
    "\n\n  the\tin\r\n",
    "The WORLD, 0123! don't",
    "<image><|extra|>a<|im_end|><|im_end|>",
)

Files = dict[str, Any]


def write(directory: Path, tokenizer: Tokenizer, files: Files) -> Path:
    """`directory`, with the tokenizer and the files of these names beside it."""
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    files = {"tokenizer_config.json": {}, **files}
    config = files["tokenizer_config.json"]
    files["tokenizer_config.json"] = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name).write_text(text, encoding="utf-8")
    return directory


# Tokenizers, and what stands beside them


def bare(*words: str) -> Tokenizer:
    """Byte-level BPE that knows these words, but not as added tokens."""
    tree = json.loads(tiny_tokenizers.byte_level().to_str())
    vocab = tree["model"]["vocab"]
    tree["added_tokens"] = []
    for word in (*words, *tiny_tokenizers.CHAT):
        vocab.setdefault(word, len(vocab))
    return Tokenizer.from_str(json.dumps(tree))


def plain(*tokens: str) -> Tokenizer:
    """Byte-level BPE with added tokens that are not special."""
    tokenizer = bare()
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    return tokenizer


def token(content: str, **flags: bool) -> dict[str, Any]:
    """A token as files write it."""
    common = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, **common, **flags}


def decoder(*tokens: dict[str, Any], start: int, **config: Any) -> Files:
    """A ``tokenizer_config.json`` that lists tokens with their ids."""
    listed = {str(start + place): {"special": True, **one} for place, one in enumerate(tokens)}
    return {"tokenizer_config.json": {"added_tokens_decoder": listed, **config}}


def config(**fields: Any) -> Files:
    """A ``tokenizer_config.json``."""
    return {"tokenizer_config.json": fields}


def _alone(make: Callable[[], Tokenizer]) -> tuple[Tokenizer, Files]:
    return make(), {}


SIZE = bare().get_vocab_size()
CHAT_TOKENS = [token(one) for one in tiny_tokenizers.CHAT]

DIRECTORIES: dict[str, Callable[[], tuple[Tokenizer, Files]]] = {
    **{kind: partial(_alone, make) for kind, make in tiny_tokenizers.KINDS.items()},
    "chat tokens in the decoder": lambda: (bare(), decoder(*CHAT_TOKENS, start=SIZE - 2)),
    "new tokens in the decoder": lambda: (
        bare(),
        decoder(token("<think>"), token("</think>", special=False), start=SIZE),
    ),
    "special in the decoder alone": lambda: (
        plain("<tool>", "<|im_end|>"),
        decoder(token("<|im_end|>"), token("<tool>", special=False), start=SIZE - 1),
    ),
    "tokens that strip": lambda: (
        bare(),
        decoder(
            token("<mask>", lstrip=True, rstrip=True),
            token("<tool>", single_word=True, special=False),
            token("the", normalized=True, special=False),
            start=SIZE,
        ),
    ),
    "other ids than declared": lambda: (
        bare(),
        decoder(token("<think>"), token("<|im_end|>"), token("<mask>"), start=SIZE + 40),
    ),
    "added_tokens.json": lambda: (
        bare(),
        {
            "added_tokens.json": {"<think>": SIZE + 1, "<|extra|>": SIZE},
            **config(eos_token="<|im_end|>", pad_token="<|extra|>"),
        },
    ),
    "special_tokens_map.json": lambda: (
        bare(),
        {
            "special_tokens_map.json": {
                "eos_token": token("<|im_end|>"),
                "pad_token": "<pad>",
                "mask_token": token("<mask>", lstrip=True),
            },
            "added_tokens.json": {"<pad>": SIZE},
            **config(eos_token="</s>", bos_token="<s>"),
        },
    ),
    "a map beside a decoder": lambda: (
        bare(),
        {
            "special_tokens_map.json": {"eos_token": "<never>"},
            "added_tokens.json": {"<never>": SIZE},
            **decoder(token("<think>"), start=SIZE, eos_token="<|im_end|>"),
        },
    ),
    "additional_special_tokens": lambda: (
        bare(),
        config(additional_special_tokens=["<|extra|>", "<|im_start|>", "<|im_end|>"]),
    ),
    "additional_special_tokens in the map": lambda: (
        bare(),
        {"special_tokens_map.json": {"additional_special_tokens": ["<|im_end|>", "<image>"]}},
    ),
    "additional_special_tokens in both": lambda: (
        bare(),
        {
            "special_tokens_map.json": {"additional_special_tokens": ["<image>"]},
            **config(additional_special_tokens=["<|extra|>"]),
        },
    ),
    "extra_special_tokens": lambda: (
        plain("<tool>"),
        config(extra_special_tokens=["<|extra|>", "<tool>", "<|im_end|>"]),
    ),
    "extra_special_tokens by name": lambda: (
        plain("<tool>"),
        config(extra_special_tokens={"image_token": "<image>", "tool_token": "<tool>"}),
    ),
    "tokens with names of their own": lambda: (
        bare(),
        config(image_token="<image>", think_token="<think>", add_bos_token=False),
    ),
    "named words of the vocabulary": lambda: (
        bare("<s>", "</s>", "<pad>"),
        config(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token=None),
    ),
    "special tokens to be split": lambda: (
        tiny_tokenizers.byte_level(),
        config(split_special_tokens=True),
    ),
    "add_bos_token": lambda: (
        bare("<s>"),
        config(bos_token="<s>", add_bos_token=True, add_eos_token=True),
    ),
    "add_bos_token and a post-processor": lambda: (
        _with_bos(bare("<s>")),
        config(bos_token="<s>", add_bos_token=False),
    ),
    "tokens beside byte fallback": lambda: (
        tiny_tokenizers.byte_fallback(),
        config(additional_special_tokens=["<image>"], eos_token="</s>"),
    ),
}


def _with_bos(tokenizer: Tokenizer) -> Tokenizer:
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    return tokenizer


# Conversations

USER = {"role": "user", "content": "What is 2 + 2?"}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": 'Adds <two> numbers & "more"',
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number"}, "b": {"type": ["number", "null"]}},
            "required": ["a"],
        },
    },
}
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "add", "arguments": {"a": 2, "b": None, "é": [True, 1.5]}},
}

CONVERSATIONS: dict[str, dict[str, Any]] = {
    "a question": {"messages": [USER]},
    "turns": {
        "messages": [
            {"role": "system", "content": "  Be brief, é.  "},
            USER,
            {"role": "assistant", "content": "<think>\nsum\n</think>\n\n4  "},
            {"role": "user", "content": "\n漢字 {{ no }} <|im_end|>\n"},
        ]
    },
    "tools": {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
            {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "4"},
        ],
        "tools": [TOOL],
    },
    "documents": {
        "messages": [USER],
        "documents": [{"title": "T", "text": "é\nu"}, {"title": "", "text": "v"}],
    },
    "variables": {
        "messages": [USER, {"role": "assistant", "content": "5", "reasoning": "odd"}, USER],
        "enable_thinking": False,
        "custom": {"a": [1, "é"]},
        "eos_token": "[own]",
    },
    "parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "x"}]}]
    },
    "no tools": {"messages": [USER], "tools": []},
    "no assistant": {"messages": [USER], "add_generation_prompt": False},
}

# Templates: the text, or the files that have it

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

TOOLS = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(last=messages | length - 1, open=true) %}
{%- for message in messages[::-1] %}
    {%- if ns.open and message.role == "user" and message.content is string %}
        {%- set ns.open = false %}
        {%- set ns.last = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content if message.content is string else '' %}
        {%- set thoughts = message.reasoning_content or '' %}
        {%- if not thoughts and '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last %}{{ '<think>' + thoughts + '</think>' }}{% endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- if call.function %}{% set call = call.function %}{% endif %}
            {{- '\\n<tool_call>{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- elif not (message.role == 'system' and tools) %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

HEADERS = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|header|>system<|/header|>\\n\\nToday: " + date_string + "\\n\\n" + system_message }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|header|>' + message['role'] + '<|/header|>\\n\\n'+ message['content'] | trim }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("This model calls one tool at a time!") }}
        {%- endif %}
        {{- message.tool_calls[0].function.arguments | tojson(indent=4) }}
    {%- else %}
        {{- (message.content if message.content is mapping else message.content | tojson) }}
    {%- endif %}
    {{- eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\\n\\n' }}{% endif %}
"""

ALTERNATING = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{ bos_token }}
{%- for message in loop_messages | rejectattr("role", "equalto", "tool") %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Roles must alternate user/assistant/user/assistant/...!") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{ '"' + key + '": "' + val + '"' }}
                    {%- else %}{{ '"' + key + '": ' + val | tojson }}
                    {%- endif %}
                    {%- if not loop.last %}{{ ", " }}{% endif %}
                {%- endfor %}
                {{- "}}" }}
            {%- endfor %}
            {{- "][/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] " ~ message.tool_calls | map(attribute="function.name") | join(",") }}
    {%- else %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""

TURNS = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}
            {%- else -%}<image>
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""

ROLES = (
    "{% for m in messages %}{{'<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}"
    "{{ eos_token }}{% endif %}"
)

SURROUNDINGS = """\
{% set d = dict(a=1, b=[2]) -%}
{{ d | tojson }} {{ dict.fromkeys(["x", "y"], 0) | tojson(sort_keys=True) }}
{%- set ns = namespace(found=false, n=0) %}
{% for message in messages %}
    {% if message.role == "assistant" %}{% continue %}{% endif %}
    {% set ns.n = ns.n + 1 %}
    {{ loop.index }}:{{ message.role | upper }}
    {% if ns.n > 2 %}{% break %}{% endif %}
{% endfor %}
{{ {"é": ["<b>", 1.0, none]} | tojson(ensure_ascii=False, indent=2) }}
{{ {"é": "<"} | tojson(ensure_ascii=True, separators=(",", ":")) }}
{% generation %}{% set inside = 5 %}{{ ns.n }}{{ inside }}{% endgeneration %}
{{ inside is defined }} {{ custom | default("none") | tojson(2) }} {{ (1, 2) | tojson }}
{% macro show(x, y="z") %}<{{ x }}{{ y }}>{% endmacro %}{{ show(messages | length) }}
{{ messages[0].content[::-1] if messages[0].content is string else "parts" }}
    {# a comment #}
"""

NAMES = (
    "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ image_token }}|"
    "{{ tool_token }}|{{ think_token is defined }}|{{ additional_special_tokens is defined }}|"
    "{{ add_bos_token is defined }}|{{ extra_special_tokens is defined }}"
)

REASONING = """\
{%- for m in messages -%}
[{{ m.role }}]{% if m.thinking is defined %}({{ m.thinking }}){% endif %}
{%- if m.reasoning_content is defined %}<{{ m.reasoning_content }}>{% endif -%}
{{ m.content if m.content is defined else "nothing" }}{{ "refusal" in m }}
{% endfor %}{{ documents | length if documents else documents is none }}{{ tools is none }}
"""

BOS = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES: dict[str, Files] = {
    "chatml": config(chat_template=CHATML),
    "tools": config(chat_template=TOOLS),
    "headers": config(chat_template=HEADERS, **BOS),
    "alternating": config(chat_template=ALTERNATING, **BOS),
    "turns": {"chat_template.jinja": TURNS, **config(chat_template="never", **BOS)},
    "roles": config(chat_template=ROLES, eos_token="<|im_end|>"),
    "surroundings": config(chat_template=SURROUNDINGS),
    "names": config(
        chat_template=NAMES,
        pad_token=None,
        additional_special_tokens=["<|extra|>"],
        image_token="<image>",
        **BOS,
    ),
    "names of extra tokens": config(
        chat_template=NAMES, extra_special_tokens={"tool_token": "<tool>", "image_token": "<i>"}
    ),
    "names in the map": {
        "special_tokens_map.json": {"bos_token": token("<map>"), "think_token": "<think>"},
        **config(chat_template=NAMES, **BOS),
    },
    "an empty name": config(chat_template=NAMES, pad_token="", bos_token="<s>"),
    "names as transformers 5 writes them": config(
        chat_template=NAMES, model_specific_special_tokens={"tool_token": "<tool>"}
    ),
    "reasoning": config(chat_template=REASONING),
    "several": config(
        chat_template=[
            {"name": "tool_use", "template": "with {{ tools | length }}"},
            {"name": "default", "template": "default"},
        ]
    ),
    "by name": config(chat_template={"default": "default", "rag": "{{ documents | tojson }}"}),
    "by name without a default": config(chat_template={"tool_use": "tools", "rag": "rag"}),
    "in a folder": {
        "chat_template.jinja": "file\n{{ messages[0].content }}\n",
        "additional_chat_templates/tool_use.jinja": "{{ tools | tojson(indent=1) }}\n\n",
        **config(chat_template="never"),
    },
    "in a folder alone": {
        "additional_chat_templates/rag.jinja": "rag",
        **config(chat_template="never"),
    },
    "no list may be changed": config(chat_template="{{ messages.append(1) }}"),
    "no underscore": config(chat_template="{% set ns = namespace(_a=1) %}{{ ns._a }}"),
    "no attribute of dict": config(chat_template="{{ dict.mro() }}"),
    "undefined": config(chat_template="{{ missing.attribute }}"),
    "none": {},
}
