"""Memory: of a rank's KV caches, of the residual stream, and of all activations of a step."""

from __future__ import annotations

import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np

from mpishard.api import Model
from mpishard.bench.probes import LayerSample
from mpishard.communication.collectives import MAX, all_reduce
from mpishard.sequences.step import pack


def memory_of(model: Model, batch: int, prompt_tokens: int, max_tokens: int) -> dict[str, int]:
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


def forget_peak() -> None:
    """Lets the peak of this process's resident memory begin anew, so that loading is not part of
    it; where the system does not allow that, it remains that since the start."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5)
