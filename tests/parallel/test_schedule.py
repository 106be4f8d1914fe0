"""What is communicated: the ledger of every layout held to closed forms, exactly; and the figures
of the table in docs/costs.md.

A forward pass is a list of calls (operation, group, payload, wire): `forward_calls` says which from
the layout, the model and the step alone, and the ledger must hold their sum and nothing else.
Beside it stand the published formulas, for what divides evenly. D, K, h, g are the dimensions as
everywhere; e is the size of a number in bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from mpi4py import MPI
from test_memory import cache_bytes, heads_of, residual_bytes, weight_bytes
from tiny_models import tiny_config
from toys import Recorder, mesh_of, meshes, toy

from mpishard.communication.mesh import Mesh
from mpishard.config.layout import CP_ORDERS, CP_PREFILLS, DECODE_MERGES, Layout, kv_replica_ranks
from mpishard.config.model_config import ModelConfig
from mpishard.config.reader import read_model_config
from mpishard.engine.generate import generate
from mpishard.engine.sampling_params import SamplingParams
from mpishard.engine.scheduler import SchedulerConfig
from mpishard.engine.sequence import Request
from mpishard.model import Decoder
from mpishard.parallel.data import assign_requests
from mpishard.sequences.kv_cache import KVCache
from mpishard.sequences.sharding import SequenceSharding
from mpishard.sequences.step import ScheduledChunk, Segment, Step, pack

pytestmark = pytest.mark.ranks

COSTS = Path(__file__).parents[2] / "docs" / "costs.md"
PROMPTS = ([3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5])
# Query and key/value heads 8:4, 8:1, 12:3 with a window in each layer, 6:3 with one in some, and
# 6:3 with norms over all heads.
FAMILIES = ("llama-gqa", "llama-mqa", "mistral-window", "qwen3-mixed", "olmo2-plain")


class CollectiveCall(NamedTuple):
    operation: str
    group: str
    payload: int
    wire: float


Totals = dict[tuple[str, str], tuple[int, int, float]]  # calls, payload and wire by what and where


def totals(calls: list[CollectiveCall]) -> Totals:
    """The sum of `calls`, as a ledger keeps it."""
    found: Totals = {}
    for operation, group, payload, wire in calls:
        number, payloads, wires = found.get((operation, group), (0, 0, 0))
        found[operation, group] = (number + 1, payloads + payload, wires + wire)
    return found


def seen(mesh: Mesh) -> Totals:
    """What the ledger holds."""
    return {
        (operation, group): (entry.calls, entry.payload_bytes, entry.wire_bytes)
        for operation, group, entry in mesh.ledger
    }


def same(found: Totals, expected: Totals) -> bool:
    """Whether all counts are equal. The wire bytes of an all_reduce are no whole number."""
    return found == {
        key: (calls, payload, pytest.approx(wire, rel=1e-12, abs=0))
        for key, (calls, payload, wire) in expected.items()
    }


def sent(mesh: Mesh, group: str) -> float:
    """The wire bytes of this rank in `group`."""
    return sum(entry.wire_bytes for _, name, entry in mesh.ledger if name == group)


# What a forward pass calls


def all_reduce(group: str, p: int, payload: int) -> CollectiveCall:
    return CollectiveCall("all_reduce", group, payload, 2 * (p - 1) / p * payload)


def all_gather(group: str, p: int, payload: int) -> CollectiveCall:
    return CollectiveCall("all_gather", group, payload, (p - 1) * payload)


def reduce_scatter(group: str, payload: int, kept: int) -> CollectiveCall:
    return CollectiveCall("reduce_scatter", group, payload, payload - kept)


def all_to_all(group: str, payload: int, kept: int) -> CollectiveCall:
    return CollectiveCall("all_to_all", group, payload, payload - kept)


def isendrecv(group: str, payload: int) -> CollectiveCall:
    return CollectiveCall("isendrecv", group, payload, payload)


def forward_calls(
    layout: Layout, rank: int, config: ModelConfig, step: Step, e: int
) -> list[CollectiveCall]:
    """Every call of world rank `rank` in a forward pass."""
    _, cp, tp = layout.coordinates(rank)
    _, embedding = around(layout, rank, config, step, e)
    calls = [*embedding]
    for window in config.windows:
        calls += layer_calls(layout, rank, config, step, e, window)
    if layout.sequence_parallel:
        mine = np.array_split(np.arange(len(step.global_index[cp])), layout.tp)[tp]
        wanted = int(np.isin(step.logits_indices_M, mine).sum())
        calls.append(all_gather("tp", layout.tp, wanted * config.hidden * e))
    return calls


def layer_calls(
    layout: Layout, rank: int, config: ModelConfig, step: Step, e: int, window: int | None
) -> list[CollectiveCall]:
    """The calls of one layer: attention, then the feed-forward network."""
    before, after = around(layout, rank, config, step, e)
    attention = attention_calls(layout, rank, config, step, e, window)
    return before + attention + after + before + after


def around(
    layout: Layout, rank: int, config: ModelConfig, step: Step, e: int
) -> tuple[list[CollectiveCall], list[CollectiveCall]]:
    """The calls before a sub-layer and after it, of the tokens of one cp rank."""
    _, cp, tp = layout.coordinates(rank)
    tokens, row = len(step.global_index[cp]), config.hidden * e
    if not layout.sequence_parallel:
        return [], [all_reduce("tp", layout.tp, tokens * row)]
    mine = len(np.array_split(np.arange(tokens), layout.tp)[tp])
    return (
        [all_gather("tp", layout.tp, mine * row)],
        [reduce_scatter("tp", tokens * row, mine * row)],
    )


def attention_calls(
    layout: Layout, rank: int, config: ModelConfig, step: Step, e: int, window: int | None
) -> list[CollectiveCall]:
    """The calls between a layer's queries, keys and values and its output."""
    calls: list[CollectiveCall] = []
    if config.full_width_qk_norm:  # of each token the sums of squares of q and of k
        tokens = len(step.global_index[layout.coordinates(rank)[1]])
        calls.append(all_reduce("tp", layout.tp, tokens * 2 * e))
    if not layout.shards_kv_positions:
        return calls
    if step.first_chunks:
        calls += prefill_calls(layout, rank, config, step.first_chunks, e, window)
    if step.extends:
        calls += decode_calls(layout, rank, config, step.extends, e)
    return calls


