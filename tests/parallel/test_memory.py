"""What each rank keeps: the bytes of its weights, its cache and its residual stream, held to closed
forms on every layout, exactly."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from itertools import accumulate, product

import numpy as np
import pytest
from mpi4py import MPI
from tiny_models import tiny_config
from toys import mesh_of, meshes, toy

from mpishard.config.layout import (
    CP_ORDERS,
    Layout,
    block_sizes,
    kv_heads_of,
    kv_replica_ranks,
    query_heads_of,
)
from mpishard.config.model_config import ModelConfig
from mpishard.model import Decoder, HiddenStateHook
from mpishard.sequences.step import pack

pytestmark = pytest.mark.ranks

HEADS = ("llama-mha", "llama-gqa", "llama-mqa", "llama-uneven")  # 8:8, 8:4, 8:1 and 12:3

# Closed forms, of which D, K, h, g, f and v are the dimensions as everywhere: lower case is this
# rank's share.


def weight_bytes(config: ModelConfig, tp: int, rank: int, itemsize: int) -> int:
    """The weights of tensor-parallel rank `rank` of `tp`: 1/tp of every matrix, as nearly as heads
    and rows divide, and all of the norms and of the biases that are added after the sum."""
    D, K = config.hidden, config.head_dim
    h, g = heads_of(config, tp, rank)
    f, v = block_sizes(config.ffn, tp)[rank], block_sizes(config.vocab, tp)[rank]
    attention = D * K * (2 * h + 2 * g)
    attention += K * (h + 2 * g) if config.qkv_bias else 0
    attention += D if config.o_bias else 0
    attention += 2 * K if config.qk_norm else 0
    ffn = 3 * D * f
    ffn += 2 * f + D if config.mlp_bias else 0
    norms = 2 * D
    embedding_and_head = D * v * (1 if config.tied else 2)
    return itemsize * (config.layers * (attention + ffn + norms) + embedding_and_head + D)


def cache_bytes(
    config: ModelConfig, layout: Layout, rank: int, first: int, length: int, itemsize: int
) -> int:
    """The cache of one sequence of `length` positions on world rank `rank`, `first` of them fed in
    the first step: keys and values of its heads, at the positions it keeps."""
    _, g = heads_of(config, layout.tp, layout.coordinates(rank)[2])
    positions = positions_kept(config, layout, rank, first, length)
    return 2 * config.layers * g * positions * config.head_dim * itemsize


def residual_bytes(
    config: ModelConfig, layout: Layout, rank: int, tokens: int, itemsize: int
) -> int:
    """The residual stream on world rank `rank`, of `tokens` that its cp rank computes: all of them,
    or a block of them with sequence parallelism."""
    tp_rank = layout.coordinates(rank)[2]
    rows = block_sizes(tokens, layout.tp)[tp_rank] if layout.sequence_parallel else tokens
    return rows * config.hidden * itemsize


def heads_of(config: ModelConfig, tp: int, rank: int) -> tuple[int, int]:
    """The numbers of query and key/value heads of tensor-parallel rank `rank` of `tp`."""
    h, g = query_heads_of(config, tp, rank), kv_heads_of(config, tp, rank)
    return h.stop - h.start, g.stop - g.start


def positions_kept(config: ModelConfig, layout: Layout, rank: int, first: int, length: int) -> int:
    """How many positions of a sequence world rank `rank` keeps, counted one by one."""
    _, cp_rank, tp_rank = layout.coordinates(rank)
    ranks = range(tp_rank, tp_rank + 1)
    if layout.flash_decoding:
        ranks = kv_replica_ranks(config, layout.tp, tp_rank)[1]
    kept = Counter(keepers(layout, len(ranks), first, length))
    return kept[cp_rank, tp_rank - ranks.start]


def keepers(layout: Layout, sharers: int, first: int, length: int) -> Iterator[tuple[int, int]]:
    """For each position the cp rank that computes its token, and which of the `sharers` of a
    key/value head keeps it there."""
    contiguous = layout.cp_order == "contiguous"
    pieces = layout.cp if contiguous else 2 * layout.cp
    ends = list(accumulate(block_sizes(first, pieces)))
    for position in range(length):
        turn = position // layout.cp_kv_cache_interleave_size
        cp_rank = turn % layout.cp
        if position < first:
            piece = bisect_right(ends, position)
            cp_rank = piece if contiguous else min(piece, pieces - 1 - piece)
        yield cp_rank, turn // layout.cp % sharers


# Weights


def arrays_of(part: object) -> dict[int, np.ndarray]:
    """The arrays within a model, each once."""
    if isinstance(part, np.ndarray):
        return {id(part): part}
    parts: list[object] = []
    if isinstance(part, Decoder):
        parts = [part.embedding, part.head, part.norm, *part.layers]
    elif is_dataclass(part):
        parts = [getattr(part, field.name) for field in fields(part)]
    return {key: array for one in parts for key, array in arrays_of(one).items()}


@pytest.mark.parametrize("variant", [*HEADS, "llama-bias", "qwen2-tied", "qwen3-bias"])
def test_weights(comm: MPI.Intracomm, variant: str):
    config = tiny_config(variant)
    for mesh in meshes(comm, variant):
        arrays = arrays_of(toy(variant, mesh, np.float32)).values()
        expected = weight_bytes(config, mesh.tp.size, mesh.tp.rank, 4)
        assert sum(array.nbytes for array in arrays) == expected, mesh.layout


def test_what_is_cut_is_divided_evenly():
    """Where everything divides, the cut weights of a rank are 1/tp to the byte, and beyond one rank
    for each key/value head, queries, feed-forward and vocabulary still are."""
    config = tiny_config("llama-mha")
    config = replace(config, heads=8, kv_heads=4, ffn=48, vocab=64)
    whole = (2 * config.layers + 1) * config.hidden  # norms, which every rank has
    one = weight_bytes(config, 1, 0, 1) - whole
    kv = 2 * config.layers * config.kv_heads * config.head_dim * config.hidden
    for tp in (1, 2, 4):
        assert {weight_bytes(config, tp, rank, 1) for rank in range(tp)} == {one // tp + whole}
    assert {weight_bytes(config, 8, rank, 1) for rank in range(8)} == {
        (one - kv) // 8 + kv // 4 + whole
    }


# Cache


@pytest.mark.parametrize("variant", HEADS)
def test_caches(comm: MPI.Intracomm, variant: str):
    """Keys and values of every position lie on one rank of those that divide a head's cache, and
    nowhere is room for more."""
    for mesh in meshes(comm, variant):
        model = toy(variant, mesh)
        for first, length in ((1, 1), (1, 50), (2, 3), (7, 50), (43, 50), (50, 50)):
            cache = model.allocate_cache(length, first)
            expected = cache_bytes(model.config, mesh.layout, comm.rank, first, length, 8)
            assert cache.k.nbytes + cache.v.nbytes == expected, mesh.layout
            assert mesh.kv.comm.allreduce(len(cache.positions)) == length


@pytest.mark.parametrize("variant", HEADS[1:])
@pytest.mark.parametrize("interleave_size", [1, 3, 16])
def test_flash_decoding_divides_the_cache_by_the_ranks_that_share_a_head(
    comm: MPI.Intracomm, variant: str, interleave_size: int
):
    """Within one interleave block of even, whatever the length."""
    layout = Layout(tp=comm.size, flash_decoding=True, cp_kv_cache_interleave_size=interleave_size)
    with mesh_of(comm, variant, layout) as mesh:
        model, sharers = toy(variant, mesh), mesh.kv.size
        for length in (1, 5, 48, 61, 200):
            rooms = mesh.kv.comm.allgather(len(model.allocate_cache(length).positions))
            assert sum(rooms) == length
            assert max(rooms) - min(rooms) <= interleave_size
            if length % (interleave_size * sharers) == 0:
                assert set(rooms) == {length // sharers}


@pytest.mark.parametrize("order", CP_ORDERS)
@pytest.mark.parametrize("interleave_size", [1, 3])
def test_context_parallelism_divides_the_cache(
    comm: MPI.Intracomm, order: str, interleave_size: int
):
    """A prompt evenly, and what follows within one interleave block of even."""
    layout = Layout(cp=comm.size, cp_order=order, cp_kv_cache_interleave_size=interleave_size)
    with mesh_of(comm, "llama-mha", layout) as mesh:
        model = toy("llama-mha", mesh)
        for first, length in product((1, 16, 45, 190), (1, 200)):
            rooms = comm.allgather(len(model.allocate_cache(length, min(first, length)).positions))
            assert sum(rooms) == length
            assert max(rooms) - min(rooms) <= interleave_size + 1


def test_both_divide_one_cache(comm: MPI.Intracomm):
    """cp times G ranks keep a part each, one of as many as there are, of one key/value head."""
    for cp in (cp for cp in range(1, comm.size + 1) if comm.size % cp == 0):
        layout = Layout(tp=comm.size // cp, cp=cp, flash_decoding=True)
        with mesh_of(comm, "llama-mqa", layout) as mesh:
            room = len(toy("llama-mqa", mesh).allocate_cache(480, 240).positions)
            assert mesh.kv.size == comm.size and room == 480 // comm.size


def test_a_cache_fed_to_its_end_is_full(comm: MPI.Intracomm):
    """A prompt, the next part of it, and single tokens: what is kept is what there is room for,
    on every rank, and all of it together is the sequence."""
    for mesh in meshes(comm, "llama-gqa"):
        model = toy("llama-gqa", mesh)
        length, first = 27, 13
        cache = model.allocate_cache(length, first)
        for new in (first, 8, 1, 5):
            model.forward(pack([(np.ones(new, np.int64), cache)], model.sequence_sharding))
        assert cache.num_local == len(cache.positions) == cache.v.shape[2]
        kept = [position for at in mesh.kv.comm.allgather(cache.positions) for position in at]
        assert sorted(kept) == list(range(length)), mesh.layout


@pytest.mark.parametrize("variant", ["llama-dynamic-old", "mistral-dynamic-new"])
def test_rotary_frequencies_of_the_length_leave_the_cache_divided(
    comm: MPI.Intracomm, variant: str
):
    """A sequence is fed anew, at once, whenever its rotary frequencies change: there is room for
    that at every length, and little more than for the longest."""
    config = tiny_config(variant)
    start, length = config.rope.original_positions, 200
    for mesh in meshes(comm, variant):
        layout = mesh.layout
        room = len(toy(variant, mesh).allocate_cache(length, start).positions)
        needed = max(
            positions_kept(config, layout, comm.rank, once, once)
            for once in (*range(start + 1, length, 20), length)
        )
        assert needed <= room <= needed + 4 * layout.cp * layout.cp_kv_cache_interleave_size, layout


# Residual stream


@pytest.mark.parametrize("variant", ["llama-mha", "llama-gqa"])
def test_residual_streams(comm: MPI.Intracomm, variant: str):
    """Every layer's, as an observer of the forward pass sees it: of ragged prompts, and of fewer
    tokens than ranks."""
    for mesh in meshes(comm, variant):
        model = toy(variant, mesh, np.float32)
        layers, hidden = model.config.layers, model.config.hidden
        caches = [model.allocate_cache(24, first) for first in (17, 1, 4)]
        for lengths in ((17, 1, 4), (1, 2)):
            feeds = [
                (np.ones(n, np.int64), cache) for n, cache in zip(lengths, caches, strict=False)
            ]
            step = pack(feeds, model.sequence_sharding)
            seen: list[int] = []
            model.forward(step, observing(seen))
            tokens = len(step.global_index[mesh.cp.rank])
            expected = residual_bytes(model.config, mesh.layout, comm.rank, tokens, 4)
            assert seen == [expected] * (layers + 1), mesh.layout
            copies = 1 if mesh.layout.sequence_parallel else mesh.tp.size
            together = comm.allreduce(expected)
            assert together == mesh.dp.size * copies * sum(lengths) * hidden * 4


def observing(seen: list[int]) -> HiddenStateHook:
    """Adds to `seen` the bytes of every layer's residual stream."""
    return lambda _, x_nD: seen.append(x_nD.nbytes)
