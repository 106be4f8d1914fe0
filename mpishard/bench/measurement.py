"""Measuring: rounds of prefill and decode, each followed by its roofline on this machine.

Every figure is a median. Step and roofline alternate, so that other work on the machine slows both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np

from mpishard.api import Model
from mpishard.bench.machine import environment
from mpishard.bench.memory import forget_peak, memory_of
from mpishard.bench.probes import (
    TimedDecoder,
    gemm_probe,
    memory_probe,
)
from mpishard.bench.roofline import (
    StepCost,
    decode_cost,
    prefill_cost,
    read_bytes,
    shard_of,
    weight_bytes,
)
from mpishard.communication.collectives import MAX, MIN, all_reduce, barrier
from mpishard.communication.group import Group
from mpishard.communication.ledger import Entry
from mpishard.engine.generate import next_tokens
from mpishard.engine.sampling import SamplingRow
from mpishard.engine.sampling_params import SamplingParams
from mpishard.errors import UserError
from mpishard.model import Decoder
from mpishard.sequences.kv_cache import KVCache
from mpishard.sequences.step import ScheduledChunk, pack

# The roofline is measured at least so often in a run, a prompt's after its one step.
PROBES_PER_RUN = 4
# Tokens that the prompts to warm up have together at most.
WARM_UP_TOKENS = 512


@dataclass(frozen=True)
class Run:
    """Some steps on end that feed each of `batch` sequences its prompt or, after it, one token
    each: the seconds of the median step on the slowest rank, those that the roofline's probe took
    this rank in between, and what this rank did in a step: the seconds it spent outside of
    collectives, those of them in attention, and what it entered in its ledger."""

    phase: str  # "prefill" or "decode"
    prompt_tokens: int  # of each sequence
    batch: int  # sequences of each replica
    steps: int
    seconds: float
    roofline_seconds: float
    arithmetic_seconds: float
    entries: list[tuple[str, str, Entry]]
    attention_seconds: float = 0.0  # of a prompt alone, as those below
    moe_seconds: float = 0.0  # of them in MoE layers
    expert_rows: int = 0  # that experts of this rank computed, and the flops of that
    expert_flops: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of a replica in one step."""
        return self.batch * (self.prompt_tokens if self.phase == "prefill" else 1)


