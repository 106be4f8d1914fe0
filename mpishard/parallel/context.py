"""Context parallelism: the tokens of each sequence sharded over the ``cp`` ranks of a replica.

Every cp rank has the weights of its tensor-parallel rank, and works on its own N of the step's W
tokens alone, up to attention, where a query needs the keys and values of all earlier tokens. For
sequences that begin in this step, these meet the queries in one of two ways:

ring_attention        each rank's keys and values go round the ranks, one neighbour a hop, while
                      attention to those that arrived last overlaps the transfer (Liu et al. 2023,
                      arXiv 2310.01889): isendrecv(cp), cp - 1 times
all_gather_attention  all_gather(cp) of keys and values together (Llama 3: arXiv 2407.21783, section
                      3.3.2)

For one sequence, ring attention is no more than this::

    kv, out, lse = own keys and values, 0, -inf
    for hop in range(cp.size):
        arriving = isendrecv(kv, cp, to=the next rank, source=the one before)
        out, lse = merge_attn_states(out, lse, *attend(q, q_pos, *kv, spec))
        kv = arriving.wait()

Here a `KVBlock` holds several sequences at once, and leaves behind what no rank further on needs:
with a sliding window or chunks, most keys never leave their neighbourhood.

A sequence that is extended has its keys and values in the cache, where they stay: flash decoding.

gather_sequence  x_ND of each cp rank -> all_gather(cp) -> x_WD, in the order of the sequences
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mpishard.arithmetic.attention import AttentionSpec, attend, merge_attn_states
from mpishard.communication.collectives import all_gather, isendrecv
from mpishard.communication.mesh import Group, Mesh
from mpishard.sequences.step import Segment, Step

# (q_NhK, k_NgK, v_NgY, spec, step, mesh, out_NhY, lse_Nh), of which the last two are filled in
Prefill = Callable[
    [np.ndarray, np.ndarray, np.ndarray, AttentionSpec, Step, Mesh, np.ndarray, np.ndarray], None
]


def ring_attention(
    q_NhK: np.ndarray,
    k_NgK: np.ndarray,
    v_NgY: np.ndarray,
    spec: AttentionSpec,
    step: Step,
    mesh: Mesh,
    out_NhY: np.ndarray,
    lse_Nh: np.ndarray,
) -> None:
    """Attention within the sequences that begin in this step, keys and values going round."""
    cp, chunks = mesh.cp, step.first_chunks
    here = KVBlock.local(k_NgK, v_NgY, spec, chunks, cp.rank)
    for segment in chunks:  # attention over no keys
        out_NhY[segment.token_slice], lse_Nh[segment.token_slice] = 0, -np.inf
    for hop in range(cp.size):
        owner = (cp.rank - hop) % cp.size  # whose keys and values are here
        leaving = here.only(_needed_downstream(chunks, cp, owner, hop + 1, spec))
        coming = _needed_downstream(chunks, cp, (owner - 1) % cp.size, hop + 1, spec)
        arriving = isendrecv(
            leaving.kv_XgTK if leaving.rows else None,
            cp,
            to=(cp.rank + 1) % cp.size,
            shape=leaving.shape(coming) if any(map(len, coming)) else None,
            source=(cp.rank - 1) % cp.size,
            dtype=leaving.kv_XgTK.dtype,
        )
        for segment, kv_XgTK, k_pos_T in zip(chunks, here.each(), here.positions, strict=True):
            q_pos_S = segment.positions_by_rank[cp.rank]
            for mine, kv_X1TK in _per_kv_head(segment.token_slice, q_NhK.shape[1], kv_XgTK):
                k_1TK, v_1TY = _keys_and_values(kv_X1TK, v_NgY)
                heads = spec.of_heads(mine[1])
                part = attend(q_NhK[mine], q_pos_S, k_1TK, v_1TY, k_pos_T, heads)
                out_NhY[mine], lse_Nh[mine] = merge_attn_states(out_NhY[mine], lse_Nh[mine], *part)
                arriving.progress()
        received = arriving.wait()
        here = KVBlock(leaving.kv_XgTK[:, :, :0] if received is None else received, coming)


def all_gather_attention(
    q_NhK: np.ndarray,
    k_NgK: np.ndarray,
    v_NgY: np.ndarray,
    spec: AttentionSpec,
    step: Step,
    mesh: Mesh,
    out_NhY: np.ndarray,
    lse_Nh: np.ndarray,
) -> None:
    """Attention within the sequences that begin in this step, all keys and values gathered."""
    cp, chunks = mesh.cp, step.first_chunks
    own = KVBlock.local(k_NgK, v_NgY, spec, chunks, cp.rank)
    needed = [_needed_downstream(chunks, cp, rank, 1, spec) for rank in range(cp.size)]
    sizes = [sum(map(len, positions)) for positions in needed]
    all_XgTK = all_gather(own.only(needed[cp.rank]).kv_XgTK, cp, axis=2, sizes=sizes)
    blocks = np.split(all_XgTK, np.cumsum(sizes)[:-1], axis=2)
    by_rank = [
        KVBlock(kv_XgTK, positions) for kv_XgTK, positions in zip(blocks, needed, strict=True)
    ]
    by_rank[cp.rank] = own  # with what no other rank needs
    for place, segment in enumerate(chunks):
        k_pos_T = np.concatenate([block.positions[place] for block in by_rank])
        order = np.argsort(k_pos_T)
        kv_XgTK = np.concatenate([block.each()[place] for block in by_rank], axis=2)[:, :, order]
        keys_and_values = *_keys_and_values(kv_XgTK, v_NgY), k_pos_T[order]
        new, q_pos_S = segment.token_slice, segment.positions_by_rank[cp.rank]
        out_NhY[new], lse_Nh[new] = attend(q_NhK[new], q_pos_S, *keys_and_values, spec)


PREFILLS: dict[str, Prefill] = {"ring": ring_attention, "all-gather": all_gather_attention}


def gather_sequence(x_ND: np.ndarray, global_index: Sequence[np.ndarray], mesh: Mesh) -> np.ndarray:
    """The rows of all cp ranks, in the order of the sequences: (W, D). `global_index` has the
    indices of each rank's rows among them."""
    rows_WD = all_gather(x_ND, mesh.cp, sizes=[len(index) for index in global_index])
    x_WD = np.empty_like(rows_WD)
    x_WD[np.concatenate(global_index)] = rows_WD
    return x_WD


