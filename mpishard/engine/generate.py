"""The generate loop: requests in, tokens out.

The engine knows nothing of text; it takes and returns token ids. All ranks of a replica run the
same loop on the same requests and choose the same tokens. So they stay in lockstep without a
message about what comes next.

Each pass of the loop takes new requests, schedules chunks (`mpishard.engine.scheduler`), runs the
model on them, chooses a token for every sequence whose tokens have all been processed
(`mpishard.engine.sampling`), and hands out the finished outputs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from time import perf_counter
from typing import Protocol

import numpy as np

from mpishard.communication.collectives import MAX, all_reduce
from mpishard.engine.logprobs import step_logprobs
from mpishard.engine.sampling import NO_TOKEN, SamplingRow, sample
from mpishard.engine.sampling_params import SamplingParams
from mpishard.engine.scheduler import Scheduler, SchedulerConfig
from mpishard.engine.sequence import Request, RequestOutput, Sequence
from mpishard.errors import UserError
from mpishard.model import Decoder
from mpishard.parallel import context
from mpishard.sequences.step import ScheduledChunk, Step, pack


class RequestSource(Protocol):
    """Where a replica's requests come from. All ranks of the replica make the same calls and get
    the same answers."""

    @property
    def has_more(self) -> bool:
        """Whether more requests may come."""

    @property
    def should_stop(self) -> bool:
        """Whether to give up all requests that have not finished."""

    def take(self, num_wanted: int, busy: bool) -> list[Request]:
        """At most `num_wanted` requests, possibly none although more may come. If the replica is
        not `busy`, the call may wait a moment for one."""


class ListSource:
    """Requests that are all known from the start."""

    should_stop = False

    def __init__(self, requests: Iterable[Request]) -> None:
        self._requests = deque(requests)

    @property
    def has_more(self) -> bool:
        """Whether any request has not been taken."""
        return bool(self._requests)

    def take(self, num_wanted: int, busy: bool) -> list[Request]:
        """The next `num_wanted` requests, or as many as there are."""
        return [self._requests.popleft() for _ in range(min(num_wanted, len(self._requests)))]


class Action(IntEnum):
    """What a replica does next. Of several replicas' actions, the greatest is the most urgent."""

    NOTHING = 0  # all requests are finished and no more will come
    WAIT = 1  # there is nothing to process, but requests may come
    STEP = 2  # run the model
    STOP = 3  # give up the requests that have not finished


