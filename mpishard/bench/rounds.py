"""The measuring: rounds of prompts and generation, each followed by its limit.

Memory is what NumPy allocated during a prompt's step (activations), of that the residual stream,
and the KV cache; beside them the peak of the process's resident memory, without that of loading.

Every figure is a median. Step and limit alternate, so that other work on the machine slows both.
"""

from __future__ import annotations

import math
import os
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from mpi4py import MPI

from mpishard.api import Model
from mpishard.arithmetic.gemm import KERNELS
from mpishard.arithmetic.linear import Linear
from mpishard.bench.counts import (
    StepCost,
    decode_cost,
    prefill_cost,
    read_bytes,
    shard_of,
    weight_bytes,
)
from mpishard.communication.collectives import MAX, MIN, all_reduce, barrier
from mpishard.communication.group import CollectiveCall, Group
from mpishard.communication.ledger import Entry, Ledger
from mpishard.communication.mesh import Mesh
from mpishard.engine.generate import next_tokens
from mpishard.engine.sampling import SamplingRow
from mpishard.engine.sampling_params import SamplingParams
from mpishard.errors import UserError
from mpishard.layers import Layer
from mpishard.model import Decoder
from mpishard.parallel.attention import AttendCache
from mpishard.parallel.expert import Dispatch, MoELayer, Routing
from mpishard.parallel.tensor import FeedForward
from mpishard.sequences.kv_cache import KVCache
from mpishard.sequences.step import ScheduledChunk, pack

# Bytes of matrices that the ranks of a node walk together, beyond the caches that they share, and
# that each walks at least, beyond its own.
NODE_WORKING_SET = 512 * 2**20
RANK_WORKING_SET = 64 * 2**20
# Rows of `x` in the product whose rate is measured, however long the prompt: with more the rate
# hardly rises, and the limit of a prompt of minutes is still taken in a second.
PRODUCT_ROWS = 512
# A limit is taken at least so often in a run, a prompt's after its one step.
LIMITS_PER_RUN = 4
# Tokens that the prompts to warm up have together at most.
WARM_UP_TOKENS = 512


