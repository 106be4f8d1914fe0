"""Context parallelism: the tokens of each sequence divided over the ``cp`` ranks of a replica.

Every cp rank has the whole weights of its tensor-parallel coordinate and works on its own tokens
alone, up to attention, where a query needs the keys and values of all earlier tokens. For
sequences that begin in this step those are the step's own, and meet the queries in one of two ways:

ring        each rank's keys and values go round the ranks, one neighbour a hop, while attention to
            those of the last hop hides the way (Liu et al. 2023, arXiv 2310.01889):
            send_receive(cp), cp - 1 times at most
gathered    all_gather(cp) of keys and values together (Llama 3: arXiv 2407.21783, section 3.3.2)

A sequence that goes on has its keys and values in the cache, where they stay: flash decoding.

whole       x_ND of each cp rank -> all_gather(cp) -> x_WD, in the order of the sequences
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mpishard.arithmetic.attention import attend, merge
from mpishard.arithmetic.packed import Segment, Step
from mpishard.communication.collectives import all_gather, send_receive
from mpishard.communication.mesh import Group, Mesh
from mpishard.parallel.heads import Heads

# (heads, step, mesh, out_NhV, lse_Nh), of which the last two are filled in
Prefill = Callable[[Heads, Step, Mesh, np.ndarray, np.ndarray], None]


def ring(heads: Heads, step: Step, mesh: Mesh, out_NhV: np.ndarray, lse_Nh: np.ndarray) -> None:
    """Attention within the sequences that begin in this step, their keys and values going round."""
    cp, fresh, window = mesh.cp, step.fresh, heads.window
    here = _own(heads, fresh, cp.rank)
    for segment in fresh:
        out_NhV[segment.new], lse_Nh[segment.new] = 0, -np.inf  # attention over no keys
    for hop in range(cp.size):
        leaving = here.only(_needed(fresh, cp, (cp.rank - hop) % cp.size, hop + 1, window))
        coming = _needed(fresh, cp, (cp.rank - hop - 1) % cp.size, hop + 1, window)
        arriving = send_receive(
            leaving.kv_cgTK if leaving.rows else None,
            cp,
            to=(cp.rank + 1) % cp.size,
            shape=leaving.shape(coming) if any(map(len, coming)) else None,
            source=(cp.rank - 1) % cp.size,
            dtype=leaving.kv_cgTK.dtype,
        )
        for segment, kv_cgTK, at_T in zip(fresh, here.each(), here.at, strict=True):
            at_S = segment.tokens[cp.rank]
            for mine, kv_c1TK in _by_head(segment.new, heads.q_NhK.shape[1], kv_cgTK):
                keys = *_keys_and_values(kv_c1TK, heads), at_T
                part = attend(heads.q_NhK[mine], at_S, *keys, heads.scale, window)
                out_NhV[mine], lse_Nh[mine] = merge(out_NhV[mine], lse_Nh[mine], *part)
                arriving.progress()
        received = arriving.wait()
        here = Keys(leaving.kv_cgTK[:, :, :0] if received is None else received, coming)


def gathered(heads: Heads, step: Step, mesh: Mesh, out_NhV: np.ndarray, lse_Nh: np.ndarray) -> None:
    """Attention within the sequences that begin in this step, all keys and values gathered."""
    cp, fresh, window = mesh.cp, step.fresh, heads.window
    own = _own(heads, fresh, cp.rank)
    sent = [_needed(fresh, cp, rank, 1, window) for rank in range(cp.size)]
    sizes = [sum(map(len, at)) for at in sent]
    all_cgTK = all_gather(own.only(sent[cp.rank]).kv_cgTK, cp, axis=2, sizes=sizes)
    blocks = np.split(all_cgTK, np.cumsum(sizes)[:-1], axis=2)
    keys = [Keys(kv_cgTK, at) for kv_cgTK, at in zip(blocks, sent, strict=True)]
    keys[cp.rank] = own  # with what no other rank needs
    for place, segment in enumerate(fresh):
        order = np.argsort(np.concatenate([one.at[place] for one in keys]))
        kv_cgTK = np.concatenate([one.each()[place] for one in keys], axis=2)[:, :, order]
        at_T = np.concatenate([one.at[place] for one in keys])[order]
        new, at_S = segment.new, segment.tokens[cp.rank]
        out_NhV[new], lse_Nh[new] = attend(
            heads.q_NhK[new], at_S, *_keys_and_values(kv_cgTK, heads), at_T, heads.scale, window
        )


PREFILLS: dict[str, Prefill] = {"ring": ring, "all-gather": gathered}


def whole(x_ND: np.ndarray, places: Sequence[np.ndarray], mesh: Mesh) -> np.ndarray:
    """The rows of all cp ranks, each at its place: (W, D). `places` are those of each rank's."""
    rows_WD = all_gather(x_ND, mesh.cp, sizes=[len(place) for place in places])
    x_WD = np.empty_like(rows_WD)
    x_WD[np.concatenate(places)] = rows_WD
    return x_WD


