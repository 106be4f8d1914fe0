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

from mpishard.arithmetic.attention import attend, merge_attn_states
from mpishard.communication.collectives import all_gather, isendrecv
from mpishard.communication.mesh import Group, Mesh
from mpishard.parallel.qkv import QKV
from mpishard.sequences.step import Segment, Step

# (heads, step, mesh, out_NhV, lse_Nh), of which the last two are filled in
Prefill = Callable[[QKV, Step, Mesh, np.ndarray, np.ndarray], None]


def ring_attention(
    qkv: QKV, step: Step, mesh: Mesh, out_NhV: np.ndarray, lse_Nh: np.ndarray
) -> None:
    """Attention within the sequences that begin in this step, their keys and values going round."""
    cp, first_chunks, window = mesh.cp, step.first_chunks, qkv.window
    here = _local_kv(qkv, first_chunks, cp.rank)
    for segment in first_chunks:
        out_NhV[segment.token_slice], lse_Nh[segment.token_slice] = (
            0,
            -np.inf,
        )  # attention over no keys
    for hop in range(cp.size):
        leaving = here.only(
            _needed_downstream(first_chunks, cp, (cp.rank - hop) % cp.size, hop + 1, window)
        )
        coming = _needed_downstream(
            first_chunks, cp, (cp.rank - hop - 1) % cp.size, hop + 1, window
        )
        arriving = isendrecv(
            leaving.kv_cgTK if leaving.rows else None,
            cp,
            to=(cp.rank + 1) % cp.size,
            shape=leaving.shape(coming) if any(map(len, coming)) else None,
            source=(cp.rank - 1) % cp.size,
            dtype=leaving.kv_cgTK.dtype,
        )
        for segment, kv_cgTK, at_T in zip(first_chunks, here.each(), here.positions, strict=True):
            at_S = segment.positions_by_rank[cp.rank]
            for mine, kv_c1TK in _per_kv_head(segment.token_slice, qkv.q_NhK.shape[1], kv_cgTK):
                keys = *_keys_and_values(kv_c1TK, qkv), at_T
                part = attend(qkv.q_NhK[mine], at_S, *keys, qkv.scale, window)
                out_NhV[mine], lse_Nh[mine] = merge_attn_states(out_NhV[mine], lse_Nh[mine], *part)
                arriving.progress()
        received = arriving.wait()
        here = KVBlock(leaving.kv_cgTK[:, :, :0] if received is None else received, coming)


def gathered(qkv: QKV, step: Step, mesh: Mesh, out_NhV: np.ndarray, lse_Nh: np.ndarray) -> None:
    """Attention within the sequences that begin in this step, all keys and values gathered."""
    cp, first_chunks, window = mesh.cp, step.first_chunks, qkv.window
    own = _local_kv(qkv, first_chunks, cp.rank)
    sent = [_needed_downstream(first_chunks, cp, rank, 1, window) for rank in range(cp.size)]
    sizes = [sum(map(len, positions)) for positions in sent]
    all_cgTK = all_gather(own.only(sent[cp.rank]).kv_cgTK, cp, axis=2, sizes=sizes)
    blocks = np.split(all_cgTK, np.cumsum(sizes)[:-1], axis=2)
    keys = [KVBlock(kv_cgTK, positions) for kv_cgTK, positions in zip(blocks, sent, strict=True)]
    keys[cp.rank] = own  # with what no other rank needs
    for place, segment in enumerate(first_chunks):
        order = np.argsort(np.concatenate([one.positions[place] for one in keys]))
        kv_cgTK = np.concatenate([one.each()[place] for one in keys], axis=2)[:, :, order]
        at_T = np.concatenate([one.positions[place] for one in keys])[order]
        new, at_S = segment.token_slice, segment.positions_by_rank[cp.rank]
        out_NhV[new], lse_Nh[new] = attend(
            qkv.q_NhK[new], at_S, *_keys_and_values(kv_cgTK, qkv), at_T, qkv.scale, window
        )


CP_PREFILLS: dict[str, Prefill] = {"ring": ring_attention, "all-gather": gathered}