@dataclass(frozen=True)
class Run:
    """Some steps on end that feed each of `batch` sequences its prompt or, after it, one token
    each: the seconds of the median step on the slowest rank, those that the machine's limit took
    this rank in between, and what this rank did in a step: the seconds it spent outside of
    collectives, those of them in attention, and what it entered in its ledger."""

    phase: str  # "prefill" or "decode"
    prompt_tokens: int  # of each sequence
    batch: int  # sequences of each replica
    steps: int
    seconds: float
    limit_seconds: float
    arithmetic_seconds: float
    entries: list[tuple[str, str, Entry]]
    attention_seconds: float = 0.0  # of a prompt alone, as those below
    mixture_seconds: float = 0.0  # of them in mixtures of experts
    expert_rows: int = 0  # that experts of this rank computed, and the flops of that
    expert_flops: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of a replica in one step."""
        return self.batch * (self.prompt_tokens if self.phase == "prefill" else 1)


@dataclass(frozen=True)
class CountedLinear(Linear):
    """The last product of an expert, which says how many rows it computes."""

    count: Callable[[int], None] = lambda rows: None

    def partial(self, x_NI: Any) -> np.ndarray:
        y_NO = super().partial(x_NI)
        self.count(len(y_NO))
        return y_NO


class TimedDecoder(Decoder):
    """A model that adds up the seconds which attention and mixtures of experts take it, both
    without communication, and what its experts compute."""

    def __init__(self, model: Decoder) -> None:
        self.__dict__.update(model.__dict__)
        self.layers = [self._watched(layer) for layer in model.layers]
        self.attend = self._timed_attend(model.attend)
        self.attention_seconds = self.mixture_seconds = 0.0
        self.expert_rows = self.expert_flops = 0

    def _watched(self, layer: Layer) -> Layer:
        ffn = layer.ffn
        if isinstance(ffn, MoELayer):
            experts = {number: self._counted(w) for number, w in ffn.experts.items()}
            dispatch = self._timed_dispatch(ffn.dispatch)
            ffn = replace(ffn, experts=experts, dispatch=dispatch)
        return replace(layer, ffn=ffn)

    def _timed_attend(self, attend: AttendCache) -> Any:
        def timed(*operands: Any) -> Any:
            started = _arithmetic_clock(self.mesh.ledger)
            output = attend(*operands)
            self.attention_seconds += _arithmetic_clock(self.mesh.ledger) - started
            return output

        return timed

    def _timed_dispatch(self, dispatch: Dispatch) -> Dispatch:
        def timed(x_nD: np.ndarray, routes: Routing, w: MoELayer, mesh: Mesh) -> np.ndarray:
            started = _arithmetic_clock(mesh.ledger)
            y_nD = dispatch(x_nD, routes, w, mesh)
            self.mixture_seconds += _arithmetic_clock(mesh.ledger) - started
            return y_nD

        return timed

    def _counted(self, w: FeedForward) -> FeedForward:
        def count(rows: int) -> None:
            self.expert_rows += rows
            sizes = [linear.weight.size for linear in (w.gate, w.up, w.down)]
            self.expert_flops += 2 * rows * sum(sizes)

        return replace(w, down=CountedLinear(**vars(w.down), count=count))


class LayerSample(Decoder):
    """The first layer of each kind of a model, of which it has as many as it has windows."""

    def __init__(self, model: Decoder) -> None:
        model = model.map_moe_layers(lambda _, mixture: replace(mixture, hooks=()))
        self.__dict__.update(model.__dict__)
        windows = model.config.windows
        self.layer_numbers = range(len(set(windows)))
        self.layers = [model.layers[windows.index(window)] for window in dict.fromkeys(windows)]


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
    _forget_peak()
    for batch in batches:
        short = min(lengths[0], max(1, WARM_UP_TOKENS // batch))
        _run(model, batch, short, max_tokens, _nothing, _nothing)
    warmed_up = model.peak_memory()
    multiply, flops = _products(model.decoder.layers[0])
    walk, walked = matrix_vector_products(model)
    speeds, memory, bandwidths, rates = [], [], [], []
    for length in lengths:
        for batch in batches:
            _forget_peak()
            rounds = [_run(model, batch, length, max_tokens, multiply, walk) for _ in range(repeat)]
            prompts, generations = zip(*rounds, strict=True)
            prompt, generation = _median(prompts), _median(generations)
            rates.append(flops / prompt.limit_seconds)
            bandwidths.append(walked / generation.limit_seconds)
            limits = bandwidths[-1], rates[-1]
            work = prefill_cost(model.decoder, batch, length)
            row = _row(model, prompt, work, *limits) | _balance(model, prompt)
            speeds.append(row | _mixtures(model, prompt, rates[-1]))
            work = decode_cost(model.decoder, batch, length, length + max_tokens)
            speeds.append(_row(model, generation, work, *limits))
            # The matrices of the limits were there all the time, and are none of the model's.
            peak = max(warmed_up, model.peak_memory() - walked)
            arrays = _memory(model, batch, length, max_tokens)
            memory.append({"prompt_tokens": length, "batch": batch, **arrays, "peak_bytes": peak})

    world, shard = model.mesh.world, (*shard_of(model.decoder), model.decoder.dtype.itemsize)
    weights, read = all_reduce(np.array([weight_bytes(*shard), read_bytes(*shard)]), world, MAX)
    slowest = all_reduce(np.array([np.median(bandwidths), np.median(rates)]), world, MIN)
    return _environment(model) | {
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
    if model.decoder.uses_dynamic_rope(needed):
        trained = model.config.rope.original_positions
        raise UserError(
            f"{both}, but beyond {trained} the dynamic rope of {model.path} takes the whole "
            f"sequence again for every token, which is not measured; use at most {trained}"
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
    followed by the work that measures its limit: `multiply` and `walk`."""
    decoder, mesh = model.decoder, model.mesh
    caches = [
        decoder.allocate_cache(prompt_tokens + max_tokens, prompt_tokens) for _ in range(batch)
    ]

    def timed(
        phase: str, decoder: Decoder, ids_BS: np.ndarray, steps: int, limit: Callable[[], None]
    ) -> tuple[Run, np.ndarray]:
        mesh.ledger.clear()
        seconds, limit_seconds = [], []
        for _ in range(steps):
            started = _start_together(mesh.world)
            ids_BS = _feed(decoder, caches, ids_BS)
            seconds.append(perf_counter() - started)
            for _ in range(math.ceil(LIMITS_PER_RUN / steps)):
                started = _start_together(mesh.world)
                limit()
                limit_seconds.append(perf_counter() - started)
        arithmetic_seconds = (sum(seconds) - mesh.ledger.seconds) / steps
        entries = [(what, group, _per_step(e, steps)) for what, group, e in mesh.ledger]
        slowest = float(all_reduce(np.array(np.median(seconds)), mesh.world, MAX))
        return Run(
            phase=phase,
            prompt_tokens=prompt_tokens,
            batch=batch,
            steps=steps,
            seconds=slowest,
            limit_seconds=float(np.median(limit_seconds)),
            arithmetic_seconds=arithmetic_seconds,
            entries=entries,
        ), ids_BS

    random = np.random.default_rng(mesh.dp.rank)  # the same on all ranks of a replica
    prompts_BS = random.integers(model.config.vocab, size=(batch, prompt_tokens))
    watched = TimedDecoder(decoder)
    prompt, first_B1 = timed("prefill", watched, prompts_BS, 1, multiply)
    generation, _ = timed("decode", decoder, first_B1, max_tokens, walk)
    of_watched = ("attention_seconds", "mixture_seconds", "expert_rows", "expert_flops")
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
    return np.array(next_tokens(decoder, step, rows))[:, np.newaxis]