@dataclass(frozen=True)
class Keys:
    """Keys and values, (2, g, T, K), or latent ones, (1, g, T, K), of some positions `at` of each
    of several sequences, which follow each other on the axis T."""

    kv_cgTK: np.ndarray
    at: list[np.ndarray]

    @property
    def rows(self) -> int:
        """The number of positions."""
        return self.kv_cgTK.shape[2]

    def shape(self, at: list[np.ndarray]) -> tuple[int, ...]:
        """The shape of the keys and values of other positions."""
        c, g, _, K = self.kv_cgTK.shape
        return c, g, sum(map(len, at)), K

    def only(self, at: list[np.ndarray]) -> Keys:
        """Those of the positions `at`, which are among these."""
        if all(len(some) == len(all_) for some, all_ in zip(at, self.at, strict=True)):
            return self
        masks = [np.isin(all_, some) for some, all_ in zip(at, self.at, strict=True)]
        return Keys(self.kv_cgTK[:, :, np.concatenate(masks)], at)

    def each(self) -> list[np.ndarray]:
        """The keys and values of each sequence."""
        return np.split(self.kv_cgTK, np.cumsum([len(at_T) for at_T in self.at])[:-1], axis=2)


def _own(heads: Heads, fresh: list[Segment], rank: int) -> Keys:
    """This rank's keys and values of the sequences that begin."""
    both = [heads.k_NgK] if heads.latent else [heads.k_NgK, heads.v_NgV]
    parts = [np.stack([x[s.new] for x in both]).transpose(0, 2, 1, 3) for s in fresh]
    return Keys(np.concatenate(parts, axis=2), [segment.tokens[rank] for segment in fresh])


def _keys_and_values(kv_cgTK: np.ndarray, heads: Heads) -> tuple[np.ndarray, np.ndarray]:
    """The two of them: ``(k_gTK, v_gTV)``."""
    return kv_cgTK[0], kv_cgTK[-1][..., : heads.v_NgV.shape[2]]


def _by_head(
    new: slice, heads: int, kv_cgTK: np.ndarray
) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
    """For each key/value head the place of its queries among those of all tokens and `heads`, and
    its keys and values: pieces of work between which messages can move on."""
    kv_heads = kv_cgTK.shape[1]
    each = heads // kv_heads
    for head in range(kv_heads):
        yield (new, slice(head * each, (head + 1) * each)), kv_cgTK[:, head : head + 1]


def _needed(
    fresh: list[Segment], cp: Group, source: int, hop: int, window: int | None
) -> list[np.ndarray]:
    """The positions of rank `source`'s keys, for each sequence, that go on to the rank `hop` places
    behind it, because that one or one further on needs them.

    Without a window that is all of them: causality would spare some of them a part of the way, but
    some rank would have as much to send as before, and the others would wait for it.
    """
    further = [(source + step) % cp.size for step in range(hop, cp.size)]
    needed = []
    for segment in fresh:
        at_T = segment.tokens[source]
        if window is None or not further:
            needed.append(at_T if further else at_T[:0])
            continue
        seen_T = np.zeros(len(at_T), bool)
        for rank in further:
            # Of all queries the first one at or after a key is the nearest to it.
            at_S = np.append(segment.tokens[rank], np.iinfo(np.int64).max)
            seen_T |= at_S[np.searchsorted(at_S, at_T)] - at_T < window
        needed.append(at_T[seen_T])
    return needed
