"""The generate loop: requests in, tokens out.

The engine knows nothing of text; it takes and gives token ids. All ranks of a replica run the same
loop on the same requests and take the same tokens, so that they stay together without asking each
other anything.

In every step sequences feed their new tokens: a whole prompt, or a piece of it, when they enter,
the token just chosen afterwards (`mpishard.engine.schedule`). When a sequence ends, the next
request takes its place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import numpy as np

from mpishard.arithmetic.packed import Feed, Step, pack
from mpishard.communication.collectives import MAX, all_reduce
from mpishard.engine.sampling import NO_TOKEN, Draw, choose
from mpishard.engine.schedule import Answer, Limits, Request, Running, Schedule
from mpishard.errors import UserError
from mpishard.model import Decoder
from mpishard.parallel import context

# What a replica has to do next, the more urgent the higher.
NOTHING, WAIT, STEP, STOP = range(4)


class Work(Protocol):
    """Where a replica's requests come from. All its ranks are told the same at the same calls."""

    @property
    def more(self) -> bool:
        """Whether requests may still come."""

    @property
    def stopping(self) -> bool:
        """Whether to leave everything as it is."""

    def draw(self, wanted: int, busy: bool) -> list[Request]:
        """At most `wanted` requests; none where others may come later. Unless the replica is
        `busy` it may take a moment, in which nothing else would happen."""


class Listed:
    """Requests that are all there from the beginning."""

    stopping = False

    def __init__(self, requests: Iterable[Request]) -> None:
        self._left = deque(requests)

    @property
    def more(self) -> bool:
        """Whether there are any left."""
        return bool(self._left)

    def draw(self, wanted: int, busy: bool) -> list[Request]:
        """The next `wanted` of them."""
        return [self._left.popleft() for _ in range(min(wanted, len(self._left)))]


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
    if len(ids) > config.max_positions:
        raise UserError(
            f"{what} has {len(ids)} tokens, but the model has only "
            f"{config.max_positions} positions; shorten it, or allow more with --max-positions"
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
    on_finish: Callable[[Request, Answer], None] | None = None,
    timing: Timing | None = None,
    limits: Limits = Limits(),  # noqa: B008 (immutable)
) -> list[Answer]:
    """The answers of this replica's `requests`, in their order, as `serve` finds them. Raises
    UserError, on all ranks of the replica, for one that has none."""
    requests = list(requests)
    answers: dict[int, Answer] = {}

    def finish(request: Request, answer: Answer) -> None:
        if answer.refused:
            raise UserError(f"prompt {request.index + 1} has no answer: {answer.refused}")
        answers[id(request)] = answer
        if on_finish:
            on_finish(request, answer)

    serve(model, Listed(requests), finish, on_token, timing, limits)
    return [answers[id(request)] for request in requests]


def serve(
    model: Decoder,
    work: Work,
    on_finish: Callable[[Request, Answer], None],
    on_token: Callable[[Request, int], None] | None = None,
    timing: Timing | None = None,
    limits: Limits = Limits(),  # noqa: B008 (immutable)
) -> None:
    """Answer this replica's `work`, within `limits`, until there is no more of it or it is stopped;
    then the sequences that run are given up.

    `on_token` is called with every token as it is chosen, `on_finish` with every answer as it is
    completed; `timing` is added to.
    """
    timing = timing if timing is not None else Timing()
    schedule = Schedule(model, limits)
    while True:
        started = perf_counter()
        for request, answer in schedule.add(work.draw(schedule.wanted, schedule.busy)):
            on_finish(request, answer)
        turn = _turn(model, schedule, work)
        if turn in (NOTHING, STOP):
            return
        if turn == STEP:
            _step(model, schedule, on_token, timing, started)
            for request, answer in schedule.leave():
                on_finish(request, answer)


def _turn(model: Decoder, schedule: Schedule, work: Work) -> int:
    """What to do next. Replicas that share experts take their steps together, those without work
    with no tokens, and stop together."""
    mine = STOP if work.stopping else STEP if schedule.busy else WAIT if work.more else NOTHING
    if model.mesh.layout.together == 1:
        return mine
    return int(all_reduce(np.array(mine, np.int64), model.mesh.experts, MAX))


def next_tokens(model: Decoder, step: Step, draws: list[Draw]) -> list[int]:
    """One pass through the model, and the token chosen for each of the tokens that `step` wants
    answered, as `choose` chooses it, the same on every rank of the replica."""
    mesh = model.mesh
    logits_Mv = model.forward(step)
    mine = [draws[place] for place in step.answers[mesh.cp.rank]]
    chosen = np.array(choose(logits_Mv, mine, model.config.vocab, mesh), np.int64)
    return context.whole(chosen, step.answers, mesh).tolist()


def _step(
    model: Decoder,
    schedule: Schedule,
    on_token: Callable[[Request, int], None] | None,
    timing: Timing,
    started: float,
) -> None:
    """One pass through the model, and the next token of every sequence that has fed all it
    knows."""
    feeds = schedule.next()
    step = pack([feed for _, feed in feeds], model.division)
    complete = [sequence for sequence, feed in feeds if not feed.remaining]
    draws = [Draw(s.request.sampling, s.request.index, s.cache.length) for s in complete]
    for sequence, token in zip(complete, next_tokens(model, step, draws), strict=True):
        if token == NO_TOKEN:
            sequence.answer.finish_reason = "error"
            sequence.answer.refused = (
                f"its logits for position {sequence.cache.length} are infinite or not numbers: "
                "`mpishard inspect MODEL --verify` says whether weights are; where they are not, "
                "--compute-dtype float64 has the range that float32 lacks"
            )
            continue
        sequence.answer.ids.append(token)
        sequence.answer.finish_reason = _finish_reason(sequence, token)
        if on_token:
            on_token(sequence.request, token)
    _count(timing, feeds, perf_counter() - started)


def _finish_reason(sequence: Running, token: int) -> str:
    request, ids = sequence.request, sequence.answer.ids
    if token in request.eos_ids or (request.stopped and request.stopped(ids)):
        return "stop"
    full = sequence.cache.length == sequence.cache.capacity
    return "length" if len(ids) == request.max_tokens or full else ""


def _count(timing: Timing, feeds: list[tuple[Running, Feed]], seconds: float) -> None:
    """Add a step: one that took in some of a prompt, or one that only generated."""
    prompts = [
        len(feed.ids_S)
        for sequence, feed in feeds
        if sequence.cache.length <= len(sequence.request.ids)
    ]
    if prompts:
        timing.prompt_tokens += sum(prompts)
        timing.prompt_seconds += seconds
    elif feeds:
        timing.generated_tokens += len(feeds)
        timing.generation_seconds += seconds