def _start_together(world: Group) -> float:
    """The time at which all ranks have come here."""
    barrier(world)
    return perf_counter()


def _arithmetic_clock(ledger: Ledger) -> float:
    """The time on a clock that stands still during collectives."""
    return perf_counter() - ledger.seconds


def _median(runs: Sequence[Run]) -> Run:
    """The run of median seconds, with the median of what the limit took in all of them."""
    middle = sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]
    limit_seconds = float(np.median([run.limit_seconds for run in runs]))
    return replace(middle, limit_seconds=limit_seconds)


def _nothing() -> None:
    """Work of no length, while warming up."""


def _forget_peak() -> None:
    """Lets the peak of this process's resident memory begin anew, so that loading is not part of
    it; where the system does not allow that, it remains that since the start."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5)


def _per_step(entry: Entry, steps: int) -> Entry:
    return Entry(
        entry.calls // steps,
        entry.payload_bytes // steps,
        entry.wire_bytes / steps,
        entry.seconds / steps,
    )


def matrix_vector_products(model: Model) -> tuple[Callable[[], None], int]:
    """Work that reads matrices too large together to stay in this rank's part of the caches, and
    their bytes."""
    with CollectiveCall("split", model.mesh.world):
        node = model.mesh.world.comm.Split_type(MPI.COMM_TYPE_SHARED)
    bytes_of_rank = max(RANK_WORKING_SET, NODE_WORKING_SET // node.size)
    node.Free()
    side, dtype = 2048, model.decoder.dtype
    count = max(1, bytes_of_rank // (side * side * dtype.itemsize))
    matrices, x_I = np.ones((count, side, side), dtype), np.ones(side, dtype)

    def walk() -> None:
        for w_OI in matrices:
            w_OI @ x_I

    return walk, matrices.nbytes


def _products(layer: Layer) -> tuple[Callable[[], None], int]:
    """Work that multiplies PRODUCT_ROWS tokens with a layer's weights plainly, and its flops."""
    attention, ffn = layer.attention, layer.ffn
    if isinstance(ffn, MoELayer):
        ffn = next(iter(ffn.experts.values()))
    weights = [linear.weight for linear in (*attention.linears, ffn.gate, ffn.up, ffn.down)]
    widths = {w_OI.shape[1] for w_OI in weights}
    x_by_width = {width: np.ones((PRODUCT_ROWS, width), weights[0].dtype) for width in widths}

    def multiply() -> None:
        for w_OI in weights:
            x_by_width[w_OI.shape[1]] @ w_OI.T

    return multiply, 2 * PRODUCT_ROWS * sum(w_OI.size for w_OI in weights)


