"""Pictures of attention over several ranks: zigzag order and the ring, flash decoding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from svg import Picture, ranges
from weights import CONFIG

from mpishard.config.layout import CP_ORDERS, Layout, kv_replica_ranks, query_heads_of
from mpishard.model import sequence_sharding_of
from mpishard.sequences.step import SequenceSharding

RANKS, POSITIONS = 4, 16
COLUMN, ROW = 205, 54  # of the ring

FLASH, SHARED = Layout(tp=4, flash_decoding=True), replace(CONFIG, kv_heads=2)
CACHED, LEFT, PITCH, WIDE = 12, 186, 182, 152
QUERIES, GATHER, ALL, CACHE, ATTEND, MERGE, DONE = 92, 128, 226, 290, 340, 404, 556


def zigzag_ring() -> Picture:
    """Who has which positions of a prompt, and the way of the keys."""
    picture = Picture(
        *(900, 624, "Context parallelism: zigzag order and ring attention"),
        "With contiguous blocks the rank that has the last tokens of a prompt has most keys to "
        "attend to; in zigzag order all ranks have equally many. Keys and values then go round the "
        "ranks, one neighbour a hop, until every rank's queries have met all of them.",
    )
    for order, left in zip(CP_ORDERS, (20, 470), strict=True):
        parts = SequenceSharding(cp=RANKS, order=order).tokens(0, POSITIONS)
        owners = [rank for p in range(POSITIONS) for rank in range(RANKS) if p in parts[rank]]
        picture.text(left, 26, f"{order}: --cp {RANKS}", "heading")
        picture.text(left, 50, "positions of the prompt, by the rank that has them", "small soft")
        picture.strip(left, 60, 400, 28, owners)
        for position in range(POSITIONS):
            picture.text(left + 25 * position + 12.5, 79, position, "small", "middle")
        picture.text(left, 116, "causal work: (query, key) pairs", "small soft")
        for rank, part in enumerate(parts):
            y, work = 126 + 28 * rank, _pairs(part, np.arange(POSITIONS))
            picture.text(left, y + 15, f"rank {rank}", "strong small")
            picture.box(left + 54, y, work * 5, 20, f"r{rank}")
            picture.text(left + 62 + work * 5, y + 15, work, "small")
    _ring(picture, SequenceSharding(cp=RANKS).tokens(0, POSITIONS), 330)
    return picture


def _pairs(queries: np.ndarray, keys: np.ndarray) -> int:
    """How many keys the queries see, all queries together."""
    return int((keys <= queries[:, np.newaxis]).sum())


def _ring(picture: Picture, parts: list[np.ndarray], top: float) -> None:
    picture.text(20, top - 52, "ring attention, zigzag", "heading")
    picture.text(20, top - 28, "whose keys and values each rank's queries meet", "small soft")
    for hop, rank in np.ndindex(RANKS, RANKS):
        x, y, source = 92 + hop * COLUMN, top + 14 + rank * ROW, (rank - hop) % RANKS
        if rank == 0:
            title = f"after hop {hop}" if hop else "first: its own"
            picture.text(x + 68, top, title, "strong small", "middle")
        if hop == 0:
            picture.text(20, y + 26, f"rank {rank}", "strong")
        else:
            sender = top + 35 + (rank - 1) % RANKS * ROW
            picture.path([(x - COLUMN + 140, sender), (x - 5, y + 21)])
        picture.box(x, y, 136, 42, f"r{source}")
        picture.text(x + 68, y + 18, f"keys {ranges(parts[source])}", "small", "middle")
        pairs = f"{_pairs(parts[rank], parts[source])} pairs"
        picture.text(x + 68, y + 34, pairs, "small", "middle")
    foot = top + 30 + RANKS * ROW
    picture.text(262, foot, "isendrecv", "red small", "middle")
    picture.text(318, foot, "to the next rank, the last to the first,", "small")
    picture.text(318, foot + 18, "while attention to the keys that are here runs", "small")


def flash_decoding() -> Picture:
    """Ranks that share a key/value head divide its cache by position."""
    picture = Picture(
        *(900, 600, f"Flash decoding: {FLASH} of a model with {SHARED.kv_heads} key/value heads"),
        "Two ranks share each key/value head and keep every other position of its cache. Their "
        "queries are gathered, each rank attends to its own positions for all of them, and the "
        "partial outputs are weighted by their log-sum-exps, added and scattered.",
    )
    facts = f"{SHARED.heads} query heads, {SHARED.kv_heads} KV heads: two ranks share a KV head"
    picture.text(20, 26, "Flash decoding: --tp 4 --flash-decoding", "heading")
    picture.text(20, 49, f"{facts}; a decode step after {CACHED} positions", "small soft")
    for y, name, note in (
        (QUERIES, "q_NhK", "a rank's own query heads"),
        (ALL, "q_WHK", "the group's query heads"),
        (CACHE, "KV cache", "positions that it keeps"),
        (ATTEND, "attend", "to these positions alone"),
        (DONE, "out_NhY", "a rank's own query heads"),
    ):
        picture.text(20, y + 8, name, "strong")
        picture.text(20, y + 25, note, "small soft")
    for rank in range(FLASH.tp):
        _decode(picture, LEFT + rank * PITCH, rank)
    return picture


def _decode(picture: Picture, x: float, rank: int) -> None:
    head, sharers = kv_replica_ranks(SHARED, FLASH.tp, rank)
    sharding = sequence_sharding_of(SHARED, FLASH, 0, rank)
    kept = np.arange(CACHED)[sharding.cached_here(np.arange(CACHED))]
    queries = [np.r_[query_heads_of(SHARED, FLASH.tp, sharer)] for sharer in sharers]
    everyones = [(q, owner) for owner, own in zip(sharers, queries, strict=True) for q in own]
    own = [(q, f"r{rank}") for q, owner in everyones if owner == rank]
    for y, heads in (
        (QUERIES, own),
        (ALL, [(q, f"r{owner}") for q, owner in everyones]),
        (ATTEND, [(q, f"p{rank}") for q, _ in everyones]),
        (DONE, own),
    ):
        for place, (q, style) in enumerate(heads):
            picture.box(x + WIDE / 2 + 34 * (place - len(heads) / 2), y, 34, 24, style, f"h{q}")
    picture.text(x, QUERIES - 14, f"rank {rank}", "strong")
    picture.text(x + WIDE, QUERIES - 14, f"KV head {head}", "small soft", "end")
    picture.strip(x, CACHE, WIDE, 20, [rank if p in kept else None for p in range(CACHED)])
    picture.text(x + WIDE / 2, CACHE + 35, ranges(kept), "tiny soft", "middle")
    picture.text(x + WIDE / 2, ATTEND + 43, "partial_WHY, lse_WH", "small", "middle")
    if rank != sharers[0]:
        return
    middles = [x + place * PITCH + WIDE / 2 for place in range(len(sharers))]
    width = (len(sharers) - 1) * PITCH + WIDE
    for y, height in ((GATHER, 82), (MERGE, 136)):
        picture.box(x, y, width, height, "group")
        starts, stops = ([(m, y + height - up) for m in middles] for up in (54, 6))
        picture.each_to_each(starts, stops)
    for y, text, style in (
        (GATHER + 20, "all_gather", "red"),
        (MERGE + 20, "all_gather of lse_WH", "red"),
        (MERGE + 44, "partial_WHY · exp(lse_rank − lse_all)", "small"),
        (MERGE + 66, "reduce_scatter", "red"),
    ):
        picture.text(x + width / 2, y, text, style, "middle")
