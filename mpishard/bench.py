"""How fast a model runs in its layout, and how fast this machine would let it run at most.

Both are measured in the same process and in turn, on all ranks at the same time:

prompt       B prompts of random tokens in one step, to the choice of each one's next token
product      after each: flops of ``x @ w.T`` in a second, with weights of the model's own shapes
generation   steps that feed one token to each of B sequences, to the choice of the next (greedy)
bandwidth    after each: bytes of large matrices that matrix-vector products read in a second

A step reads every weight of its rank once and multiplies it with every token, and so takes at least
as long as the slower of the two needs. That is the limit printed beside each speed. It counts the
weights alone: attention's own products, the KV cache and communication make the distance to it.

Every figure is a median. Step and limit alternate, so that other work on the machine slows both.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
from mpi4py import MPI

from mpishard.api import Model
from mpishard.arithmetic.packed import pack
from mpishard.communication.collectives import MAX, MIN, all_reduce
from mpishard.communication.ledger import Entry
from mpishard.communication.mesh import Group
from mpishard.description.config import ModelConfig
from mpishard.description.layout import query_heads_of
from mpishard.description.partition import weight_table
from mpishard.engine.sampling import Draw, Sampling, choose
from mpishard.errors import UserError
from mpishard.model import Layer

# Bytes of matrices that the ranks of a node walk together, beyond the caches that they share, and
# that each walks at least, beyond its own.
NODE_WORKING_SET = 512 * 2**20
RANK_WORKING_SET = 64 * 2**20
# Rows of `x` in the product whose rate is measured, unless the prompt is longer.
PRODUCT_ROWS = 512


@dataclass(frozen=True)
class Run:
    """Some steps on end that feed each of `batch` sequences the tokens at positions `start` to
    `stop` - 1: the seconds of the median step on the slowest rank, those that the machine's limit
    took this rank in between, and what this rank entered in its ledger in a step."""

    phase: str  # "prompt" or "generation"
    batch: int  # sequences of each replica
    start: int
    stop: int
    steps: int
    seconds: float
    limit_seconds: float
    entries: list[tuple[str, str, Entry]]

    @property
    def tokens(self) -> int:
        """Tokens of a replica in one step."""
        return self.batch * (self.stop - self.start) // self.steps


def measure(
    model: Model, prompt_tokens: int, max_tokens: int, batches: list[int], repeat: int
) -> dict[str, Any]:
    """The figures of `table`, for each number of sequences per replica in `batches`: the median
    of `repeat` rounds after one to warm up.

    Collective, and complete on rank 0 of the mesh: what is said of one rank is said of the slowest
    or fullest, except the collectives, which are rank 0's. Clears the mesh's ledger. Raises
    UserError for numbers below 1 and for more tokens than the model has positions.
    """
    _check(model, prompt_tokens, max_tokens, batches, repeat)
    world, decoder = model.mesh.world, model.decoder
    for batch in batches:
        _run(model, batch, prompt_tokens, max_tokens, _nothing, _nothing)
    peak = model.peak_memory()  # before the matrices below take memory that is not the model's
    multiply, flops = _products(decoder.layers[0], max(PRODUCT_ROWS, prompt_tokens))
    walk, walked = _matrix_vector_products(model)
    speeds, bandwidths, rates = [], [], []
    for batch in batches:
        rounds = [
            _run(model, batch, prompt_tokens, max_tokens, multiply, walk) for _ in range(repeat)
        ]
        prompt, generation = (_median(runs) for runs in zip(*rounds, strict=True))
        rates.append(flops / prompt.limit_seconds)
        bandwidths.append(walked / generation.limit_seconds)
        speeds += [_row(model, run, bandwidths[-1], rates[-1]) for run in (prompt, generation)]

    shard = model.config, model.mesh.tp.size, model.mesh.tp.rank
    cache = decoder.new_cache(prompt_tokens + max_tokens)
    held = [
        weight_bytes(*shard, decoder.dtype.itemsize),
        read_bytes(*shard, decoder.dtype.itemsize),
        (cache.k.nbytes + cache.v.nbytes) * max(batches),
    ]
    weights, read, cached = (int(n) for n in all_reduce(np.array(held), world, MAX))
    slowest = all_reduce(np.array([np.median(bandwidths), np.median(rates)]), world, MIN)
    return _environment(model) | {
        "prompt_tokens": prompt_tokens,
        "max_tokens": max_tokens,
        "repeat": repeat,
        "bandwidth_bytes_per_second": float(slowest[0]),
        "product_flops_per_second": float(slowest[1]),
        "weight_bytes": weights,
        "read_bytes": read,
        "kv_cache_bytes": cached,
        "peak_memory_bytes": peak,
        "speeds": speeds,
    }


def weight_bytes(config: ModelConfig, tp: int, rank: int, itemsize: int) -> int:
    """Bytes of all weights of a rank."""
    return itemsize * sum(
        math.prod(weight.shard_shape(config, tp, rank)) for weight in weight_table(config)
    )


def read_bytes(config: ModelConfig, tp: int, rank: int, itemsize: int) -> int:
    """Bytes of the weights of a rank that every step reads whole: all but the embedding, of which
    it reads a few rows, unless the embedding is also the head."""
    return itemsize * sum(
        math.prod(weight.shard_shape(config, tp, rank))
        for weight in weight_table(config)
        if weight.field != "embedding" or config.tied
    )


def product_flops(config: ModelConfig, tp: int, rank: int, tokens: int, wanted: int) -> int:
    """Floating-point operations of a rank's products with weights in a step of `tokens` tokens,
    `wanted` of which go through the head."""
    head = "embedding" if config.tied else "head"
    flops = 0
    for weight in weight_table(config):
        shape = weight.shard_shape(config, tp, rank)
        if weight.layer is not None and len(shape) == 2:
            flops += 2 * tokens * math.prod(shape)
        elif weight.field == head:
            flops += 2 * wanted * math.prod(shape)
    return flops


def attention_flops(config: ModelConfig, tp: int, rank: int, start: int, stop: int) -> int:
    """Floating-point operations of a rank's products of queries with keys and of probabilities
    with values, for the tokens at positions `start` to `stop` - 1 of one sequence; hidden keys are
    not counted."""
    mine = query_heads_of(config, tp, rank)
    seen_S = np.arange(start, stop) + 1
    visible = sum(int(np.minimum(seen_S, window or stop).sum()) for window in config.windows)
    return 4 * (mine.stop - mine.start) * config.head_dim * visible


def table(report: dict[str, Any]) -> str:
    """A report of `measure` to read."""
    return "\n".join(
        [_heading(report), *_machine_lines(report), "", *_speed_lines(report)]
        + ["", *_collective_lines(report)]
    )


def _check(
    model: Model, prompt_tokens: int, max_tokens: int, batches: list[int], repeat: int
) -> None:
    numbers = [("--prompt-tokens", prompt_tokens), ("--max-tokens", max_tokens)]
    numbers += [("--batch", batch) for batch in batches] + [("--repeat", repeat)]
    for flag, value in numbers:
        if value < 1:
            raise UserError(f"{flag} {value} must be at least 1")
    if not batches:
        raise UserError("--batch must name at least one number of sequences")
    positions, both = model.config.max_positions, f"--prompt-tokens {prompt_tokens}"
    both += f" and --max-tokens {max_tokens} need {prompt_tokens + max_tokens} positions"
    if prompt_tokens + max_tokens > positions:
        raise UserError(f"{both}, but {model.path} has only {positions}")
    if model.decoder.depends_on_length(prompt_tokens + max_tokens):
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
    """One prompt step of `batch` sequences and the `max_tokens` generation steps after it, followed
    by the work that measures the limit of each: `multiply` and `walk`."""
    decoder, mesh = model.decoder, model.mesh
    caches = [decoder.new_cache(prompt_tokens + max_tokens) for _ in range(batch)]

    def feed(ids_BS: np.ndarray) -> np.ndarray:
        logits_Bv = decoder.forward(pack(list(zip(ids_BS, caches, strict=True))))
        draws = [Draw(Sampling(), place, cache.length) for place, cache in enumerate(caches)]
        return np.array(choose(logits_Bv, draws, decoder.config.vocab, mesh))[:, np.newaxis]

    def timed(
        phase: str, ids_BS: np.ndarray, steps: int, limit: Callable[[], None]
    ) -> tuple[Run, np.ndarray]:
        start = caches[0].length
        mesh.ledger.clear()
        seconds, limit_seconds = [], []
        for _ in range(steps):
            started = _start_together(mesh.world)
            ids_BS = feed(ids_BS)
            seconds.append(perf_counter() - started)
            started = _start_together(mesh.world)
            limit()
            limit_seconds.append(perf_counter() - started)
        entries = [(what, group, _per_step(e, steps)) for what, group, e in mesh.ledger]
        slowest = float(all_reduce(np.array(np.median(seconds)), mesh.world, MAX))
        stop, median = caches[0].length, float(np.median(limit_seconds))
        return Run(phase, batch, start, stop, steps, slowest, median, entries), ids_BS

    random = np.random.default_rng(mesh.dp.rank)  # the same on all ranks of a replica
    prompts_BS = random.integers(model.config.vocab, size=(batch, prompt_tokens))
    prompt, first_B1 = timed("prompt", prompts_BS, 1, multiply)
    generation, _ = timed("generation", first_B1, max_tokens, walk)
    return prompt, generation


def _start_together(world: Group) -> float:
    """The time at which all ranks have come here."""
    world.comm.Barrier()
    return perf_counter()


def _median(runs: Sequence[Run]) -> Run:
    """The run of median seconds, with the median of what the limit took in all of them."""
    middle = sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]
    limit_seconds = float(np.median([run.limit_seconds for run in runs]))
    return replace(middle, limit_seconds=limit_seconds)


def _nothing() -> None:
    """Work of no length, while warming up."""


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


def _products(layer: Layer, rows: int) -> tuple[Callable[[], None], int]:
    """Work that multiplies `rows` tokens with a layer's weights plainly, and its flops."""
    attention, ffn = layer.attention, layer.ffn
    weights = [attention.q, attention.k, attention.v, attention.o, ffn.gate, ffn.up, ffn.down]
    x_by_width = {w_OI.shape[1]: np.ones((rows, w_OI.shape[1]), w_OI.dtype) for w_OI in weights}

    def multiply() -> None:
        for w_OI in weights:
            x_by_width[w_OI.shape[1]] @ w_OI.T

    return multiply, 2 * rows * sum(w_OI.size for w_OI in weights)