def _row(model: Model, run: Run, work: StepCost, bandwidth: float, rate: float) -> dict[str, Any]:
    """One line of the report; `work`, `bandwidth` and `rate` are this rank's own."""
    world = model.mesh.world
    figures = [work.product_flops, work.attention_flops, work.cache_bytes]
    flops, attention_flops, read = (int(n) for n in all_reduce(np.array(figures), world, MAX))
    limits = [work.seconds(bandwidth, rate), work.seconds_with_attention(bandwidth, rate)]
    least, with_attention = (float(s) for s in all_reduce(np.array(limits), world, MAX))
    tokens = model.mesh.dp.size * run.tokens
    communication = sum(entry.seconds for _, _, entry in run.entries)
    return {
        "phase": run.phase,
        "prompt_tokens": run.prompt_tokens,
        "batch": run.batch,
        "seconds_per_step": run.seconds,
        "tokens_per_second": tokens / run.seconds,
        "limit_tokens_per_second": tokens / least,
        "share_of_limit": least / run.seconds,
        "limit_with_attention_tokens_per_second": tokens / with_attention,
        "share_of_limit_with_attention": with_attention / run.seconds,
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


def _balance(model: Model, prompt: Run) -> dict[str, float]:
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
        "send_receive_seconds": float(most[2]),
    }


def _mixtures(model: Model, prompt: Run, rate: float) -> dict[str, Any]:
    """What the mixtures of a prompt's step come to, nothing for a model without: the seconds of the
    rank where they took most, routing and communication left out, and what the products of the rows
    that a rank computed take at least at `rate`; the rows of the ranks with the fewest and the
    most; and how many the rank with the most sent to others, there and back, beside how many it
    would send if experts were chosen evenly."""
    config, layout, world = model.config, model.mesh.layout, model.mesh.world
    if config.moe is None:
        return {}
    row_bytes = config.hidden * model.decoder.dtype.itemsize
    wires = [e.wire_bytes for what, _, e in prompt.entries if what == "all_to_all"]
    sent = sum(wires) / row_bytes if layout.moe_token_dispatcher == "all-to-all" else 0.0
    own = [prompt.mixture_seconds, prompt.expert_flops / rate, prompt.expert_rows, sent]
    most = all_reduce(np.array(own), world, MAX)
    fewest = all_reduce(np.array(prompt.expert_rows), world, MIN)
    rows = prompt.tokens / layout.replica_size * config.moe.top_k * sum(config.moe.layers)
    return {
        "mixture_seconds": float(most[0]),
        "mixture_limit_seconds": float(most[1]),
        "fewest_expert_rows": int(fewest),
        "most_expert_rows": int(most[2]),
        "expert_rows_sent": int(most[3]),
        "expert_rows_sent_if_even": 2 * rows * (layout.ep - 1) / layout.ep,
    }


def _memory(model: Model, batch: int, prompt_tokens: int, max_tokens: int) -> dict[str, int]:
    """Bytes of the rank that has most of each: the KV caches, the residual stream between two
    sub-layers, and all arrays that there are at once in a prompt's step beyond those before it.

    These are seen in a step of its own, because tracing makes attention up to a third slower (the
    trace's own small blocks scatter the heap, which then returns pages and asks for them again).
    It goes through one layer of each kind, as all of a kind take the same.
    """
    excerpt, ids_S = LayerSample(model.decoder), np.zeros(prompt_tokens, np.int64)
    caches = [
        model.decoder.allocate_cache(prompt_tokens + max_tokens, prompt_tokens)
        for _ in range(batch)
    ]
    step, streams = pack([(ids_S, cache) for cache in caches], excerpt.sequence_sharding), [0]
    tracemalloc.start()
    excerpt.forward(step, lambda _, x_nD: streams.append(x_nD.nbytes))
    _, activations = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    cached = sum(cache.nbytes for cache in caches)
    most = all_reduce(np.array([cached, max(streams), activations]), model.mesh.world, MAX)
    names = ("kv_cache_bytes", "residual_stream_bytes", "activations_bytes")
    return dict(zip(names, map(int, most), strict=True))


def _environment(model: Model) -> dict[str, Any]:
    numpy_built: Any = np.show_config(mode="dicts")
    blas = numpy_built["Build Dependencies"]["blas"]
    threads = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS")
    library, version = MPI.get_vendor()
    return {
        "model": str(model.path),
        "layout": str(model.mesh.layout),
        "ranks": model.mesh.world.size,
        "threads": int(threads) if threads else len(os.sched_getaffinity(0)),
        "dtype": str(model.decoder.dtype),
        "numpy": np.__version__,
        "blas": f"{blas['name']} {blas['version']}",
        "blas_kernels": KERNELS,
        "mpi": f"{library} {'.'.join(map(str, version))}",
    }