def prefill_calls(
    layout: Layout, rank: int, config: ModelConfig, fresh: list[Segment], e: int, window: int | None
) -> list[CollectiveCall]:
    """Keys and values, 2 g K numbers a position, from rank to rank or to all ranks at once."""
    _, cp, tp = layout.coordinates(rank)
    _, g = heads_of(config, layout.tp, tp)
    position = 2 * g * config.head_dim * e

    def rows(source: int, readers: list[int]) -> int:
        return sum(
            rows_needed(
                segment.positions_by_rank[source],
                [segment.positions_by_rank[r] for r in readers],
                window,
            )
            for segment in fresh
        )

    if layout.cp_prefill == "all-gather":
        others = [other for other in range(layout.cp) if other != cp]
        return [all_gather("cp", layout.cp, rows(cp, others) * position)]

    def passed(by: int, hop: int) -> int:
        """What goes on from rank `by`, having come to it in `hop` hops."""
        source = (by - hop) % layout.cp
        further = [(source + distance) % layout.cp for distance in range(hop + 1, layout.cp)]
        return rows(source, further)

    hops = [(passed(cp, hop), passed(cp - 1, hop)) for hop in range(layout.cp - 1)]
    # Where nothing goes on and nothing comes there is no call.
    return [isendrecv("cp", mine * position) for mine, coming in hops if mine or coming]


def rows_needed(keys: np.ndarray, readers: list[np.ndarray], window: int | None) -> int:
    """How many of `keys` are sent to ranks that have the queries `readers`: with a window those
    that some query sees, every pair looked at."""
    if window is None:
        return len(keys) if readers else 0
    queries = [int(query) for reader in readers for query in reader]
    return sum(any(key <= query < key + window for query in queries) for key in keys)


def decode_calls(
    layout: Layout, rank: int, config: ModelConfig, continued: list[Segment], e: int
) -> list[CollectiveCall]:
    """The merge over the ranks that divide a cache: each rank's (token, head) pairs are one block
    of all ranks'."""
    _, cp, tp = layout.coordinates(rank)
    sharers = kv_replica_ranks(config, layout.tp, tp)[1] if layout.flash_decoding else [tp]
    heads = {
        kv_replica_rank: heads_of(config, layout.tp, kv_replica_rank)[0]
        for kv_replica_rank in sharers
    }
    tokens = [
        sum(len(segment.positions_by_rank[c]) for segment in continued) for c in range(layout.cp)
    ]
    pairs, everyones = tokens[cp] * heads[tp], sum(tokens) * sum(heads.values())
    return merge_calls(
        layout.decode_merge, layout.cp * len(heads), pairs, everyones, config.head_dim, e
    )