def _row(model: Model, run: Run, bandwidth: float, rate: float) -> dict[str, Any]:
    """One line of the report; `bandwidth` and `rate` are this rank's own."""
    mesh = model.mesh
    shard = model.config, mesh.tp.size, mesh.tp.rank
    flops = product_flops(*shard, run.tokens, run.batch)
    attention = run.batch * attention_flops(*shard, run.start, run.stop) // run.steps
    reading = read_bytes(*shard, model.decoder.dtype.itemsize) / bandwidth
    most = all_reduce(np.array([flops, attention, max(reading, flops / rate)]), mesh.world, MAX)
    least_seconds, tokens = float(most[2]), mesh.dp.size * run.tokens
    return {
        "phase": run.phase,
        "batch": run.batch,
        "seconds_per_step": run.seconds,
        "tokens_per_second": tokens / run.seconds,
        "limit_tokens_per_second": tokens / least_seconds,
        "share_of_limit": least_seconds / run.seconds,
        "bandwidth_bytes_per_second": bandwidth,
        "product_flops_per_second": rate,
        "product_flops": int(most[0]),
        "attention_flops": int(most[1]),
        "share_in_communication": sum(e.seconds for _, _, e in run.entries) / run.seconds,
        "collectives": [
            {"operation": operation, "group": group, **vars(entry)}
            for operation, group, entry in run.entries
        ],
    }


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
    largest = max(row["batch"] for row in report["speeds"])
    return [
        "limits of each rank, all at work: matrix-vector products read "
        f"{report['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s, matrix products make "
        f"{report['product_flops_per_second'] / 1e9:.1f} Gflop/s",
        f"memory of each rank, MB: weights {report['weight_bytes'] / 1e6:.1f}, of which a step "
        f"reads {report['read_bytes'] / 1e6:.1f}; KV cache at batch {largest} "
        f"{report['kv_cache_bytes'] / 1e6:.1f}; peak {report['peak_memory_bytes'] / 1e6:.1f}",
    ]


