"""Picture of expert parallelism: tokens go to the ranks of their experts and come back."""

from __future__ import annotations

import numpy as np
from svg import Picture

from mpishard.arithmetic.routing import Router
from mpishard.config.layout import block
from mpishard.parallel.expert import PhysicalExperts

RANKS, EXPERTS, TOKENS, TOP_K = 4, 8, 4, 2  # tokens of each rank
PAIR, PITCH, TOP = 8, 126, 128  # pixels for a pair that is sent, and from rank to rank
SENT, CAME, DONE, BACK = 146, 336, 560, 750


def expert_dispatch() -> Picture:
    """Tokens of four ranks, their experts, and the way back."""
    picture = Picture(
        *(900, 654, "Expert parallelism: dispatch to the experts' ranks and back"),
        "Each rank routes its own tokens to two of eight experts. One all_to_all takes every token "
        "to the ranks of its experts, which compute, and a second one brings the outputs back to "
        "the token's rank, where they are summed with the router's weights.",
    )
    rng = np.random.RandomState(5)  # its numbers are the same in all versions
    logits = rng.randint(0, 40, (RANKS * TOKENS, EXPERTS)) / 10
    logits[:, 1] += 1.5  # a popular expert
    topk_ids_NA, _ = Router(TOP_K).route(logits)
    held = [range(EXPERTS)[block(EXPERTS, RANKS, rank)] for rank in range(RANKS)]
    experts = PhysicalExperts.of(held)
    physical_ids_NA = experts.physical_ids(topk_ids_NA, np.ones((RANKS * TOKENS, TOP_K), bool), 0)
    each = np.split(physical_ids_NA, RANKS)  # of the tokens of each rank
    counts_RZ = np.stack([np.bincount(ids_nA.flat, minlength=EXPERTS) for ids_nA in each])
    of_ranks = [experts.of_rank(rank) for rank in range(RANKS)]
    counts = np.stack([counts_RZ[:, own].sum(axis=1) for own in of_ranks], axis=1)

    facts = f"{EXPERTS} experts, {EXPERTS // RANKS} on each rank; each token goes to {TOP_K}"
    picture.text(20, 26, f"Expert parallelism: --ep {RANKS} on {RANKS} ranks", "heading")
    picture.text(20, 49, f"{facts}; {TOKENS} tokens on each rank", "small soft")
    for x, name, style in (
        (72, "router", "strong"),
        ((SENT + CAME) / 2 + 6, "all_to_all: dispatch", "red"),
        ((CAME + DONE) / 2 + 6, "experts", "strong"),
        ((DONE + BACK) / 2 + 6, "all_to_all: combine", "red"),
        (830, "weighted sum", "strong"),
    ):
        picture.text(x, 92, name, style, "middle")
    before, after = (PAIR * (counts.cumsum(axis) - counts) for axis in (1, 0))
    for here, there in np.argwhere(counts).tolist():
        near = TOP + here * PITCH + int(before[here, there])
        far = TOP + there * PITCH + int(after[here, there])
        height, style = PAIR * int(counts[here, there]), f"r{here}"
        picture.band((SENT, near), (CAME, far), height, style)
        picture.band((DONE + 12, far), (BACK + 12, near), height, style)
    for rank, own in enumerate(of_ranks):
        y = TOP + rank * PITCH
        for x in (20, CAME + 8, BACK + 18):
            picture.text(x, y - 8, f"rank {rank}", "strong")
        for line, token in enumerate(range(rank * TOKENS, (rank + 1) * TOKENS)):
            chosen = ", ".join(map(str, topk_ids_NA[token]))
            for x, text in ((20, f"token {token} → {chosen}"), (BACK + 18, f"token {token}")):
                picture.box(x, y + line * 16, 120, 16, f"r{rank}")
                picture.text(x + 8, y + line * 16 + 13, text, "tiny")
        picture.box(CAME + 6, y - 2, DONE - CAME, max(PAIR * counts[:, rank].sum(), 52) + 4)
        for line, physical in enumerate(range(EXPERTS)[own]):
            senders = np.repeat(np.arange(RANKS), counts_RZ[:, physical])
            text = f"expert {experts.physical_to_logical_Z[physical]}: {len(senders)} tokens"
            picture.text(CAME + 16, y + 18 + 26 * line, text, "small")
            for place, source in enumerate(senders):
                picture.box(CAME + 136 + 10 * place, y + 7 + 26 * line, 9, 13, f"r{source}")
    foot, load = TOP + RANKS * PITCH + 8, ", ".join(map(str, counts.sum(axis=0)))
    meaning = "A band: (token, expert) pairs, in the colour of the token's rank"
    picture.text(20, foot, meaning, "small")
    picture.text(500, foot, f"Pairs that ranks 0 to {RANKS - 1} compute: {load}", "small")
    return picture