def merge_calls(
    merge: str, p: int, pairs: int, everyones: int, K: int, e: int, statistics: int | None = None
) -> list[CollectiveCall]:
    """Queries to all, partial outputs and their log-sum-exps back, with `statistics` bytes for the
    latter unless they are a number as others are."""
    lse = e if statistics is None else statistics
    queries = all_gather("kv", p, pairs * K * e)
    if merge == "reduce-scatter":
        outputs = reduce_scatter("kv", everyones * K * e, pairs * K * e)
        return [queries, all_gather("kv", p, everyones * lse), outputs]
    if merge == "all-to-all":
        pair = K * e + lse
        return [queries, all_to_all("kv", everyones * pair, pairs * pair)]
    assert merge == "all-reduce"
    peak, sums = everyones * lse, everyones * (K * e + lse)
    return [queries, all_reduce("kv", p, peak), all_reduce("kv", p, sums)]


def choice_calls(layout: Layout, step: Step, e: int) -> list[CollectiveCall]:
    """Greedy choice: a candidate, key and id, of each rank, and the ids chosen."""
    wanted = len(step.logits_indices_M)
    return [
        all_gather("tp", layout.tp, wanted * (e + 8)),
        all_gather("cp", layout.cp, wanted * 8),
    ]


# The published formulas: what a rank sends in a layer where everything divides evenly. `tokens` are
# those of all ranks that divide them, `pairs` a rank's own (token, head) pairs.


def tensor_bytes(tp: int, tokens: int, D: int, e: int) -> float:
    """Two all_reduces; two all_gathers and two reduce_scatters."""
    return 4 * (tp - 1) / tp * tokens * D * e


def context_bytes(cp: int, tokens: int, g: int, K: int, e: int) -> float:
    """Keys and values through cp - 1 hops of the ring; in one all_gather."""
    return (cp - 1) * 2 * tokens / cp * g * K * e


MERGE_BYTES: dict[str, Callable[[int, int, int, int], float]] = {
    "reduce-scatter": lambda p, pairs, K, e: (p - 1) * pairs * (2 * K + p) * e,
    "all-to-all": lambda p, pairs, K, e: (p - 1) * pairs * (2 * K + 1) * e,
    "all-reduce": lambda p, pairs, K, e: (p - 1) * pairs * (3 * K + 4) * e,
}


# Every layout


def steps(model: Decoder) -> Iterator[Step]:
    """Ragged prompts; a token each; the rest of a prompt, a prompt that begins and one that is to
    be continued beside a token, all logits; and a single token."""
    caches = [model.allocate_cache(24, len(ids)) for ids in (*PROMPTS, range(9), range(2))]

    def step(*lengths: int, **options: bool) -> Step:
        feeds = [
            ScheduledChunk(np.arange(length), cache, remaining=int(cache is caches[4]))
            for length, cache in zip(lengths, caches, strict=False)
            if length
        ]
        return pack(feeds, model.sequence_sharding, **options)

    yield step(*map(len, PROMPTS))
    yield step(1, 1, 1)
    yield step(5, 1, 0, 9, 2, all_logits=True)
    yield step(0, 1, 0, 0, 3)


@pytest.mark.parametrize("variant", FAMILIES)
def test_every_step_of_every_layout_is_the_sum_of_its_closed_forms(
    comm: MPI.Intracomm, variant: str
):
    """And no rank meets another in any other group: replicas never."""
    for mesh in meshes(comm, variant):
        model = toy(variant, mesh, np.float32)
        for step in steps(model):
            mesh.ledger.clear()
            model.forward(step)
            expected = forward_calls(mesh.layout, comm.rank, model.config, step, 4)
            assert same(seen(mesh), totals(expected)), mesh.layout
            assert {group for _, group in seen(mesh)} <= {"tp", "cp", "kv"}


# Tensor and sequence parallelism


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def fed(model: Decoder, *lengths: int) -> Step:
    """A step of prompts of `lengths`, new ones each time."""
    return pack([(np.arange(n), model.allocate_cache(n)) for n in lengths], model.sequence_sharding)


