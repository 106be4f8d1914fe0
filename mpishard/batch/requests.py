"""The lines of a batch: what each asks for, and its answer in the same form.

plain    ``{"id": "a", "prompt": "text", "max_tokens": 9}`` or with ``"input_ids": [1, 2]``, and for
         a model with an encoder ``"decoder_input_ids": [0, 3]``
OpenAI   ``{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {…}}``, the
         form of OpenAI's Batch API, which vLLM's run-batch takes as well, or ``/v1/completions``

Forms may be mixed. A field that is null counts as absent, known or not. A line that cannot be
answered is answered with the reason, in its own form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mpishard.batch.answers import (
    CHAT,
    COMPLETION,
    PLAIN,
    Output,
    TokenText,
    dump,
    openai_body,
    plain_answer,
)
from mpishard.batch.chat import TEMPLATE_FIELDS, read_messages, template_kwargs
from mpishard.batch.fields import (
    check_fields,
    decoder_ids_of,
    name_of,
    one_prompt,
    prompt_of,
    read_object,
    short,
    without_nulls,
)
from mpishard.batch.params import PARAMS, openai_params, read_params
from mpishard.engine.sampling_params import SamplingParams
from mpishard.errors import UserError

PLAIN_FIELDS = ("id", "prompt", "input_ids", "decoder_input_ids", "chat_template_kwargs", *PARAMS)
OPENAI_FIELDS = ("custom_id", "method", "url", "body")
OTHERS = ("echo", "add_special_tokens")
PARAMS_OF_BODY = (*PARAMS, "max_completion_tokens", "top_logprobs", "best_of")

# Fields of an OpenAI body that change nothing about the answer.
UNRELATED = (
    *("model", "user", "metadata", "store", "service_tier", "safety_identifier", "request_id"),
    *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls", "stream_options"),
)
# Fields that may be there only with a value that asks for nothing; vLLM's are among them.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "bad_words": ([],),
    "detokenize": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "priority": (0,),
    "include_reasoning": (True,),
    "return_hidden_states": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
}
NEUTRAL_IN_CHAT: dict[str, tuple[Any, ...]] = {"echo": (False,), "add_special_tokens": (False,)}
NEUTRAL_IN_COMPLETION: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    "tools": ([],),
    "documents": ([],),
    "chat_template_kwargs": ({},),
}


@dataclass(frozen=True)
class BatchRequest:
    """What one line asks for. `error` says why it cannot be answered, if it cannot; `is_object` is
    false of a line that is no JSON object at all."""

    number: int  # in the file, from 1
    form: str = PLAIN
    name: Any = None
    prompt: str | list[int] | list[dict[str, Any]] = ""
    params: SamplingParams = SamplingParams()
    model: str = ""
    echo: bool = False
    error: str = ""
    is_object: bool = True
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    decoder_input_ids: list[int] | None = None

    def answer(
        self,
        outputs: Sequence[Output],
        prompt_tokens: int,
        token_text: TokenText = str,
        prompt_text: str = "",
    ) -> bytes:
        """The line of the output that has the answers. `token_text` gives the text of a token by
        itself, and `prompt_text` is that of the prompt, for who asks for an echo."""
        if self.form == PLAIN:
            return plain_answer(self.name, self.prompt, outputs, prompt_tokens)
        body = openai_body(
            self.form,
            self.number,
            self.model,
            outputs,
            prompt_tokens,
            token_text,
            self.params.logprobs or 0,
            prompt_text if self.echo else "",
        )
        return self._respond(200, body, None)

    def error_response(self, reason: str) -> bytes:
        """The line of the output that says why there is no answer."""
        if self.form == PLAIN:
            return dump({"id": self.name, "line": self.number, "error": reason})
        error = {"message": reason, "type": "invalid_request_error", "param": None, "code": None}
        return self._respond(
            400, {"error": error}, {"code": "invalid_request_error", "message": reason}
        )

    def _respond(self, status: int, body: dict[str, Any], error: dict[str, str] | None) -> bytes:
        request = f"line-{self.number}"
        response = {"status_code": status, "request_id": request, "body": body}
        return dump({"id": request, "custom_id": self.name, "response": response, "error": error})


def is_error(answer: bytes) -> bool:
    """Whether a line of the output says why there is no answer."""
    return json.loads(answer).get("error") is not None


def read_request(content: bytes, number: int, defaults: SamplingParams, where: str) -> BatchRequest:
    """The request of line `number` of a file, which errors call `where`; `defaults` are the
    sampling parameters of lines that say nothing else."""
    line = BatchRequest(number)
    try:
        fields = read_object(content, where)
    except UserError as error:
        return replace(line, error=str(error), is_object=False)
    try:
        if fields.keys() & {"custom_id", "body"}:
            form = fields["url"] if fields.get("url") in (COMPLETION, CHAT) else CHAT
            line = replace(line, form=form, name=fields.get("custom_id"))
            return _read_openai(line, fields, defaults, where)
        line = replace(line, name=fields.get("id"))
        check_fields(fields, PLAIN_FIELDS, where)
        line = replace(line, name=name_of(fields, "id", where))
        return replace(
            line,
            prompt=prompt_of(fields, where),
            params=read_params(fields, defaults, where),
            chat_template_kwargs=template_kwargs(fields, where),
            decoder_input_ids=decoder_ids_of(fields, where),
        )
    except UserError as error:
        name = None if isinstance(line.name, bool | float | list | dict) else line.name
        return replace(line, name=name, error=str(error))


def _read_openai(
    line: BatchRequest, fields: dict[str, Any], defaults: SamplingParams, where: str
) -> BatchRequest:
    check_fields(fields, OPENAI_FIELDS, where)
    name_of(fields, "custom_id", where)
    if fields.get("method", "POST") != "POST":
        raise UserError(f'{where}: "method" must be "POST", not {short(fields["method"])}')
    if fields.get("url") not in (COMPLETION, CHAT):
        raise UserError(
            f'{where}: "url" must be "{CHAT}" or "{COMPLETION}", not {short(fields.get("url"))}'
        )
    body = fields.get("body")
    if not isinstance(body, dict):
        raise UserError(f'{where}: "body" must be an object, not {short(body)}')
    return _read_body(line, without_nulls(body), defaults, where)


def _read_body(
    line: BatchRequest, body: dict[str, Any], defaults: SamplingParams, where: str
) -> BatchRequest:
    is_chat = line.form == CHAT
    prompt = "messages" if is_chat else "prompt"
    known = (prompt, *PARAMS_OF_BODY, *OTHERS, *TEMPLATE_FIELDS, *UNRELATED, *NEUTRAL)
    check_fields(body, known, f"{where}: its body")
    neutral = NEUTRAL | (NEUTRAL_IN_CHAT if is_chat else NEUTRAL_IN_COMPLETION)
    for name, values in neutral.items():
        if name in body and not any(_same(body[name], value) for value in values):
            raise UserError(
                f'{where}: "{name}" {short(body[name])} is not built: leave it out, or say '
                f"{json.dumps(values[0])}"
            )
    if not isinstance(body.get("model", ""), str):
        raise UserError(f'{where}: "model" must be a string, not {short(body["model"])}')
    echo = body.get("echo", False)
    if not isinstance(echo, bool):
        raise UserError(f'{where}: "echo" must be true or false, not {short(echo)}')
    line = replace(line, model=body.get("model", ""), echo=echo)
    params = openai_params(body, defaults, is_chat, where)
    if echo and params.logprobs is not None:
        raise UserError(
            f'{where}: "echo" with "logprobs" is not built: leave one out; `mpishard logits` '
            "scores the tokens of a prompt"
        )
    read = read_messages if is_chat else one_prompt
    return replace(
        line,
        prompt=read(body.get(prompt), where),
        params=params,
        chat_template_kwargs=template_kwargs(body, where) if is_chat else {},
    )


def _same(value: Any, neutral: Any) -> bool:
    """Whether two values of JSON are the same; 0 and false are not."""
    return bool(value == neutral and isinstance(value, bool) == isinstance(neutral, bool))
