"""How fast a model runs in its layout, in how much memory, and how fast this machine would let it.

Speeds and limits are measured in the same process and in turn, on all ranks at the same time:

prompt       B prompts of random tokens in one step, to the choice of each one's next token
product      after each: flops of ``x @ w.T`` in a second, with weights of the model's own shapes
generation   steps that feed one token to each of B sequences, to the choice of the next (greedy)
bandwidth    after each: bytes of large matrices that matrix-vector products read in a second

A step reads every weight of its rank once and multiplies it with every token, and so takes at least
as long as the slower of the two needs. That is the first limit printed beside each speed: it is the
whole of it where contexts are short. The second counts attention as well: the products of queries
with the keys that they see and of probabilities with values, and in generation the bytes of keys
and values that the step reads. What context parallelism, a divided cache or tensor parallelism
leave to other ranks is counted there. Norms, softmax and communication make the distance to it.

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
from mpishard.arithmetic.packed import Feed, KVCache, Step, pack
from mpishard.communication.collectives import MAX, MIN, all_reduce, barrier
from mpishard.communication.group import Call, Group
from mpishard.communication.ledger import Entry, Ledger
from mpishard.communication.mesh import Mesh
from mpishard.description.config import ModelConfig
from mpishard.description.cut import Cut
from mpishard.description.partition import Weight, weights_of
from mpishard.engine.generate import next_tokens
from mpishard.engine.sampling import Draw, Sampling
from mpishard.errors import UserError
from mpishard.model import Decoder, Layer
from mpishard.parallel.expert import Mixture
from mpishard.parallel.heads import Attend, Heads

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
class Work:
    """What a step asks of a rank: flops of the products with weights and of attention's, bytes of
    weights and of keys and values to be read."""

    product_flops: int
    attention_flops: int
    weight_bytes: int
    cache_bytes: int

    def seconds(self, bandwidth: float, rate: float) -> float:
        """What the step takes at least, attention left out."""
        return max(self.weight_bytes / bandwidth, self.product_flops / rate)

    def seconds_with_attention(self, bandwidth: float, rate: float) -> float:
        """What the step takes at least."""
        read = self.weight_bytes + self.cache_bytes
        return max(read / bandwidth, (self.product_flops + self.attention_flops) / rate)


@dataclass(frozen=True)
class Run:
    """Some steps on end that feed each of `batch` sequences its prompt or, after it, one token
    each: the seconds of the median step on the slowest rank, those that the machine's limit took
    this rank in between, and what this rank did in a step: the seconds it spent outside of
    collectives, those of them in attention, and what it entered in its ledger."""

    phase: str  # "prompt" or "generation"
    prompt_tokens: int  # of each sequence
    batch: int  # sequences of each replica
    steps: int
    seconds: float
    limit_seconds: float
    arithmetic_seconds: float
    entries: list[tuple[str, str, Entry]]
    attention_seconds: float = 0.0  # of a prompt alone

    @property
    def tokens(self) -> int:
        """Tokens of a replica in one step."""
        return self.batch * (self.prompt_tokens if self.phase == "prompt" else 1)


class Watched(Decoder):
    """A model that adds up the seconds which attention takes it, communication left out."""

    def __init__(self, model: Decoder) -> None:
        self.__dict__.update(model.__dict__)
        self.layers = [self._watched(layer) for layer in model.layers]
        self.attention_seconds = 0.0

    def _watched(self, layer: Layer) -> Layer:
        attend = self._timed(layer.attention.attend)
        return replace(layer, attention=replace(layer.attention, attend=attend))

    def _timed(self, attend: Attend) -> Attend:
        def timed(heads: Heads, step: Step, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
            started = _arithmetic_clock(mesh.ledger)
            output = attend(heads, step, mesh)
            self.attention_seconds += _arithmetic_clock(mesh.ledger) - started
            return output

        return timed


class Excerpt(Decoder):
    """The first layer of each kind of a model, of which it has as many as it has windows."""

    def __init__(self, model: Decoder) -> None:
        model = model.with_mixtures(lambda _, mixture: replace(mixture, watchers=()))
        self.__dict__.update(model.__dict__)
        windows = model.config.windows
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
    walk, walked = _matrix_vector_products(model)
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
            work = prompt_work(model.decoder, batch, length)
            speeds.append(_row(model, prompt, work, *limits) | _balance(model, prompt))
            work = generation_work(model.decoder, batch, length, length + max_tokens)
            speeds.append(_row(model, generation, work, *limits))
            # The matrices of the limits were there all the time, and are none of the model's.
            peak = max(warmed_up, model.peak_memory() - walked)
            arrays = _memory(model, batch, length, max_tokens)
            memory.append({"prompt_tokens": length, "batch": batch, **arrays, "peak_bytes": peak})

    world, shard = model.mesh.world, (*_shard(model.decoder), model.decoder.dtype.itemsize)
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


def prompt_work(model: Decoder, batch: int, tokens: int) -> Work:
    """What the step that feeds `batch` prompts of `tokens` tokens asks of this rank: its own tokens
    meet its weights, and its query heads the keys of all ranks."""
    config, division = model.config, model.division
    own_S = division.tokens(0, tokens)[division.cp_rank]
    wanted = int(np.count_nonzero(own_S == tokens - 1))
    seen = batch * visible_keys(config, own_S, np.arange(tokens))
    routed = _routed(model, batch * tokens)
    return Work(
        product_flops=product_flops(*_shard(model), batch * len(own_S), batch * wanted, routed),
        attention_flops=_flops_per_key(config, division.heads[division.sharer]) * seen,
        weight_bytes=read_bytes(*_shard(model), model.dtype.itemsize, routed),
        cache_bytes=0,
    )


def generation_work(model: Decoder, batch: int, start: int, stop: int) -> Work:
    """What the mean of the steps that feed `batch` sequences one token each, at positions `start`
    to `stop` - 1 after a prompt, asks of this rank: the query heads of all ranks that divide a
    cache with it meet the keys that it keeps.

    Of context-parallel ranks one has the tokens of a step and the others wait, so each is counted
    as if it were its turn.
    """
    config, division = model.config, model.division
    own = [division.tokens(*part)[division.cp_rank] for part in ((0, start), (start, stop))]
    kept_T = np.concatenate([positions[division.kept(positions)] for positions in own])
    seen = batch * visible_keys(config, np.arange(start, stop), kept_T) // (stop - start)
    routed = _routed(model, batch)
    key_and_value = model.kv_heads * config.kept_width * model.dtype.itemsize
    return Work(
        product_flops=product_flops(*_shard(model), batch, batch, routed),
        attention_flops=_flops_per_key(config, sum(division.heads)) * seen,
        weight_bytes=read_bytes(*_shard(model), model.dtype.itemsize, routed),
        cache_bytes=key_and_value * seen,
    )


def weight_bytes(config: ModelConfig, cut: Cut, index: int, itemsize: int) -> int:
    """Bytes of all weights of a rank, which has set `index` of those that `cut` makes."""
    held = weights_of(config, cut, index)
    return itemsize * sum(math.prod(weight.shard_shape(config, cut, index)) for weight in held)


def read_bytes(config: ModelConfig, cut: Cut, index: int, itemsize: int, tokens: int = 1) -> int:
    """Bytes of the weights of a rank that a step reads: all but the embedding, of which it reads a
    few rows, unless the embedding is also the head; of a mixture, the experts that `tokens` tokens
    choose if all choices are equally likely."""
    read = 0.0
    for weight in weights_of(config, cut, index):
        if weight.field != "embedding" or config.tied:
            chosen = 1.0
            if config.moe and weight.expert is not None:
                share = tokens / _copies(cut, weight)
                chosen -= (1 - config.moe.top_k / config.moe.experts) ** share
            read += chosen * math.prod(weight.shard_shape(config, cut, index))
    return int(itemsize * read)


def product_flops(
    config: ModelConfig, cut: Cut, index: int, tokens: int, wanted: int, routed: int = 0
) -> int:
    """Floating-point operations of a rank's products with weights in a step of `tokens` tokens,
    `wanted` of which go through the head, and of experts that divide `routed` tokens evenly."""
    head = "embedding" if config.tied else "head"
    flops = 0.0
    for weight in weights_of(config, cut, index):
        shape = weight.shard_shape(config, cut, index)
        if config.moe and weight.expert is not None:
            share = config.moe.top_k / config.moe.experts / _copies(cut, weight)
            flops += 2 * routed * share * math.prod(shape)
        elif weight.layer is not None and len(shape) == 2:
            flops += 2 * tokens * math.prod(shape)
        elif weight.field == head:
            flops += 2 * wanted * math.prod(shape)
    return int(flops)


def _copies(cut: Cut, weight: Weight) -> int:
    """How many ranks share the tokens of an expert's weight."""
    assert weight.layer is not None and weight.expert is not None
    return cut.copies(weight.layer, weight.expert)


