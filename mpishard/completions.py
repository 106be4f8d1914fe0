"""The completions of prompts: their requests over the replicas, and the text of their tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from mpishard.engine.generate import Timing, generate
from mpishard.engine.sampling_params import SamplingParams
from mpishard.engine.scheduler import SchedulerConfig
from mpishard.engine.sequence import Request, RequestOutput
from mpishard.model import Decoder
from mpishard.parallel.data import assign_requests, gather_results
from mpishard.sequences.inputs import TokenInput
from mpishard.tokenizer import IncrementalDetokenizer, Tokenizer, finish_output


@dataclass(frozen=True)
class Completion:
    """What a prompt was continued with.

    `text` ends before a stop string and is None if the model has no tokenizer; `output_ids`
    include the token that ended the answer. `finish_reason` is "stop" (an end-of-sequence token or
    a stop string) or "length" (of `max_tokens`, or of the model's positions). `index` is the number
    of this answer among the `n` of its prompt. `logprobs`, if asked for, has for each of the
    `output_ids` the log-probabilities of the likeliest tokens and of the one chosen, by their ids.
    """

    prompt: str | list[int]
    text: str | None
    output_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    index: int = 0
    logprobs: list[dict[int, float]] | None = None


def complete(
    model: Decoder,
    text: Tokenizer | None,
    prompts: Sequence[tuple[str | list[int], TokenInput]],
    params: SamplingParams,
    on_text: Callable[[int, str], None] | None,
    on_finish: Callable[[int], None] | None,
    timing: Timing | None,
    limits: SchedulerConfig,
) -> list[Completion]:
    """The completions of `prompts`, each with its tokens, in their order, on every rank; of each
    prompt the `params.n` completions one after the other. Without a tokenizer there is no `text`.
    The callbacks and `timing` are those of `mpishard.api.Model.generate`."""
    n, mesh = params.n, model.mesh
    encoded = [tokens for _, tokens in prompts]
    mine = assign_requests(len(encoded), mesh)
    texts = {
        (place, choice): IncrementalDetokenizer(
            text, encoded[place].ids, params, _writer(on_text, n * place + choice)
        )
        for place, choice in product(mine, range(n))
        if text
    }
    requests = [
        Request(
            index=place,
            ids=encoded[place].ids,
            encoder_ids=encoded[place].encoder_ids,
            params=params,
            eos_ids=params.end_ids(model.config.eos_ids),
            stop_fn=texts[place, choice].update if params.stop or on_text else None,
            choice=choice,
        )
        for place, choice in product(mine, range(n))
    ]
    outcomes = {}

    def finish(request: Request, answer: RequestOutput) -> None:
        place, choice = request.index, request.choice
        result = finish_output(answer.ids, answer.finish_reason, texts.get((place, choice)))
        outcomes[place, choice] = {**result, "logprobs": answer.logprobs}
        if on_finish:
            on_finish(n * place + choice)

    generate(model, requests, None, finish, timing, limits)
    results = [
        json.dumps([outcomes[place, choice] for choice in range(n)]).encode() for place in mine
    ]
    merged = map(json.loads, gather_results(results, len(encoded), mesh))
    return [
        _completion(prompt, tokens.prompt, index, result, params)
        for (prompt, tokens), answers in zip(prompts, merged, strict=True)
        for index, result in enumerate(answers)
    ]


def _completion(
    prompt: str | list[int],
    ids: list[int],
    index: int,
    result: dict[str, Any],
    params: SamplingParams,
) -> Completion:
    """The completion of a prompt from what has come through JSON, whose keys are strings."""
    logprobs = [
        {int(token): value for token, value in by_id.items()} for by_id in result.pop("logprobs")
    ]
    return Completion(
        prompt=prompt,
        prompt_tokens=len(ids),
        completion_tokens=len(result["output_ids"]),
        index=index,
        logprobs=None if params.logprobs is None else logprobs,
        **result,
    )


def _writer(on_text: Callable[[int, str], None] | None, place: int) -> Callable[[str], None]:
    return lambda piece: on_text(place, piece) if on_text else None
