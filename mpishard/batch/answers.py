"""The lines of a batch's output, in the forms of its input's."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import accumulate
from time import time
from typing import Any

PLAIN, COMPLETION, CHAT = "plain", "/v1/completions", "/v1/chat/completions"

# JSON has no infinity; vLLM gives this in its place.
LEAST_LOGPROB = -9999.0

# An answer: `text`, `output_ids`, `finish_reason` and `logprobs`, which is empty or has for each
# of the ids log-probabilities by token id.
Output = dict[str, Any]
TokenText = Callable[[int], str]


def plain_answer(name: Any, prompt: Any, outputs: Sequence[Output], prompt_tokens: int) -> bytes:
    """The answer to a plain line; several answers to one prompt are its `choices`."""
    said = [_plain(output) for output in outputs]
    if len(said) > 1:
        said = [{"choices": [{"index": i, **one} for i, one in enumerate(said)]}]
    completion_tokens = sum(len(output["output_ids"]) for output in outputs)
    return dump(
        {
            "id": name,
            "prompt": prompt,
            **said[0],
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
        }
    )


def openai_body(
    form: str,
    number: int,
    model: str,
    outputs: Sequence[Output],
    prompt_tokens: int,
    token_text: TokenText,
    top_logprobs: int = 0,
    echoed: str = "",
) -> dict[str, Any]:
    """What OpenAI's API answers to the request of line `number`. `token_text` gives the text of a
    token by itself; `top_logprobs` is the number of tokens that a chat shows in each place; each
    text begins with what is `echoed`."""
    choices = []
    for index, output in enumerate(outputs):
        if form == CHAT:
            said = {"message": {"role": "assistant", "content": output["text"]}}
            logprobs = chat_logprobs(output, top_logprobs, token_text)
        else:
            said = {"text": echoed + output["text"] if echoed else output["text"]}
            logprobs = completion_logprobs(output, token_text, len(echoed))
        end = {"logprobs": logprobs, "finish_reason": output["finish_reason"]}
        choices.append({"index": index, **said, **end})
    completion_tokens = sum(len(output["output_ids"]) for output in outputs)
    return {
        "id": f"cmpl-{number}",
        "object": "chat.completion" if form == CHAT else "text_completion",
        "created": int(time()),
        "model": model,
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def completion_logprobs(
    output: Output, token_text: TokenText, offset: int = 0
) -> dict[str, Any] | None:
    """The log-probabilities of a completion, whose first token is at `offset` of the text."""
    if not output["logprobs"]:
        return None
    tokens = [token_text(token) for token in output["output_ids"]]
    top: list[dict[str, float]] = []
    for by_id in output["logprobs"]:
        texts = [(token_text(int(token)), _finite(value)) for token, value in by_id.items()]
        top.append(dict(reversed(texts)))  # of tokens that look alike the likeliest counts
    return {
        "tokens": tokens,
        "token_logprobs": [_chosen(output, place) for place in range(len(tokens))],
        "top_logprobs": [dict(reversed(one.items())) for one in top],
        "text_offset": list(accumulate(map(len, tokens[:-1]), initial=offset)),
    }


def chat_logprobs(output: Output, count: int, token_text: TokenText) -> dict[str, Any] | None:
    """The log-probabilities of a message: of each token, and of the `count` likeliest in its
    place."""
    if not output["logprobs"]:
        return None

    def entry(token: int, value: float) -> dict[str, Any]:
        text = token_text(token)
        whole = "\N{REPLACEMENT CHARACTER}" not in text  # else its bytes are not those of the text
        return {
            "token": text,
            "logprob": _finite(value),
            "bytes": list(text.encode()) if whole else None,
        }

    content = []
    for place, (token, by_id) in enumerate(
        zip(output["output_ids"], output["logprobs"], strict=True)
    ):
        top = [entry(int(one), value) for one, value in by_id.items()][:count]
        content.append({**entry(token, _chosen(output, place)), "top_logprobs": top})
    return {"content": content}


def dump(answer: dict[str, Any]) -> bytes:
    """One line of JSON, legible where it can be written in UTF-8."""
    try:
        return json.dumps(answer, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a character, in an id or a prompt
        return json.dumps(answer).encode()


def _plain(output: Output) -> dict[str, Any]:
    said = {name: output[name] for name in ("text", "output_ids", "finish_reason")}
    if output["logprobs"]:
        said["logprobs"] = [
            {token: _finite(value) for token, value in by_id.items()}
            for by_id in output["logprobs"]
        ]
    return said


def _chosen(output: Output, place: int) -> float:
    """The log-probability of the token at a `place` of an answer."""
    token, by_id = output["output_ids"][place], output["logprobs"][place]
    return _finite(by_id[token] if token in by_id else by_id[str(token)])


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