@dataclass(frozen=True)
class KVBlock:
    """Keys and values of several sequences, which follow each other on the axis T: of each the ones
    at `positions`. X is 2, keys and values, or 1 where the values lie in the keys."""

    kv_XgTK: np.ndarray
    positions: list[np.ndarray]

    @classmethod
    def local(
        cls,
        k_NgK: np.ndarray,
        v_NgY: np.ndarray,
        spec: AttentionSpec,
        chunks: list[Segment],
        rank: int,
    ) -> KVBlock:
        """This rank's keys and values of the sequences that begin."""
        both = [k_NgK] if spec.values_in_keys else [k_NgK, v_NgY]
        parts = [np.stack([x[s.token_slice] for x in both]).transpose(0, 2, 1, 3) for s in chunks]
        return cls(np.concatenate(parts, axis=2), [s.positions_by_rank[rank] for s in chunks])

    @property
    def rows(self) -> int:
        """The number of positions of all sequences."""
        return self.kv_XgTK.shape[2]

    def shape(self, positions: list[np.ndarray]) -> tuple[int, ...]:
        """The shape of the keys and values of other `positions`."""
        X, g, _, K = self.kv_XgTK.shape
        return X, g, sum(map(len, positions)), K

    def only(self, positions: list[np.ndarray]) -> KVBlock:
        """The block of `positions`, which are among these."""
        pairs = list(zip(positions, self.positions, strict=True))
        if all(len(some) == len(own) for some, own in pairs):
            return self
        masks = [np.isin(own, some) for some, own in pairs]
        return KVBlock(self.kv_XgTK[:, :, np.concatenate(masks)], positions)

    def each(self) -> list[np.ndarray]:
        """The keys and values of each sequence."""
        return np.split(self.kv_XgTK, np.cumsum([len(one) for one in self.positions])[:-1], axis=2)


def _keys_and_values(kv_XgTK: np.ndarray, v_NgY: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two of them: ``(k_gTK, v_gTY)``; values are as wide as those of `v_NgY`."""
    return kv_XgTK[0], kv_XgTK[-1][..., : v_NgY.shape[2]]


def _per_kv_head(
    new: slice, heads: int, kv_XgTK: np.ndarray
) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
    """For each key/value head the slices of its queries, among the `new` tokens and all `heads`,
    and its keys and values: pieces of work between which messages can move on."""
    kv_heads = kv_XgTK.shape[1]
    each = heads // kv_heads
    for head in range(kv_heads):
        yield (new, slice(head * each, (head + 1) * each)), kv_XgTK[:, head : head + 1]


def _needed_downstream(
    first_chunks: list[Segment], cp: Group, source: int, hop: int, spec: AttentionSpec
) -> list[np.ndarray]:
    """The positions of rank `source`'s keys, for each sequence, that travel on to the rank `hop`
    places further along the ring: those that it, or a rank after it, attends to.

    Without a window or chunks these are all. With causality some ranks could send less, but not
    all, and those that send the most decide how long a hop takes.
    """
    further = [(source + step) % cp.size for step in range(hop, cp.size)]
    needed = []
    for segment in first_chunks:
        k_pos_T = segment.positions_by_rank[source]
        if spec.sees_all or not further:
            needed.append(k_pos_T if further else k_pos_T[:0])
            continue
        seen_T = np.zeros(len(k_pos_T), bool)
        for rank in further:
            # The first query at or after a key is the nearest to it.
            q_pos_S = np.append(segment.positions_by_rank[rank], np.iinfo(np.int64).max)
            nearest_T = q_pos_S[np.searchsorted(q_pos_S, k_pos_T)]
            seen_T |= spec.first_keys(nearest_T) <= k_pos_T
        needed.append(k_pos_T[seen_T])
    return needed