@dataclass
class Timing:
    """Tokens and seconds of prefill and of decode. A step that processes any prompt tokens is a
    prefill step; the tokens that it decodes beside them are not counted."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0


def check_request(model: Decoder, ids: list[int], what: str) -> None:
    """Raise UserError if the model cannot process the prompt `ids`. `what` names the prompt in the
    message."""
    config = model.config
    if not ids:
        raise UserError(f"{what} is empty: it has no token, and at least one is needed")
    if len(ids) > config.max_position_embeddings:
        raise UserError(
            f"{what} has {len(ids)} tokens, but the model has only "
            f"{config.max_position_embeddings} positions; shorten it, "
            "or allow more with --max-model-len"
        )
    for token in ids:
        if not 0 <= token < config.vocab:
            raise UserError(
                f"{what} has token id {token}, but the model's ids are 0 to {config.vocab - 1}"
            )


def check_token_ids(model: Decoder, params: SamplingParams) -> None:
    """Raise UserError if `params` bias, or stop at, tokens that the model does not have."""
    named = [("logit_bias", token) for token, _ in params.bias_pairs]
    named += [("stop_token_ids", token) for token in params.stop_token_ids]
    for name, token in named:
        if not 0 <= token < model.config.vocab:
            raise UserError(
                f"{name} has token id {token}, but the model's ids are 0 to "
                f"{model.config.vocab - 1}"
            )


def generate(
    model: Decoder,
    requests: Iterable[Request],
    on_token: Callable[[Request, int], None] | None = None,
    on_finish: Callable[[Request, RequestOutput], None] | None = None,
    timing: Timing | None = None,
    limits: SchedulerConfig = SchedulerConfig(),  # noqa: B008 (immutable)
) -> list[RequestOutput]:
    """The outputs of this replica's `requests`, in their order; the callbacks, `timing` and
    `limits` are those of `serve`. Raises UserError, on all ranks of the replica, if a request is
    rejected or fails."""
    requests = list(requests)
    outputs: dict[int, RequestOutput] = {}

    def finish(request: Request, output: RequestOutput) -> None:
        if output.error:
            raise UserError(f"prompt {request.index + 1} has no answer: {output.error}")
        outputs[id(request)] = output
        if on_finish:
            on_finish(request, output)

    serve(model, ListSource(requests), finish, on_token, timing, limits)
    return [outputs[id(request)] for request in requests]


def serve(
    model: Decoder,
    source: RequestSource,
    on_finish: Callable[[Request, RequestOutput], None],
    on_token: Callable[[Request, int], None] | None = None,
    timing: Timing | None = None,
    limits: SchedulerConfig = SchedulerConfig(),  # noqa: B008 (immutable)
) -> None:
    """Process the requests of this replica's `source`, within `limits`, until there are no more or
    the source says to stop.

    `on_token` is called with every token when it is chosen, `on_finish` with every output when it
    is finished, failed or rejected. Tokens and seconds are added to `timing`.
    """
    timing = timing if timing is not None else Timing()
    scheduler = Scheduler(model, limits)
    while True:
        started = perf_counter()
        for request, output in scheduler.add(source.take(scheduler.num_wanted, scheduler.has_work)):
            on_finish(request, output)
        action = _next_action(model, scheduler, source)
        if action in (Action.NOTHING, Action.STOP):
            return
        if action == Action.STEP:
            chunks = scheduler.schedule()
            _run_step(model, chunks, on_token)
            _add_step(timing, chunks, perf_counter() - started)
            for request, output in scheduler.pop_finished():
                on_finish(request, output)


def _next_action(model: Decoder, scheduler: Scheduler, source: RequestSource) -> Action:
    """What this replica does next. Replicas that share experts all do the same: if one has to step,
    the others step along with no tokens; they stop and finish together."""
    if source.should_stop:
        action = Action.STOP
    elif scheduler.has_work:
        action = Action.STEP
    elif source.has_more:
        action = Action.WAIT
    else:
        action = Action.NOTHING
    if model.mesh.layout.replicas_per_ep_group == 1:
        return action
    return Action(int(all_reduce(np.array(action, np.int64), model.mesh.moe, MAX)))


@dataclass(frozen=True)
class SampledToken:
    """A chosen token, and log-probabilities by token id if asked for."""

    id: int
    logprobs: dict[int, float] | None = None


def next_tokens(model: Decoder, step: Step, rows: list[SamplingRow]) -> list[SampledToken]:
    """Run the model on `step` and choose a token for each of the `rows`, one for each position
    whose logits the step asks for. All ranks of the replica get the same tokens."""
    mesh, owner_index = model.mesh, step.logits_owner_index
    logits_Mv = model.forward(step)
    own_rows = [rows[index] for index in owner_index[mesh.cp.rank]]
    tokens_M = np.array(sample(logits_Mv, own_rows, model.config.vocab, mesh), np.int64)
    logprobs = step_logprobs(logits_Mv, tokens_M, rows, owner_index, model.config.vocab, mesh)
    tokens = context.gather_sequence(tokens_M, owner_index, mesh).tolist()
    return [SampledToken(token, logprobs.get(place)) for place, token in enumerate(tokens)]


def _run_step(
    model: Decoder,
    chunks: list[tuple[Sequence, ScheduledChunk]],
    on_token: Callable[[Request, int], None] | None,
) -> None:
    """Run the model on the scheduled `chunks`. Every sequence that has no uncomputed tokens left
    gets its next token."""
    step = pack([chunk for _, chunk in chunks], model.sequence_sharding)
    complete = [sequence for sequence, chunk in chunks if not chunk.remaining]
    rows = [sequence.sampling_row for sequence in complete]
    for sequence, sampled in zip(complete, next_tokens(model, step, rows), strict=True):
        output, token = sequence.output, sampled.id
        if token == NO_TOKEN:
            output.finish_reason = "error"
            output.error = (
                f"its logits for position {sequence.cache.length} are infinite or not numbers: "
                "`mpishard inspect MODEL --verify` says whether weights are; where they are not, "
                "--compute-dtype float64 has the range that float32 lacks"
            )
            continue
        output.ids.append(token)
        if sampled.logprobs is not None:
            output.logprobs.append(sampled.logprobs)
        output.finish_reason = _finish_reason(sequence, token)
        if on_token:
            on_token(sequence.request, token)


def _finish_reason(sequence: Sequence, token: int) -> str:
    """Why generation ends with `token`, the sequence's last; empty if it goes on."""
    request, ids = sequence.request, sequence.output.ids
    if token in request.eos_ids or (request.stop_fn and request.stop_fn(ids)):
        return "stop"
    cache_is_full = sequence.cache.length == sequence.cache.capacity
    return "length" if len(ids) == request.params.max_tokens or cache_is_full else ""


def _add_step(
    timing: Timing, chunks: list[tuple[Sequence, ScheduledChunk]], seconds: float
) -> None:
    """Add a step that processed `chunks` to `timing`, as prefill if any of them is of a prompt."""
    prefill_sizes = [
        len(chunk.ids_S) + (0 if chunk.encoder_ids_T is None else len(chunk.encoder_ids_T))
        for sequence, chunk in chunks
        if sequence.cache.length <= len(sequence.request.ids)
    ]
    if prefill_sizes:
        timing.prefill_tokens += sum(prefill_sizes)
        timing.prefill_seconds += seconds
    elif chunks:
        timing.decode_tokens += len(chunks)
        timing.decode_seconds += seconds