def measure(
    model: Model, prompt_tokens: Sequence[int], max_tokens: int, batches: list[int], repeat: int
) -> dict[str, Any]:
    """The figures of `table`, for each length of prompts in `prompt_tokens` and each number of
    sequences per replica in `batches`: the median of `repeat` rounds, after one to warm up whose
    prompts are short.

    Collective, and complete on rank 0 of the mesh: what is said of one rank is said of the slowest
    or fullest, except the collectives, which are rank 0's. Clears the mesh's ledger. Raises
    UserError for numbers below 1 and for more tokens than the model has positions.
    """
    _check(model, prompt_tokens, max_tokens, batches, repeat)
    lengths = sorted(prompt_tokens)
    forget_peak()
    for batch in batches:
        short = min(lengths[0], max(1, WARM_UP_TOKENS // batch))
        _run(model, batch, short, max_tokens, nothing, nothing)
    warmed_up = model.peak_memory()
    multiply, flops = gemm_probe(model.decoder.layers[0])
    walk, walked = memory_probe(model)
    speeds, memory, bandwidths, rates = [], [], [], []
    for length in lengths:
        for batch in batches:
            forget_peak()
            rounds = [_run(model, batch, length, max_tokens, multiply, walk) for _ in range(repeat)]
            prompts, generations = zip(*rounds, strict=True)
            prompt, generation = _median(prompts), _median(generations)
            rates.append(flops / prompt.roofline_seconds)
            bandwidths.append(walked / generation.roofline_seconds)
            peaks = bandwidths[-1], rates[-1]
            work = prefill_cost(model.decoder, batch, length)
            row = _row(model, prompt, work, *peaks) | _load_balance(model, prompt)
            speeds.append(row | _moe_layers(model, prompt, rates[-1]))
            work = decode_cost(model.decoder, batch, length, length + max_tokens)
            speeds.append(_row(model, generation, work, *peaks))
            # The matrices of the probes were there all the time, and are none of the model's.
            peak = max(warmed_up, model.peak_memory() - walked)
            arrays = memory_of(model, batch, length, max_tokens)
            memory.append({"prompt_tokens": length, "batch": batch, **arrays, "peak_bytes": peak})

    world, shard = model.mesh.world, (*shard_of(model.decoder), model.decoder.dtype.itemsize)
    weights, read = all_reduce(np.array([weight_bytes(*shard), read_bytes(*shard)]), world, MAX)
    slowest = all_reduce(np.array([np.median(bandwidths), np.median(rates)]), world, MIN)
    return environment(model) | {
        "prompt_tokens": lengths,
        "max_tokens": max_tokens,
        "repeat": repeat,
        "bandwidth_bytes_per_second": float(slowest[0]),
        "product_flops_per_second": float(slowest[1]),
        "weight_bytes": int(weights),
        "read_bytes": int(read),
        "memory": memory,
        "speeds": speeds,
    }


def _check(
    model: Model, prompt_tokens: Sequence[int], max_tokens: int, batches: list[int], repeat: int
) -> None:
    numbers = [("--prompt-tokens", length) for length in prompt_tokens]
    numbers += [("--max-tokens", max_tokens)]
    numbers += [("--batch", batch) for batch in batches] + [("--repeat", repeat)]
    for flag, value in numbers:
        if value < 1:
            raise UserError(f"{flag} {value} must be at least 1")
    if not prompt_tokens:
        raise UserError("--prompt-tokens must name at least one length")
    if not batches:
        raise UserError("--batch must name at least one number of sequences")
    longest = max(prompt_tokens)
    needed, positions = longest + max_tokens, model.config.max_position_embeddings
    both = f"--prompt-tokens {longest} and --max-tokens {max_tokens} need {needed} positions"
    if needed > positions:
        raise UserError(
            f"{both}, but {model.path} has only {positions}; --max-model-len {needed} allows them"
        )
    if model.decoder.rope_lengths(needed) != model.decoder.rope_lengths(longest):
        trained = model.config.rope.original_positions
        raise UserError(
            f"{both}, but beyond {trained} the {model.config.rope.kind} rope of {model.path} takes "
            f"the whole sequence in again, which is not measured; use at most {trained}"
        )


def _run(
    model: Model,
    batch: int,
    prompt_tokens: int,
    max_tokens: int,
    multiply: Callable[[], None],
    walk: Callable[[], None],
) -> tuple[Run, Run]:
    """One prompt step of `batch` sequences and the `max_tokens` generation steps after it, each
    followed by the probe of its roofline: `multiply` and `walk`."""
    decoder, mesh = model.decoder, model.mesh
    caches = [
        decoder.allocate_cache(prompt_tokens + max_tokens, prompt_tokens) for _ in range(batch)
    ]

    def timed(
        phase: str, decoder: Decoder, ids_BS: np.ndarray, steps: int, probe: Callable[[], None]
    ) -> tuple[Run, np.ndarray]:
        mesh.ledger.clear()
        seconds, roofline_seconds = [], []
        for _ in range(steps):
            started = start_together(mesh.world)
            ids_BS = _feed(decoder, caches, ids_BS)
            seconds.append(perf_counter() - started)
            for _ in range(math.ceil(PROBES_PER_RUN / steps)):
                started = start_together(mesh.world)
                probe()
                roofline_seconds.append(perf_counter() - started)
        arithmetic_seconds = (sum(seconds) - mesh.ledger.seconds) / steps
        entries = [(what, group, _per_step(e, steps)) for what, group, e in mesh.ledger]
        slowest = float(all_reduce(np.array(np.median(seconds)), mesh.world, MAX))
        return Run(
            phase=phase,
            prompt_tokens=prompt_tokens,
            batch=batch,
            steps=steps,
            seconds=slowest,
            roofline_seconds=float(np.median(roofline_seconds)),
            arithmetic_seconds=arithmetic_seconds,
            entries=entries,
        ), ids_BS

    random = np.random.default_rng(mesh.dp.rank)  # the same on all ranks of a replica
    prompts_BS = random.integers(model.config.vocab, size=(batch, prompt_tokens))
    watched = TimedDecoder(decoder)
    prompt, first_B1 = timed("prefill", watched, prompts_BS, 1, multiply)
    generation, _ = timed("decode", decoder, first_B1, max_tokens, walk)
    of_watched = ("attention_seconds", "moe_seconds", "expert_rows", "expert_flops")
    return replace(prompt, **{name: getattr(watched, name) for name in of_watched}), generation


def _feed(decoder: Decoder, caches: list[KVCache], ids_BS: np.ndarray) -> np.ndarray:
    """The token chosen after feeding each sequence its next tokens, ready to be fed: (B, 1)."""
    feeds = [
        ScheduledChunk(ids_S, cache, request=place, prompt=cache.length or None)
        for place, (ids_S, cache) in enumerate(zip(ids_BS, caches, strict=True))
    ]
    step = pack(feeds, decoder.sequence_sharding)
    rows = [
        SamplingRow(SamplingParams(), place, cache.length) for place, cache in enumerate(caches)
    ]
    return np.array([token.id for token in next_tokens(decoder, step, rows)])[:, np.newaxis]


def start_together(world: Group) -> float:
    """The time at which all ranks have come here."""
    barrier(world)
    return perf_counter()


def _median(runs: Sequence[Run]) -> Run:
    """The run of median seconds, with the median of what the probe took in all of them."""
    middle = sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]
    roofline_seconds = float(np.median([run.roofline_seconds for run in runs]))
    return replace(middle, roofline_seconds=roofline_seconds)


def nothing() -> None:
    """Work of no length, while warming up."""


def _per_step(entry: Entry, steps: int) -> Entry:
    return Entry(
        entry.calls // steps,
        entry.payload_bytes // steps,
        entry.wire_bytes / steps,
        entry.seconds / steps,
    )


def _row(model: Model, run: Run, work: StepCost, bandwidth: float, rate: float) -> dict[str, Any]:
    """One line of the report; `work`, `bandwidth` and `rate` are this rank's own."""
    world = model.mesh.world
    figures = [work.product_flops, work.attention_flops, work.cache_bytes]
    flops, attention_flops, read = (int(n) for n in all_reduce(np.array(figures), world, MAX))
    rooflines = [work.seconds(bandwidth, rate), work.seconds_with_attention(bandwidth, rate)]
    least, with_attention = (float(s) for s in all_reduce(np.array(rooflines), world, MAX))
    tokens = model.mesh.dp.size * run.tokens
    communication = sum(entry.seconds for _, _, entry in run.entries)
    return {
        "phase": run.phase,
        "prompt_tokens": run.prompt_tokens,
        "batch": run.batch,
        "seconds_per_step": run.seconds,
        "tokens_per_second": tokens / run.seconds,
        "roofline_tokens_per_second": tokens / least,
        "fraction_of_roofline": least / run.seconds,
        "roofline_with_attention_tokens_per_second": tokens / with_attention,
        "fraction_of_roofline_with_attention": with_attention / run.seconds,
        "bandwidth_bytes_per_second": bandwidth,
        "product_flops_per_second": rate,
        "product_flops": flops,
        "attention_flops": attention_flops,
        "kv_cache_bytes_read": read,
        "share_in_communication": communication / (communication + run.arithmetic_seconds),
        "collectives": [
            {"operation": operation, "group": group, **vars(entry)}
            for operation, group, entry in run.entries
        ],
    }


def _load_balance(model: Model, prompt: Run) -> dict[str, float]:
    """How evenly a prompt's step was divided over all ranks, what attention's arithmetic took, and
    how much of the exchange of keys and values was not hidden behind it."""
    exchanged = [entry.seconds for what, _, entry in prompt.entries if what == "isendrecv"]
    seconds = [prompt.arithmetic_seconds, prompt.attention_seconds, sum(exchanged)]
    least = all_reduce(np.array(seconds), model.mesh.world, MIN)
    most = all_reduce(np.array(seconds), model.mesh.world, MAX)
    return {
        "least_arithmetic_seconds": float(least[0]),
        "most_arithmetic_seconds": float(most[0]),
        "attention_seconds": float(most[1]),
        "isendrecv_seconds": float(most[2]),
    }


def _moe_layers(model: Model, prompt: Run, rate: float) -> dict[str, Any]:
    """What the MoE layers of a prompt's step come to, nothing for a model without: the seconds of
    the rank where they took most, routing and communication left out, and what the products of the
    rows that a rank computed take at least at `rate`; the rows of the ranks with the fewest and the
    most; and how many the rank with the most sent to others, there and back, beside how many it
    would send if experts were chosen evenly."""
    config, layout, world = model.config, model.mesh.layout, model.mesh.world
    if config.moe is None:
        return {}
    row_bytes = config.hidden * model.decoder.dtype.itemsize
    wires = [e.wire_bytes for what, _, e in prompt.entries if what == "all_to_all"]
    sent = sum(wires) / row_bytes if layout.moe_token_dispatcher == "all-to-all" else 0.0
    own = [prompt.moe_seconds, prompt.expert_flops / rate, prompt.expert_rows, sent]
    most = all_reduce(np.array(own), world, MAX)
    fewest = all_reduce(np.array(prompt.expert_rows), world, MIN)
    rows = prompt.tokens / layout.replica_size * config.moe.top_k * sum(config.moe.layers)
    return {
        "moe_seconds": float(most[0]),
        "moe_roofline_seconds": float(most[1]),
        "fewest_expert_rows": int(fewest),
        "most_expert_rows": int(most[2]),
        "expert_rows_sent": int(most[3]),
        "expert_rows_sent_if_even": 2 * rows * (layout.ep - 1) / layout.ep,
    }
