"""The generate loop: requests in, tokens out.

The engine knows nothing of text; it takes and gives token ids. All ranks of a replica run the same
loop on the same requests and take the same tokens, so that they stay together without asking each
other anything.

In every step each running sequence feeds its new tokens: a whole prompt, or a chunk of it, when it
enters, the token just chosen afterwards. When a sequence ends, the next request takes its place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from mpishard.arithmetic.packed import Feed, KVCache, Step, pack
from mpishard.communication.collectives import MAX, all_reduce
from mpishard.engine.sampling import Draw, Sampling, choose
from mpishard.errors import UserError
from mpishard.model import Decoder
from mpishard.parallel import context

# A step never takes in another prompt that would bring it above so many tokens.
MAX_STEP_TOKENS = 2048
MAX_SEQUENCES = 32


@dataclass(frozen=True)
class Request:
    """A prompt to be continued by at most `max_tokens` (1 or more) tokens.

    `index` is its place in the input, to which its random numbers belong. A token of `eos_ids`
    ends the answer and is its last; so does any token after which `stopped` is true of the tokens
    so far.
    """

    index: int
    ids: list[int]
    max_tokens: int
    sampling: Sampling = Sampling()
    eos_ids: frozenset[int] = frozenset()
    stopped: Callable[[list[int]], bool] | None = None


@dataclass
class Answer:
    """The tokens that continue a request; `finish_reason` is "stop" or "length"."""

    index: int
    ids: list[int] = field(default_factory=list)
    finish_reason: str = ""


@dataclass
class Timing:
    """Tokens and seconds of the steps that took prompts in, and of those that only generated."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    generation_seconds: float = 0.0


@dataclass
class _Running:
    request: Request
    answer: Answer
    cache: KVCache
    fitted: int = 0  # the length whose rotary frequencies the cache has

    def feed(self, model: Decoder, chunk: int | None) -> Feed:
        """The tokens this sequence is to feed next: of those it has not fed yet at most `chunk`,
        and all of them again where its cache no longer fits the rotary frequencies of its new
        length."""
        ids = self.request.ids + self.answer.ids
        if model.depends_on_length(len(ids)) and self.fitted != len(ids):
            self.cache.clear()
            self.fitted = len(ids)
        new = ids[self.cache.length :][:chunk]
        remaining = len(ids) - self.cache.length - len(new)
        index, prompt = self.request.index, len(self.request.ids)
        return Feed(np.array(new, np.int64), self.cache, remaining, index, prompt)


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
    prefill_chunk: int | None = None,
) -> list[Answer]:
    """The answers of this replica's `requests`, in their order.

    `on_token` is called with every token as it is chosen, `on_finish` with every answer as it is
    completed; `timing` is added to. A prompt of more than `prefill_chunk` tokens enters in several
    steps, beside the sequences that run.
    """
    timing = timing if timing is not None else Timing()
    waiting = deque(requests)
    running: list[_Running] = []
    answers: list[Answer] = []
    while _go_on(model, bool(waiting or running)):
        started = perf_counter()
        feeds = [sequence.feed(model, prefill_chunk) for sequence in running]
        tokens = sum(len(feed.ids_S) for feed in feeds)
        entering = _admit(model, waiting, len(running), tokens, prefill_chunk)
        answers += [sequence.answer for sequence in entering]
        running += entering
        feeds += [sequence.feed(model, prefill_chunk) for sequence in entering]
        _step(model, running, feeds, on_token)
        _count(timing, running, feeds, perf_counter() - started)
        for sequence in running:
            if sequence.answer.finish_reason and on_finish:
                on_finish(sequence.request, sequence.answer)
        running = [sequence for sequence in running if not sequence.answer.finish_reason]
    return answers


def _go_on(model: Decoder, busy: bool) -> bool:
    """Whether there is a step to take: replicas that share experts take theirs together, those
    without work with no tokens."""
    if model.mesh.layout.together == 1:
        return busy
    return bool(all_reduce(np.array(busy, np.int64), model.mesh.experts, MAX))


def next_tokens(model: Decoder, step: Step, draws: list[Draw]) -> list[int]:
    """One pass through the model, and the token chosen for each of the tokens that `step` wants
    answered, the same on every rank of the replica."""
    mesh = model.mesh
    logits_Mv = model.forward(step)
    mine = [draws[place] for place in step.answers[mesh.cp.rank]]
    chosen = np.array(choose(logits_Mv, mine, model.config.vocab, mesh), np.int64)
    return context.whole(chosen, step.answers, mesh).tolist()


def _admit(
    model: Decoder, waiting: deque[Request], sequences: int, tokens: int, chunk: int | None
) -> list[_Running]:
    """The requests that enter in a step that feeds `tokens` of running `sequences`, taken off
    `waiting`."""
    entering: list[_Running] = []
    while waiting and sequences + len(entering) < MAX_SEQUENCES:
        request = waiting[0]
        first = min(len(request.ids), chunk or len(request.ids))
        tokens += first
        if entering and tokens > MAX_STEP_TOKENS:
            break
        waiting.popleft()
        last = len(request.ids) + request.max_tokens - 1  # the last token is never fed
        cache = model.new_cache(min(last, model.config.max_positions), first)
        entering.append(_Running(request, Answer(request.index), cache))
    return entering


def _step(
    model: Decoder,
    running: list[_Running],
    feeds: list[Feed],
    on_token: Callable[[Request, int], None] | None,
) -> None:
    """One pass through the model, and the next token of every running sequence that has fed all
    it knows."""
    step = pack(feeds, model.division)
    complete = [s for s, feed in zip(running, feeds, strict=True) if not feed.remaining]
    draws = [Draw(s.request.sampling, s.request.index, s.cache.length) for s in complete]
    for sequence, token in zip(complete, next_tokens(model, step, draws), strict=True):
        sequence.answer.ids.append(token)
        sequence.answer.finish_reason = _finish_reason(sequence, token)
        if on_token:
            on_token(sequence.request, token)


def _finish_reason(sequence: _Running, token: int) -> str:
    request, ids = sequence.request, sequence.answer.ids
    if token in request.eos_ids or (request.stopped and request.stopped(ids)):
        return "stop"
    full = sequence.cache.length == sequence.cache.capacity
    return "length" if len(ids) == request.max_tokens or full else ""


def _count(timing: Timing, running: list[_Running], feeds: list[Feed], seconds: float) -> None:
    """Add a step: one that took in some of a prompt, or one that only generated."""
    prompts = [
        len(feed.ids_S)
        for sequence, feed in zip(running, feeds, strict=True)
        if sequence.cache.length <= len(sequence.request.ids)
    ]
    if prompts:
        timing.prompt_tokens += sum(prompts)
        timing.prompt_seconds += seconds
    elif running:
        timing.generated_tokens += len(running)
        timing.generation_seconds += seconds
