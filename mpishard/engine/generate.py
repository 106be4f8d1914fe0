"""The generate loop: requests in, tokens out.

The engine knows nothing of text; it takes and gives token ids. All ranks of a replica run the same
loop on the same requests and take the same tokens, so that they stay together without asking each
other anything.

In every step sequences feed their new tokens: a whole prompt, or a piece of it, when they enter,
the token just chosen afterwards (`mpishard.engine.scheduler`). When a sequence ends, the next
request takes its place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import numpy as np

from mpishard.communication.collectives import MAX, all_reduce
from mpishard.engine.sampling import NO_TOKEN, SamplingRow, sample
from mpishard.engine.scheduler import Scheduler, SchedulerConfig
from mpishard.engine.sequence import Request, RequestOutput, Sequence
from mpishard.errors import UserError
from mpishard.model import Decoder
from mpishard.parallel import context
from mpishard.sequences.step import ScheduledChunk, Step, pack

# What a replica has to do next, the more urgent the higher.
NOTHING, WAIT, STEP, STOP = range(4)


class RequestSource(Protocol):
    """Where a replica's requests come from. All its ranks are told the same at the same calls."""

    @property
    def has_more(self) -> bool:
        """Whether requests may still come."""

    @property
    def should_stop(self) -> bool:
        """Whether to leave everything as it is."""

    def take(self, num_wanted: int, busy: bool) -> list[Request]:
        """At most `num_wanted` requests; none where others may come later. Unless the replica is
        `busy` it may take a moment, in which nothing else would happen."""


class ListSource:
    """Requests that are all there from the beginning."""

    should_stop = False

    def __init__(self, requests: Iterable[Request]) -> None:
        self._left = deque(requests)

    @property
    def has_more(self) -> bool:
        """Whether there are any left."""
        return bool(self._left)

    def take(self, num_wanted: int, busy: bool) -> list[Request]:
        """The next `num_wanted` of them."""
        return [self._left.popleft() for _ in range(min(num_wanted, len(self._left)))]


@dataclass
class Timing:
    """Tokens and seconds of the steps that took prompts in, and of those that only generated."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    generation_seconds: float = 0.0


def check_request(model: Decoder, ids: list[int], what: str) -> None:
    """Refuse a prompt that the model cannot take (UserError); `what` names it."""
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


def generate(
    model: Decoder,
    requests: Iterable[Request],
    on_token: Callable[[Request, int], None] | None = None,
    on_finish: Callable[[Request, RequestOutput], None] | None = None,
    timing: Timing | None = None,
    limits: SchedulerConfig = SchedulerConfig(),  # noqa: B008 (immutable)
) -> list[RequestOutput]:
    """The answers of this replica's `requests`, in their order, as `serve` finds them. Raises
    UserError, on all ranks of the replica, for one that has none."""
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
    """Answer this replica's `source`, within `limits`, until there is no more of it or it is
    stopped; then the sequences that run are given up.

    `on_token` is called with every token as it is chosen, `on_finish` with every answer as it is
    completed; `timing` is added to.
    """
    timing = timing if timing is not None else Timing()
    scheduler = Scheduler(model, limits)
    while True:
        started = perf_counter()
        for request, output in scheduler.add(source.take(scheduler.num_wanted, scheduler.has_work)):
            on_finish(request, output)
        action = _next_action(model, scheduler, source)
        if action in (NOTHING, STOP):
            return
        if action == STEP:
            _step(model, scheduler, on_token, timing, started)
            for request, output in scheduler.pop_finished():
                on_finish(request, output)


def _next_action(model: Decoder, scheduler: Scheduler, source: RequestSource) -> int:
    """What to do next. Replicas that share experts take their steps together, those without work
    with no tokens, and stop together."""
    mine = (
        STOP
        if source.should_stop
        else STEP
        if scheduler.has_work
        else WAIT
        if source.has_more
        else NOTHING
    )
    if model.mesh.layout.replicas_per_ep_group == 1:
        return mine
    return int(all_reduce(np.array(mine, np.int64), model.mesh.moe, MAX))


def next_tokens(model: Decoder, step: Step, rows: list[SamplingRow]) -> list[int]:
    """One pass through the model, and the token chosen for each of the tokens that `step` wants
    answered, as `sample` chooses it, the same on every rank of the replica."""
    mesh = model.mesh
    logits_Mv = model.forward(step)
    mine = [rows[place] for place in step.logits_owner_index[mesh.cp.rank]]
    chosen = np.array(sample(logits_Mv, mine, model.config.vocab, mesh), np.int64)
    return context.gather_sequence(chosen, step.logits_owner_index, mesh).tolist()


def _step(
    model: Decoder,
    scheduler: Scheduler,
    on_token: Callable[[Request, int], None] | None,
    timing: Timing,
    started: float,
) -> None:
    """One pass through the model, and the next token of every sequence that has fed all it
    knows."""
    chunks = scheduler.schedule()
    step = pack([chunk for _, chunk in chunks], model.sequence_sharding)
    complete = [sequence for sequence, chunk in chunks if not chunk.remaining]
    rows = [SamplingRow(s.request.sampling, s.request.index, s.cache.length) for s in complete]
    for sequence, token in zip(complete, next_tokens(model, step, rows), strict=True):
        if token == NO_TOKEN:
            sequence.output.finish_reason = "error"
            sequence.output.error = (
                f"its logits for position {sequence.cache.length} are infinite or not numbers: "
                "`mpishard inspect MODEL --verify` says whether weights are; where they are not, "
                "--compute-dtype float64 has the range that float32 lacks"
            )
            continue
        sequence.output.ids.append(token)
        sequence.output.finish_reason = _finish_reason(sequence, token)
        if on_token:
            on_token(sequence.request, token)
    _count(timing, chunks, perf_counter() - started)


def _finish_reason(sequence: Sequence, token: int) -> str:
    request, ids = sequence.request, sequence.output.ids
    if token in request.eos_ids or (request.stop_fn and request.stop_fn(ids)):
        return "stop"
    full = sequence.cache.length == sequence.cache.capacity
    return "length" if len(ids) == request.max_tokens or full else ""


def _count(timing: Timing, chunks: list[tuple[Sequence, ScheduledChunk]], seconds: float) -> None:
    """Add a step: one that took in some of a prompt, or one that only generated."""
    prompts = [
        len(chunk.ids_S)
        for sequence, chunk in chunks
        if sequence.cache.length <= len(sequence.request.ids)
    ]
    if prompts:
        timing.prompt_tokens += sum(prompts)
        timing.prompt_seconds += seconds
    elif chunks:
        timing.generated_tokens += len(chunks)
        timing.generation_seconds += seconds