def gather_sequence(x_ND: np.ndarray, global_index: Sequence[np.ndarray], mesh: Mesh) -> np.ndarray:
    """The rows of all cp ranks, each at its place: (W, D). `global_index` are those of each
    rank's."""
    rows_WD = all_gather(x_ND, mesh.cp, sizes=[len(place) for place in global_index])
    x_WD = np.empty_like(rows_WD)
    x_WD[np.concatenate(global_index)] = rows_WD
    return x_WD


@dataclass(frozen=True)
class KVBlock:
    """Keys and values, (2, g, T, K), or latent ones, (1, g, T, K), of some positions `positions` of
    each of several sequences, which follow each other on the axis T."""

    kv_cgTK: np.ndarray
    positions: list[np.ndarray]

    @property
    def rows(self) -> int:
        """The number of positions."""
        return self.kv_cgTK.shape[2]

    def shape(self, positions: list[np.ndarray]) -> tuple[int, ...]:
        """The shape of the keys and values of other positions."""
        c, g, _, K = self.kv_cgTK.shape
        return c, g, sum(map(len, positions)), K

    def only(self, positions: list[np.ndarray]) -> KVBlock:
        """Those of the positions `positions`, which are among these."""
        if all(
            len(some) == len(all_) for some, all_ in zip(positions, self.positions, strict=True)
        ):
            return self
        masks = [np.isin(all_, some) for some, all_ in zip(positions, self.positions, strict=True)]
        return KVBlock(self.kv_cgTK[:, :, np.concatenate(masks)], positions)

    def each(self) -> list[np.ndarray]:
        """The keys and values of each sequence."""
        return np.split(
            self.kv_cgTK, np.cumsum([len(at_T) for at_T in self.positions])[:-1], axis=2
        )


def _local_kv(qkv: QKV, first_chunks: list[Segment], rank: int) -> KVBlock:
    """This rank's keys and values of the sequences that begin."""
    both = [qkv.k_NgK] if qkv.latent else [qkv.k_NgK, qkv.v_NgV]
    parts = [np.stack([x[s.token_slice] for x in both]).transpose(0, 2, 1, 3) for s in first_chunks]
    return KVBlock(
        np.concatenate(parts, axis=2), [segment.positions_by_rank[rank] for segment in first_chunks]
    )


def _keys_and_values(kv_cgTK: np.ndarray, qkv: QKV) -> tuple[np.ndarray, np.ndarray]:
    """The two of them: ``(k_gTK, v_gTV)``."""
    return kv_cgTK[0], kv_cgTK[-1][..., : qkv.v_NgV.shape[2]]


def _per_kv_head(
    new: slice, qkv: int, kv_cgTK: np.ndarray
) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
    """For each key/value head the place of its queries among those of all tokens and `qkv`, and
    its keys and values: pieces of work between which messages can move on."""
    kv_heads = kv_cgTK.shape[1]
    each = qkv // kv_heads
    for head in range(kv_heads):
        yield (new, slice(head * each, (head + 1) * each)), kv_cgTK[:, head : head + 1]


def _needed_downstream(
    first_chunks: list[Segment], cp: Group, source: int, hop: int, window: int | None
) -> list[np.ndarray]:
    """The positions of rank `source`'s keys, for each sequence, that go on to the rank `hop` places
    behind it, because that one or one further on needs them.

    Without a window that is all of them: causality would spare some of them a part of the way, but
    some rank would have as much to send as before, and the others would wait for it.
    """
    further = [(source + step) % cp.size for step in range(hop, cp.size)]
    needed = []
    for segment in first_chunks:
        at_T = segment.positions_by_rank[source]
        if window is None or not further:
            needed.append(at_T if further else at_T[:0])
            continue
        seen_T = np.zeros(len(at_T), bool)
        for rank in further:
            # Of all queries the first one at or after a key is the nearest to it.
            at_S = np.append(segment.positions_by_rank[rank], np.iinfo(np.int64).max)
            seen_T |= at_S[np.searchsorted(at_S, at_T)] - at_T < window
        needed.append(at_T[seen_T])
    return needed
