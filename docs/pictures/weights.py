"""Pictures of what ranks hold: a network's shards, and the grid of a layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from svg import Picture, ranges

from mpishard.config.layout import Layout, block, kv_heads_of, query_heads_of
from mpishard.config.weight_sharding import WeightSharding
from mpishard.config.weight_specs import weight_specs
from mpishard.model import sequence_sharding_of
from mpishard.storage.model_dir import read_config

CONFIG = read_config(Path(__file__).parents[2] / "data" / "cpython-4m")
FIELDS = {spec.field: spec for spec in weight_specs(CONFIG) if not spec.layer}
TP2 = WeightSharding(2)

TOKENS, SCALE = 200, 0.18  # pixels for an element
GATHER, X, GATE, HIDDEN, DOWN, PARTIAL, REDUCE, Y = 124, 240, 305, 440, 574, 642, 704, 838

GRID, PROMPT, REQUESTS = Layout(tp=2, cp=2, dp=2), 16, 6
WIDE, TALL, GAP, LEFT, TOP = 200, 186, 12, 20, 112
REPLICA = 2 * WIDE + GAP + 24


def tensor_vs_sequence() -> Picture:
    """The feed-forward network of one layer on two ranks, in both forms."""
    picture = Picture(
        *(900, 754, "Tensor parallelism and sequence parallelism of a feed-forward network"),
        "Two ranks multiply all tokens by their halves of the columns of gate and up, and the "
        "result by the same half of the rows of down, which leaves a partial sum on each. Tensor "
        "parallelism completes it in an all_reduce. Sequence parallelism does an all_gather before "
        "and a reduce_scatter after, so that in between a rank has only its own tokens.",
    )
    _network(picture, 26, "Tensor parallel: --tp 2", sequence=False)
    _network(picture, 384, "Sequence parallel: --tp 2 --sequence-parallel", sequence=True)
    meanings = (
        "whole, the same on both ranks",
        "a rank's own shard",
        "partial sum, one addend of two",
    )
    for x, style, meaning in zip((110, 375, 562), ("whole", "r0", "p0"), meanings, strict=True):
        picture.box(x, 724, 24, 16, style)
        picture.text(x + 32, 737, meaning, "small")
    return picture


def _network(picture: Picture, top: float, heading: str, sequence: bool) -> None:
    rows, foot = (top + 96, top + 234), top + 312
    D, F, N = (slice(0, length) for length in (CONFIG.hidden, CONFIG.ffn, TOKENS))
    collectives = [(REDUCE, 122, "all_reduce", "adds up")]
    if sequence:
        collectives = [(GATHER, 106, "all_gather", "collects")]
        collectives += [(REDUCE, 122, "reduce_scatter", "adds up and splits")]
    picture.text(14, top, heading, "heading")
    for x, span, name, note in collectives:
        picture.box(x, top + 28, span, 246, "group")
        picture.text(x + span / 2, top + 47, name, "red", "middle")
        picture.text(x + span / 2, foot, note, "small soft", "middle")
        picture.each_to_each([(x + 8, y) for y in rows], [(x + span - 9, y) for y in rows])
    for rank, y in enumerate(rows):
        f = FIELDS["gate"].slices(CONFIG, TP2, rank)[0]
        also_f = FIELDS["down"].slices(CONFIG, TP2, rank)[1]
        own, whole, n = f"r{rank}", "whole", block(TOKENS, 2, rank)
        matrices = [
            (X, "x_ND", whole, (N, D), (N, D), "all tokens"),
            (GATE, "gate, up", own, (D, F), (D, f), "column-parallel"),
            (HIDDEN, "hidden_Nf", own, (N, F), (N, f), "its columns"),
            (DOWN, "down", own, (F, D), (also_f, D), "row-parallel"),
            (PARTIAL, "partial_ND", f"p{rank}", (N, D), (N, D), ""),
        ]
        if sequence:
            matrices += [(70, "x_nD", own, (N, D), (n, D), "its tokens")]
            matrices += [(Y, "y_nD", own, (N, D), (n, D), "its tokens")]
        else:
            matrices += [(Y, "y_ND", whole, (N, D), (N, D), "all tokens")]
        for x, name, style, (tall, wide), (part, columns), note in matrices:
            width, height = wide.stop * SCALE, tall.stop * SCALE
            picture.text(x + width / 2, foot, note if rank == 0 else "", "small soft", "middle")
            picture.text(x + width / 2, y - height / 2 - 8, name, "", "middle")
            picture.box(x, y - height / 2, width, height, "absent")
            left, upper = x + columns.start * SCALE, y - height / 2 + part.start * SCALE
            width, height = ((own.stop - own.start) * SCALE for own in (columns, part))
            shape = {GATE: "D × f", DOWN: "f × D"}.get(x, "")
            picture.box(left, upper, width, height, style, shape)
        picture.text(14, y + 5, f"rank {rank}", "strong")
        for x, sign in ((X + 55, "@"), (HIDDEN - 10, "→"), (DOWN - 10, "@"), (DOWN + 57, "→")):
            picture.text(x, y + 5, sign, "strong", "middle")


def rank_grid() -> Picture:
    """The ranks of a layout, and what each of them holds."""
    picture = Picture(
        *(902, 588, f"What each rank of {GRID} holds"),
        "Eight ranks as two replicas of two by two. Ranks of a tp group hold different heads, "
        "columns of the feed-forward network and rows of the vocabulary. Ranks of a cp group hold "
        "the same weights and different tokens. Replicas serve different requests.",
    )
    facts = f"{CONFIG.heads} query heads, {CONFIG.kv_heads} KV heads, feed-forward {CONFIG.ffn}, "
    facts += f"vocabulary {CONFIG.vocab}; a prompt of {PROMPT} tokens, {REQUESTS} requests"
    picture.text(LEFT, 26, f"{GRID}: {GRID.world_size} ranks", "heading")
    picture.text(LEFT, 49, facts, "small soft")
    high = GRID.cp * (TALL + GAP) + 40
    for rank in range(GRID.world_size):
        dp, cp, tp = GRID.coordinates(rank)
        left = LEFT + dp * (REPLICA + 14)
        if cp == tp == 0:
            picture.box(left - 12, TOP - 40, REPLICA, high)
            picture.text(left, TOP - 16, f"replica dp {dp}", "strong")
            requests = f"requests {ranges(range(dp, REQUESTS, GRID.dp))}"
            picture.text(left + REPLICA - 24, TOP - 16, requests, "", "end")
        _rank(picture, left + tp * (WIDE + GAP), TOP + cp * (TALL + GAP), rank)
    for line, (axis, meaning, note) in enumerate(
        (
            ("tp, side by side", "same tokens, other weights: all_reduce of partial sums",
             "Equal colours are equal shares."),
            ("cp, one above the other", "same weights, other tokens: keys and values go round",
             "cache: positions kept of the rank's KV heads"),
            ("dp, the two frames", "same weights, other requests: nothing in the forward pass", ""),
        )
    ):  # fmt: skip
        y = TOP + high - 14 + 20 * line
        picture.text(LEFT - 12, y, axis, "strong small")
        picture.text(LEFT + 170, y, meaning, "small")
        picture.text(LEFT + 570, y, note, "small")
    return picture


def _rank(picture: Picture, x: float, y: float, rank: int) -> None:
    _, cp, tp = GRID.coordinates(rank)
    ffn, rows = (FIELDS[name].slices(CONFIG, TP2, tp)[0] for name in ("gate", "embedding"))
    sharding = sequence_sharding_of(CONFIG, GRID, cp, tp)
    tokens = sharding.tokens(0, PROMPT)[cp]
    shares: list[tuple[str, slice | np.ndarray, int, int]] = [
        ("heads", query_heads_of(CONFIG, GRID.tp, tp), CONFIG.heads, tp),
        ("KV heads", kv_heads_of(CONFIG, GRID.tp, tp), CONFIG.kv_heads, tp),
        ("ffn", ffn, CONFIG.ffn, tp),
        ("vocab", rows, CONFIG.vocab, tp),
        ("tokens", tokens, PROMPT, 2 + cp),
        ("cache", tokens[sharding.cached_here(tokens)], PROMPT, 2 + cp),
    ]
    picture.box(x, y, WIDE, TALL)
    picture.text(x + 10, y + 24, f"rank {rank}", "strong")
    picture.text(x + WIDE - 10, y + 24, f"cp {cp}, tp {tp}", "small soft", "end")
    for line, (name, held, total, colour) in enumerate(shares):
        cells = total if total <= PROMPT else GRID.tp
        own = np.isin(np.arange(cells) * total // cells, np.arange(total)[held])
        owners = [colour if mine else None for mine in own]
        picture.text(x + 10, y + 50 + 24 * line, f"{name} {ranges(held)}", "small")
        picture.strip(x + WIDE - 66, y + 39 + 24 * line, 56, 13, owners)