def visible_keys(config: ModelConfig, queries_S: np.ndarray, keys_T: np.ndarray) -> int:
    """The pairs of a query at one of the positions `queries_S` and a key at one of `keys_T`, both
    ascending, in which the query sees the key: those of all layers together."""
    earlier_S = np.searchsorted(keys_T, queries_S, side="right")
    pairs = 0
    for window in config.windows:
        left = 0 if window is None else np.searchsorted(keys_T, queries_S - window, side="right")
        pairs += int((earlier_S - left).sum())
    return pairs


def table(report: dict[str, Any]) -> str:
    """A report of `measure` to read."""
    parts = [_speed_lines, _balance_lines, _memory_lines, _collective_lines]
    lines = [_heading(report), *_machine_lines(report)]
    for part in parts:
        lines += ["", *part(report)]
    return "\n".join(lines)


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
    needed, positions = longest + max_tokens, model.config.max_positions
    both = f"--prompt-tokens {longest} and --max-tokens {max_tokens} need {needed} positions"
    if needed > positions:
        raise UserError(
            f"{both}, but {model.path} has only {positions}; --max-positions {needed} allows them"
        )
    if model.decoder.depends_on_length(needed):
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
    caches = [decoder.new_cache(prompt_tokens + max_tokens, prompt_tokens) for _ in range(batch)]

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
    watched = Watched(decoder)
    prompt, first_B1 = timed("prompt", watched, prompts_BS, 1, multiply)
    generation, _ = timed("generation", decoder, first_B1, max_tokens, walk)
    return replace(prompt, attention_seconds=watched.attention_seconds), generation