@pytest.mark.parametrize("dtype, e", [(np.float32, 4), (np.float64, 8)])
def test_tensor_parallelism_is_two_all_reduces_a_layer_and_one_for_the_embedding(
    comm: MPI.Intracomm, dtype: type, e: int
):
    """Tokens x hidden each; nothing else, in no group."""
    for tp in divisors(comm.size):
        with mesh_of(comm, "llama-gqa", Layout(tp=tp, dp=comm.size // tp)) as mesh:
            model = toy("llama-gqa", mesh, dtype)
            for lengths in ((7, 1, 3), (1,)):
                step = fed(model, *lengths)
                mesh.ledger.clear()
                model.forward(step)
                layers, hidden = model.config.layers, model.config.hidden
                calls = 2 * layers + 1
                payload = calls * sum(lengths) * hidden * e
                wire = calls / 2 * tensor_bytes(tp, sum(lengths), hidden, e)
                assert same(seen(mesh), {("all_reduce", "tp"): (calls, payload, wire)})


def of_the_layers(model: Decoder, step: Step) -> Totals:
    """What the ledger holds of the layers alone, without embedding and head."""
    found: Totals = {}

    def observe(layer: int, _: np.ndarray) -> None:
        if layer == 0:
            model.mesh.ledger.clear()
        if layer == model.config.layers:
            found.update(seen(model.mesh))

    model.forward(step, observe)
    return found


def test_sequence_parallelism_sends_what_tensor_parallelism_sends(comm: MPI.Intracomm):
    """To the byte, summed over the ranks, for any number of tokens: also for fewer than ranks."""
    for tp, divided in product(divisors(comm.size), (False, True)):
        layout = Layout(tp=tp, dp=comm.size // tp, sequence_parallel=divided)
        with mesh_of(comm, "llama-mha", layout) as mesh:
            model = toy("llama-mha", mesh, np.float32)
            layers, hidden = model.config.layers, model.config.hidden
            operations = ("all_gather", "reduce_scatter") if divided else ("all_reduce",)
            for tokens in (1, 2, 5, 16, 17):
                found = of_the_layers(model, fed(model, tokens))
                calls = {key: calls for key, (calls, _, _) in found.items()}
                assert calls == {(operation, "tp"): 2 * layers for operation in operations}
                wire = sum(wire for _, _, wire in found.values())
                together = layers * 4 * (tp - 1) * tokens * hidden * 4
                assert mesh.tp.comm.allreduce(wire) == pytest.approx(together, rel=1e-12)
                if tokens % tp == 0:
                    alone = layers * tensor_bytes(tp, tokens, hidden, 4)
                    assert wire == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("variant", ["gpt_neox-parallel", "phi-normed"])
def test_a_parallel_residual_sends_half(comm: MPI.Intracomm, variant: str):
    """With two norms or one: both partial sums of a layer are completed by the same collective."""
    for tp, divided in product(divisors(comm.size), (False, True)):
        layout = Layout(tp=tp, dp=comm.size // tp, sequence_parallel=divided)
        if tp > tiny_config(variant).heads:
            continue
        with mesh_of(comm, variant, layout) as mesh:
            model = toy(variant, mesh, np.float32)
            layers, hidden = model.config.layers, model.config.hidden
            operations = ("all_gather", "reduce_scatter") if divided else ("all_reduce",)
            for tokens in (1, 5, 16):
                found = of_the_layers(model, fed(model, tokens))
                calls = {key: calls for key, (calls, _, _) in found.items()}
                assert calls == {(operation, "tp"): layers for operation in operations}
                wire = sum(wire for _, _, wire in found.values())
                together = layers * tp * tensor_bytes(tp, tokens, hidden, 4) / 2
                assert mesh.tp.comm.allreduce(wire) == pytest.approx(together, rel=1e-12)


# Flash decoding


def dividing(ranks: int, **layout_options: str) -> list[Layout]:
    """Every cp * tp of `ranks` with flash decoding."""
    return [
        Layout(tp=ranks // cp, cp=cp, flash_decoding=True, **layout_options)  # type: ignore[arg-type]
        for cp in divisors(ranks)
    ]


@pytest.mark.parametrize("merge", DECODE_MERGES)
def test_a_prompt_needs_nothing_of_those_who_divide_the_cache(comm: MPI.Intracomm, merge: str):
    for layout in dividing(comm.size, decode_merge=merge):
        with mesh_of(comm, "llama-mqa", layout) as mesh:
            model = toy("llama-mqa", mesh)
            mesh.ledger.clear()
            model.forward(fed(model, 7, 1, 3))
            allowed = {"tp"} if layout.cp == 1 else {"tp", "cp"}
            assert {group for _, group in seen(mesh)} <= allowed


@pytest.mark.parametrize("variant", ["llama-mqa", "llama-uneven"])
@pytest.mark.parametrize(
    "merge, calls",
    [
        ("reduce-scatter", {"all_gather": 2, "reduce_scatter": 1}),
        ("all-to-all", {"all_gather": 1, "all_to_all": 1}),
        ("all-reduce", {"all_gather": 1, "all_reduce": 2}),
    ],
)
def test_decode_sends_what_is_published_at_every_length(
    comm: MPI.Intracomm, variant: str, merge: str, calls: dict[str, int]
):
    """Ragged batches, one token each and several: all ranks that divide a cache together, and where
    all have as many heads each of them."""
    bytes_of = MERGE_BYTES[merge]
    for layout in dividing(comm.size, decode_merge=merge):
        with mesh_of(comm, variant, layout) as mesh:
            model = toy(variant, mesh, np.float32)
            p, layers, K = mesh.kv.size, model.config.layers, model.config.head_dim
            heads = model.sequence_sharding.heads
            for length in (2, 120):
                lengths = (length, length // 2, 1)
                caches = [model.allocate_cache(n + 4, n) for n in lengths]
                for news in (lengths, (1, 1, 1), (3, 1, 2)):
                    feeds = [(np.arange(n), cache) for n, cache in zip(news, caches, strict=True)]
                    step = pack(feeds, model.sequence_sharding)
                    mesh.ledger.clear()
                    model.forward(step)
                    if step.first_chunks:
                        continue
                    assert {
                        operation: number
                        for (operation, group), (number, _, _) in seen(mesh).items()
                        if group == "kv"
                    } == {operation: layers * number for operation, number in calls.items()}
                    pairs = sum(news) * sum(heads)
                    together = layers * bytes_of(p, pairs, K, 4)
                    found = mesh.kv.comm.allreduce(sent(mesh, "kv"))
                    assert found == pytest.approx(together, rel=1e-12)
                    if layout.cp == 1 and len(set(heads)) == 1:
                        alone = layers * bytes_of(p, pairs // p, K, 4)
                        assert sent(mesh, "kv") == pytest.approx(alone, rel=1e-12)


@pytest.mark.ranks(1)
def test_the_bytes_of_a_large_model_published():
    """Llama 3.1 70B on 32 ranks in bfloat16: four share a key/value head, with two query heads of
    128 each, and gather maximum and denominator in float32, 8 bytes a head."""
    calls = merge_calls("reduce-scatter", 4, 2, 8, 128, 2, statistics=8)
    assert [call.wire for call in calls] == [1536, 192, 1536]
    assert tensor_bytes(32, 1, 8192, 2) == 63_488
    # With one log-sum-exp in bfloat16 in their place:
    assert MERGE_BYTES["reduce-scatter"](4, 2, 128, 2) == 1536 + 48 + 1536
    for merge, bytes_of in MERGE_BYTES.items():
        wire = sum(call.wire for call in merge_calls(merge, 4, 2, 8, 128, 2))
        assert wire == bytes_of(4, 2, 128, 2)


# Context parallelism


@pytest.mark.parametrize("prefill", CP_PREFILLS)
@pytest.mark.parametrize("order", CP_ORDERS)
def test_context_parallelism_sends_what_is_published(comm: MPI.Intracomm, prefill: str, order: str):
    """The same for ring and all-gather, in either order: of each rank where lengths divide, of all
    together where they do not."""
    for cp in divisors(comm.size):
        layout = Layout(tp=comm.size // cp, cp=cp, cp_prefill=prefill, cp_order=order)
        with mesh_of(comm, "llama-mha", layout) as mesh:
            model = toy("llama-mha", mesh, np.float32)
            layers, g, K = model.config.layers, model.kv_heads, model.config.head_dim
            for lengths in ((6 * cp, 2 * cp), (7, 1, 3), (1,)):
                step = fed(model, *lengths)
                mesh.ledger.clear()
                model.forward(step)
                wire = layers * context_bytes(cp, sum(lengths), g, K, 4)
                assert mesh.cp.comm.allreduce(sent(mesh, "cp")) == pytest.approx(cp * wire)
                if all(length % (2 * cp) == 0 for length in lengths):
                    assert sent(mesh, "cp") == wire
                    ring, gathers = (cp - 1, 0) if prefill == "ring" else (0, int(cp > 1))
                    assert mesh.ledger["isendrecv", "cp"].calls == layers * ring
                    assert mesh.ledger["all_gather", "cp"].calls == layers * gathers


@pytest.mark.parametrize("prefill", CP_PREFILLS)
@pytest.mark.parametrize("order", CP_ORDERS)
def test_only_what_a_window_reaches_is_sent(comm: MPI.Intracomm, prefill: str, order: str):
    """Of a block of 8 positions the next block's queries see the last 4, with windows of 5. In
    contiguous order the next block is the next rank's, and nothing goes further than one hop. In
    zigzag it is that of the next rank and, of the blocks on the way back, of the rank before: to
    which it takes the ring as many hops as there are other ranks."""
    cp = comm.size
    with mesh_of(comm, "mistral-window", Layout(cp=cp, cp_prefill=prefill, cp_order=order)) as mesh:
        model = toy("mistral-window", mesh, np.float32)
        layers, reach = model.config.layers, 5 - 1
        position = 2 * model.kv_heads * model.config.head_dim * 4
        pieces = cp if order == "contiguous" else 2 * cp
        step = fed(model, 8 * pieces)
        mesh.ledger.clear()
        model.forward(step)
        crossings = pieces - 1 if order == "contiguous" else pieces - 2
        hops = 1 if order == "contiguous" else (1 + (cp - 1)) / 2
        hops = hops if prefill == "ring" else cp - 1
        rows = crossings * reach * hops
        assert comm.allreduce(sent(mesh, "cp")) == layers * rows * position
        if order == "contiguous":
            is_last = comm.rank == cp - 1
            mine = 0 if is_last else reach * hops
            assert sent(mesh, "cp") == layers * mine * position
        if order == "contiguous" and prefill == "ring":
            assert mesh.ledger["isendrecv", "cp"].calls == (layers if cp > 1 else 0)


@pytest.mark.parametrize("prefill", CP_PREFILLS)
def test_only_what_a_chunk_reaches_is_sent(comm: MPI.Intracomm, prefill: str):
    """Blocks of 8 positions, and chunks of 6 in three of four layers: a block's last positions are
    in a chunk with the first of the next rank's block, or in none. The fourth layer sends all."""
    cp = comm.size
    layout = Layout(cp=cp, cp_prefill=prefill, cp_order="contiguous")
    with mesh_of(comm, "llama4-chunks", layout) as mesh:
        model = toy("llama4-chunks", mesh, np.float32)
        step = fed(model, 8 * cp)
        mesh.ledger.clear()
        model.forward(step)
        starts = [8 * rank for rank in range(1, cp)]  # of the blocks that follow another
        shared = sum(start % 6 for start in starts)  # positions of the chunk before the start
        hops = 1 if prefill == "ring" else cp - 1
        rows = 3 * shared * hops + 8 * cp * (cp - 1)
        position = 2 * model.kv_heads * model.config.head_dim * 4
        assert comm.allreduce(sent(mesh, "cp")) == rows * position


# The choice of tokens, and replicas


def test_a_greedy_token_costs_two_all_gathers_beside_the_forward_pass(comm: MPI.Intracomm):
    """Of a candidate of each rank over tp, and of the ids chosen over cp; in steps in which no
    prompt ends as in all others."""
    requests = [
        Request(index, ids, SamplingParams(max_tokens=4)) for index, ids in enumerate(PROMPTS)
    ]
    for mesh in meshes(comm, "llama-gqa"):
        model = Recorder(toy("llama-gqa", mesh, np.float32))
        mesh.ledger.clear()
        generate(model, requests, limits=SchedulerConfig(chunked_prefill_size=3))
        expected = [
            call
            for step in model.steps
            for calls in (
                forward_calls(mesh.layout, comm.rank, model.config, step, 4),
                choice_calls(mesh.layout, step, 4),
            )
            for call in calls
        ]
        assert same(seen(mesh), totals(expected)), mesh.layout


def test_a_greedy_token_in_figures(comm: MPI.Intracomm):
    """(tp-1) * sequences * (4 bytes of logit + 8 of id) on the wire, and nothing over cp."""
    for tp in divisors(comm.size):
        with mesh_of(comm, "llama-gqa", Layout(tp=tp, dp=comm.size // tp)) as mesh:
            model = toy("llama-gqa", mesh, np.float32)
            mesh.ledger.clear()
            generate(
                model,
                [
                    Request(index, ids, SamplingParams(max_tokens=4))
                    for index, ids in enumerate(PROMPTS)
                ],
            )
            payload = 4 * len(PROMPTS) * 12
            assert seen(mesh)["all_gather", "tp"] == (4, payload, (tp - 1) * payload)
            assert mesh.ledger["all_gather", "cp"].calls == 4 and not sent(mesh, "cp")


@pytest.mark.parametrize(
    "sampling, gathers, broadcasts",
    [
        (SamplingParams(temperature=1), 1, 0),
        (SamplingParams(temperature=1, top_k=3), 1, 1),
        (SamplingParams(temperature=1, top_k=9, min_p=0.1), 1, 1),
        (SamplingParams(temperature=1, top_k=5, top_p=0.5), 1, 1),
        (SamplingParams(temperature=1, top_p=0.5), 2, 1),
    ],
)
def test_a_sampled_token_costs_what_its_filters_need(
    comm: MPI.Intracomm, sampling: SamplingParams, gathers: int, broadcasts: int
):
    for tp in divisors(comm.size):
        with mesh_of(comm, "llama-gqa", Layout(tp=tp, dp=comm.size // tp)) as mesh:
            model = toy("llama-gqa", mesh, np.float32)
            mesh.ledger.clear()
            generate(model, [Request(0, [1, 2, 3], replace(sampling, max_tokens=2))])
            assert mesh.ledger["all_gather", "tp"].calls == 2 * gathers
            assert mesh.ledger["broadcast", "tp"].calls == 2 * broadcasts


def test_replicas_never_meet(comm: MPI.Intracomm):
    for mesh in meshes(comm, "qwen3-mixed"):
        model = toy("qwen3-mixed", mesh)
        requests = [Request(index, [1 + index], SamplingParams(max_tokens=3)) for index in range(9)]
        generate(model, [requests[place] for place in assign_requests(len(requests), mesh)])
        assert {group for _, group in seen(mesh)} <= {"tp", "cp", "kv"}


# docs/costs.md: Llama 3 8B in float32 on 16 ranks, a prompt of 32,768 tokens and then a token

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
LENGTH = 32768
LAYOUTS = {
    "--tp 16": Layout(tp=16),
    "--tp 16 --sequence-parallel": Layout(tp=16, sequence_parallel=True),
    "--tp 16 --flash-decoding": Layout(tp=16, flash_decoding=True),
    "--tp 16 --sequence-parallel --flash-decoding": Layout(
        tp=16, sequence_parallel=True, flash_decoding=True
    ),
    "--cp 16": Layout(cp=16),
    "--cp 16 --cp-prefill all-gather": Layout(cp=16, cp_prefill="all-gather"),
    "--tp 4 --cp 4 --sequence-parallel": Layout(tp=4, cp=4, sequence_parallel=True),
    "--dp 16": Layout(dp=16),
}
# In a layer: the calls of a prompt's step, and of a token's.
CALLS = {
    "--tp 16": ("2 all_reduce", "2 all_reduce"),
    "--tp 16 --sequence-parallel": (
        "2 all_gather, 2 reduce_scatter",
        "2 all_gather, 2 reduce_scatter",
    ),
    "--tp 16 --flash-decoding": ("2 all_reduce", "2 all_gather, 2 all_reduce, 1 reduce_scatter"),
    "--tp 16 --sequence-parallel --flash-decoding": (
        "2 all_gather, 2 reduce_scatter",
        "4 all_gather, 3 reduce_scatter",
    ),
    "--cp 16": ("15 isendrecv", "2 all_gather, 1 reduce_scatter"),
    "--cp 16 --cp-prefill all-gather": ("1 all_gather", "2 all_gather, 1 reduce_scatter"),
    "--tp 4 --cp 4 --sequence-parallel": (
        "2 all_gather, 3 isendrecv, 2 reduce_scatter",
        "4 all_gather, 3 reduce_scatter",
    ),
    "--dp 16": ("", ""),
}
# What a rank sends in a layer, the mean over all ranks, in the prompt's step (MiB) and in the
# token's (KiB); and a rank's weights, cache and residual stream in the prompt's step (MiB).
FIGURES = {
    "--tp 16": ("1,920.0", "60.0", "1,979.5", "1,024.0", "512.0"),
    "--tp 16 --sequence-parallel": ("1,920.0", "60.0", "1,979.5", "1,024.0", "32.0"),
    "--tp 16 --flash-decoding": ("1,920.0", "62.0", "1,979.5", "512.0", "512.0"),
    "--tp 16 --sequence-parallel --flash-decoding": (
        *("1,920.0", "62.0", "1,979.5", "512.0", "32.0"),
    ),
    "--cp 16": ("240.0", "31.9", "30,633.0", "512.0", "32.0"),
    "--cp 16 --cp-prefill all-gather": ("240.0", "31.9", "30,633.0", "512.0", "32.0"),
    "--tp 4 --cp 4 --sequence-parallel": ("432.0", "18.1", "7,659.0", "512.0", "32.0"),
    "--dp 16": ("0.0", "0.0", "30,633.0", "8,192.0", "512.0"),
}


def steps_of(layout: Layout, rank: int, config: ModelConfig) -> tuple[Step, Step]:
    """The steps of the prompt and of the token after it on world rank `rank`, without any arrays
    of a model."""
    _, cp, tp = layout.coordinates(rank)
    sharers = (
        kv_replica_ranks(config, layout.tp, tp)[1] if layout.flash_decoding else range(tp, tp + 1)
    )
    heads = tuple(heads_of(config, layout.tp, kv_replica_rank)[0] for kv_replica_rank in sharers)
    sequence_sharding = SequenceSharding(layout.cp, cp, layout.cp_order, heads, tp - sharers.start)
    cache = KVCache(0, 0, LENGTH + 1, 0, np.dtype(np.float32))
    prompt = pack([(np.zeros(LENGTH, np.int64), cache)], sequence_sharding)
    return prompt, pack([(np.zeros(1, np.int64), cache)], sequence_sharding)


def calls_of_a_layer(layout: Layout, config: ModelConfig) -> tuple[list[list[CollectiveCall]], ...]:
    """Those of every rank, in the prompt's step and in the token's."""
    every = [steps_of(layout, rank, config) for rank in range(layout.world_size)]
    return tuple(
        [layer_calls(layout, rank, config, step, 4, None) for rank, step in enumerate(steps)]
        for steps in zip(*every, strict=True)
    )


def in_words(calls: list[list[CollectiveCall]]) -> str:
    """The calls of a layer in which some rank sends something."""
    sending = [
        together[0] for together in zip(*calls, strict=True) if any(c.wire for c in together)
    ]
    numbers = Counter(call.operation for call in sending)
    return ", ".join(f"{number} {operation}" for operation, number in sorted(numbers.items()))


@pytest.mark.ranks(1)
@pytest.mark.parametrize("flags", LAYOUTS)
def test_the_figures_of_the_readme(flags: str):
    layout, config = LAYOUTS[flags], read_model_config(LLAMA_3_8B, None, "config.json")
    calls = calls_of_a_layer(layout, config)
    assert tuple(map(in_words, calls)) == CALLS[flags]
    prompt, token = (sum(c.wire for of_rank in step for c in of_rank) / 16 for step in calls)
    (weights,) = {weight_bytes(config, layout.tp, rank, 4) for rank in range(layout.tp)}
    (cache,) = {cache_bytes(config, layout, rank, LENGTH, LENGTH, 4) for rank in range(16)}
    tokens = LENGTH // layout.cp
    (residual,) = {residual_bytes(config, layout, rank, tokens, 4) for rank in range(16)}
    in_mib = [f"{n / 2**20:,.1f}" for n in (prompt, weights, cache, residual)]
    row = (in_mib[0], f"{token / 2**10:,.1f}", *in_mib[1:])
    assert row == FIGURES[flags]


@pytest.mark.ranks(1)
def test_costs_page_shows_these_figures():
    lines = COSTS.read_text().splitlines()
    for flags, row in FIGURES.items():
        assert f"| `{flags}` | {' | '.join(row)} |" in lines