def _speed_lines(report: dict[str, Any]) -> list[str]:
    rows = [("", "batch", "tokens/s", "limit", "share", "ms/step", "communication")]
    for row in report["speeds"]:
        rows.append(
            (
                f"{row['phase']} {report[_LENGTH[row['phase']]]}",
                f"{row['batch']}",
                f"{row['tokens_per_second']:.1f}",
                f"{row['limit_tokens_per_second']:.1f}",
                f"{100 * row['share_of_limit']:.0f} %",
                f"{1e3 * row['seconds_per_step']:.2f}",
                f"{100 * row['share_in_communication']:.1f} %",
            )
        )
    return _aligned(rows)


def _collective_lines(report: dict[str, Any]) -> list[str]:
    rows = [("per step, on rank 0", "batch", "group", "calls", "payload", "wire bytes", "ms")]
    for row in report["speeds"]:
        for entry in row["collectives"]:
            rows.append(
                (
                    f"{row['phase']}: {entry['operation']}",
                    f"{row['batch']}",
                    entry["group"],
                    f"{entry['calls']}",
                    f"{entry['payload_bytes']}",
                    f"{entry['wire_bytes']:.0f}",
                    f"{1e3 * entry['seconds']:.3f}",
                )
            )
    return _aligned(rows)


_LENGTH = {"prompt": "prompt_tokens", "generation": "max_tokens"}


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