def _feed(decoder: Decoder, caches: list[KVCache], ids_BS: np.ndarray) -> np.ndarray:
    """The token chosen after feeding each sequence its next tokens, ready to be fed: (B, 1)."""
    feeds = [
        Feed(ids_S, cache, request=place, prompt=cache.length or None)
        for place, (ids_S, cache) in enumerate(zip(ids_BS, caches, strict=True))
    ]
    step = pack(feeds, decoder.division)
    draws = [Draw(Sampling(), place, cache.length) for place, cache in enumerate(caches)]
    return np.array(next_tokens(decoder, step, draws))[:, np.newaxis]


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


def _matrix_vector_products(model: Model) -> tuple[Callable[[], None], int]:
    """Work that reads matrices too large together to stay in this rank's part of the caches, and
    their bytes."""
    with Call("split", model.mesh.world):
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
    if isinstance(ffn, Mixture):
        ffn = next(iter(ffn.experts.values()))
    weights = [*attention.matrices, ffn.gate, ffn.up, ffn.down]
    widths = {w_OI.shape[1] for w_OI in weights}
    x_by_width = {width: np.ones((PRODUCT_ROWS, width), attention.o.dtype) for width in widths}

    def multiply() -> None:
        for w_OI in weights:
            x_by_width[w_OI.shape[1]] @ w_OI.T

    return multiply, 2 * PRODUCT_ROWS * sum(w_OI.size for w_OI in weights)


def _row(model: Model, run: Run, work: Work, bandwidth: float, rate: float) -> dict[str, Any]:
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
    exchanged = [entry.seconds for what, _, entry in prompt.entries if what == "send_receive"]
    seconds = [prompt.arithmetic_seconds, prompt.attention_seconds, sum(exchanged)]
    least = all_reduce(np.array(seconds), model.mesh.world, MIN)
    most = all_reduce(np.array(seconds), model.mesh.world, MAX)
    return {
        "least_arithmetic_seconds": float(least[0]),
        "most_arithmetic_seconds": float(most[0]),
        "attention_seconds": float(most[1]),
        "send_receive_seconds": float(most[2]),
    }


def _memory(model: Model, batch: int, prompt_tokens: int, max_tokens: int) -> dict[str, int]:
    """Bytes of the rank that has most of each: the KV caches, the residual stream between two
    sub-layers, and all arrays that there are at once in a prompt's step beyond those before it.

    These are seen in a step of its own, because tracing makes attention up to a third slower (the
    trace's own small blocks scatter the heap, which then returns pages and asks for them again).
    It goes through one layer of each kind, as all of a kind take the same.
    """
    excerpt, ids_S = Excerpt(model.decoder), np.zeros(prompt_tokens, np.int64)
    caches = [excerpt.new_cache(prompt_tokens + max_tokens, prompt_tokens) for _ in range(batch)]
    step, streams = pack([(ids_S, cache) for cache in caches], excerpt.division), [0]
    tracemalloc.start()
    excerpt.forward(step, lambda _, x_nD: streams.append(x_nD.nbytes))
    _, activations = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    cached = sum(cache.nbytes for cache in caches)
    most = all_reduce(np.array([cached, max(streams), activations]), model.mesh.world, MAX)
    names = ("kv_cache_bytes", "residual_stream_bytes", "activations_bytes")
    return dict(zip(names, map(int, most), strict=True))


def _shard(model: Decoder) -> tuple[ModelConfig, Cut, int]:
    """What the counts of a rank's weights depend on."""
    return model.config, model.mesh.cut, model.mesh.weights


