"""The scheduler's decisions, without a model or ranks."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np

from mpishard.engine.sampling_params import SamplingParams
from mpishard.engine.scheduler import Scheduler, SchedulerConfig
from mpishard.engine.sequence import Request
from mpishard.sequences.kv_cache import KVCache
from mpishard.sequences.sharding import FirstChunk, SequenceSharding
from mpishard.sequences.step import pack

BYTES = 8  # of a cached position; a reused prefix takes 1,000 more, to be recognised


def fake_model() -> Any:
    """What the scheduler asks of a decoder."""

    def cache_bytes(
        capacity: int, first_chunk: FirstChunk | None = None, encoder_length: int = 0
    ) -> int:
        return BYTES * (capacity + encoder_length) + 1000 * (first_chunk is not None)

    return SimpleNamespace(
        config=SimpleNamespace(max_position_embeddings=1000, linear_attention=None, encoder=None),
        sequence_sharding=SequenceSharding(),
        uses_dynamic_rope=lambda length: False,
        rope_lengths=lambda length: (0,),
        allocate_cache=lambda capacity, *_, **__: KVCache(1, 1, capacity, 1, np.dtype(np.float32)),
        cache_bytes=cache_bytes,
    )


def scheduler(*lengths: int, max_tokens: int = 9, **config: Any) -> Scheduler:
    """One whose requests have prompts of these `lengths` with no token in common."""
    made = Scheduler(fake_model(), SchedulerConfig(**config))
    prompts = [[100 + index] * length for index, length in enumerate(lengths)]
    requests = [
        Request(index, ids, SamplingParams(max_tokens=max_tokens))
        for index, ids in enumerate(prompts)
    ]
    assert made.add(requests) == []
    return made


def step(made: Scheduler) -> list[tuple[int, int]]:
    """The request and the size of each chunk of the next step. Complete sequences get a token."""
    chunks = made.schedule()
    pack([chunk for _, chunk in chunks])
    for sequence, chunk in chunks:
        if not chunk.remaining:
            sequence.output.ids.append(7)
    return [(sequence.request.index, len(chunk.ids_S)) for sequence, chunk in chunks]


def test_decode_comes_before_prefill_and_prefill_before_admission():
    made = scheduler(9, 2, 5, max_num_batched_tokens=6, chunked_prefill_size=4)
    assert step(made) == [(0, 4), (1, 2)]
    assert step(made) == [(1, 1), (0, 4), (2, 1)]
    assert step(made) == [(0, 1), (1, 1), (2, 4)]


def test_a_prompt_longer_than_a_step_is_admitted_alone():
    """Without chunked prefill; a shorter prompt has to fit what is left of the step."""
    made = scheduler(3, 20, 20, 3, 3, max_num_batched_tokens=8)
    assert step(made) == [(0, 3)]
    assert step(made) == [(0, 1), (1, 20)]
    assert step(made) == [(0, 1), (1, 1), (2, 20)]
    assert step(made) == [(0, 1), (1, 1), (2, 1), (3, 3)]
    assert step(made) == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 3)]


def test_the_cache_of_a_finished_sequence_is_freed_before_the_next_step_runs():
    made = scheduler(3, 3)
    made.schedule()
    cache = weakref.ref(made.running[0].cache)
    made.running[0].output.finish_reason = "stop"
    assert [request.index for request, _ in made.pop_finished()] == [0]
    assert cache() is not None
    made.schedule()
    assert cache() is None


def test_a_reused_prefix_reserves_what_its_cache_takes():
    made = Scheduler(fake_model(), SchedulerConfig(kv_cache_memory_bytes=10_000))
    made.add(
        [
            Request(index, [*range(40), 50 + index], SamplingParams(max_tokens=9))
            for index in range(2)
        ]
    )
    assert step(made) == [(0, 41)]
    assert step(made) == [(0, 1), (1, 1)]
    assert [sequence.cache_bytes for sequence in made.running] == [49 * BYTES, 49 * BYTES + 1000]


def test_requests_that_are_fetched_ahead():
    """Two more than there are free places, until two wait."""
    made = scheduler(max_num_seqs=3)
    assert made.num_wanted == 5
    made.add([Request(index, [index], SamplingParams(max_tokens=9)) for index in range(5)])
    assert made.num_wanted == 0
    step(made)
    assert (len(made.running), len(made.waiting), made.num_wanted) == (3, 2, 0)


def test_what_an_encoder_reads_counts_as_tokens_of_the_step():
    made = Scheduler(fake_model(), SchedulerConfig(max_num_batched_tokens=12))
    requests = [
        Request(index, [index], SamplingParams(max_tokens=3), encoder_ids=[5] * length)
        for index, length in enumerate((8, 2, 1, 40))
    ]
    assert made.add(requests) == []
    assert step(made) == [(0, 1), (1, 1)]  # 8 + 1 and 2 + 1 tokens are all that a step takes
    assert step(made) == [(0, 1), (1, 1), (2, 1)]  # the longest needs a step that admits no other
    assert step(made) == [(0, 1), (1, 1), (2, 1), (3, 1)]