def _routed(model: Decoder, tokens: int) -> int:
    """The tokens that the ranks which divide the experts have, where each replica has `tokens`."""
    return model.mesh.layout.together * tokens


def _flops_per_key(config: ModelConfig, heads: int) -> int:
    """Of a query's product with a key and of the probability's with the value, in `heads` heads."""
    return 2 * heads * (config.key_width + config.value_width)


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
        "blas_kernels": os.environ.get("OPENBLAS_CORETYPE"),
        "mpi": f"{library} {'.'.join(map(str, version))}",
    }


def _heading(report: dict[str, Any]) -> str:
    kernels = f", OPENBLAS_CORETYPE={report['blas_kernels']}" if report["blas_kernels"] else ""
    return (
        f"{report['model']}: {report['layout']}, ranks: {report['ranks']}, threads per rank: "
        f"{report['threads']}, {report['dtype']}, NumPy {report['numpy']} ({report['blas']}"
        f"{kernels}), {report['mpi']}"
    )


def _machine_lines(report: dict[str, Any]) -> list[str]:
    return [
        "limits of each rank, all at work: matrix-vector products read "
        f"{report['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s, matrix products make "
        f"{report['product_flops_per_second'] / 1e9:.1f} Gflop/s",
        f"weights of each rank: {report['weight_bytes'] / 1e6:.1f} MB, of which a step reads "
        f"{report['read_bytes'] / 1e6:.1f} MB",
    ]


def _title(row: dict[str, Any], report: dict[str, Any]) -> str:
    length = row["prompt_tokens"]
    return (
        f"prompt {length}"
        if row["phase"] == "prompt"
        else f"generation {report['max_tokens']} after {length}"
    )


def _speed_lines(report: dict[str, Any]) -> list[str]:
    rows = [
        ("", "batch", "tokens/s", "limit", "share", "with attention", "share", "ms/step")
        + ("communication",)
    ]
    for row in report["speeds"]:
        rows.append(
            (
                _title(row, report),
                f"{row['batch']}",
                f"{row['tokens_per_second']:.1f}",
                f"{row['limit_tokens_per_second']:.1f}",
                _percent(row["share_of_limit"]),
                f"{row['limit_with_attention_tokens_per_second']:.1f}",
                _percent(row["share_of_limit_with_attention"]),
                f"{1e3 * row['seconds_per_step']:.2f}",
                f"{100 * row['share_in_communication']:.1f} %",
            )
        )
    return _aligned(rows)


def _balance_lines(report: dict[str, Any]) -> list[str]:
    rows = [
        ("seconds of a step, all ranks", "batch", "arithmetic: least", "most", "apart")
        + ("attention", "Gflop/s", "of products", "send_receive", "of step")
    ]
    for row in report["speeds"]:
        if row["phase"] != "prompt":
            continue
        least, most = row["least_arithmetic_seconds"], row["most_arithmetic_seconds"]
        rate = row["attention_flops"] / row["attention_seconds"]
        rows.append(
            (
                _title(row, report),
                f"{row['batch']}",
                f"{least:.3f}",
                f"{most:.3f}",
                _percent(most / least - 1),
                f"{row['attention_seconds']:.3f}",
                f"{rate / 1e9:.1f}",
                _percent(rate / row["product_flops_per_second"]),
                f"{row['send_receive_seconds']:.3f}",
                _percent(row["send_receive_seconds"] / row["seconds_per_step"]),
            )
        )
    return _aligned(rows)


def _memory_lines(report: dict[str, Any]) -> list[str]:
    kinds = ("kv_cache", "residual_stream", "activations", "peak")
    names = ["weights", *(kind.replace("_", " ") for kind in kinds)]
    rows = [("memory of a rank, MB", "batch", *names)]
    for row in report["memory"]:
        figures = [report["weight_bytes"], *(row[f"{kind}_bytes"] for kind in kinds)]
        title = f"prompt {row['prompt_tokens']}, generation {report['max_tokens']}"
        rows.append((title, f"{row['batch']}", *(f"{figure / 1e6:.1f}" for figure in figures)))
    return _aligned(rows)


def _collective_lines(report: dict[str, Any]) -> list[str]:
    rows = [("per step, on rank 0", "batch", "group", "calls", "payload", "wire bytes", "ms")]
    for row in report["speeds"]:
        for entry in row["collectives"]:
            rows.append(
                (
                    f"{_title(row, report)}: {entry['operation']}",
                    f"{row['batch']}",
                    entry["group"],
                    f"{entry['calls']}",
                    f"{entry['payload_bytes']}",
                    f"{entry['wire_bytes']:.0f}",
                    f"{1e3 * entry['seconds']:.3f}",
                )
            )
    return _aligned(rows)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
