"""Tiny models divided over a mesh, for the tests that run on several ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
from mpi4py import MPI
from sweep import layouts
from tiny_models import separate_weights, tiny_config, tiny_weights

from mpishard.communication.collectives import all_gather
from mpishard.communication.mesh import Mesh, partitions
from mpishard.config.expert_placement import ExpertPlacement
from mpishard.config.layout import (
    Layout,
    block,
    block_sizes,
    shard_index_of,
    weight_sharding_of,
)
from mpishard.config.model_config import ModelConfig
from mpishard.config.weight_specs import specs_of_shard
from mpishard.model import Decoder, HiddenStateHook
from mpishard.parallel import context
from mpishard.reference import Reference
from mpishard.sequences.kv_cache import KVCache
from mpishard.sequences.step import Step

# What is made once for all tests of a process: communicators, by their ranks in the world, and
# meshes of them, by the ranks of their groups.
_communicators: dict[tuple[int, ...], MPI.Intracomm] = {}
_meshes: dict[object, Mesh] = {}


def meshes(
    comm: MPI.Intracomm, variant: str, chosen: Iterable[Layout] | None = None
) -> Iterator[Mesh]:
    """A mesh of each of the `chosen` layouts, or of the `layouts` of the ranks of `comm`."""
    for layout in layouts(comm.size, variant) if chosen is None else chosen:
        with mesh_of(comm, variant, layout) as mesh:
            yield mesh


@contextmanager
def mesh_of(
    comm: MPI.Intracomm, variant: str, layout: Layout, placement: ExpertPlacement | None = None
) -> Iterator[Mesh]:
    """The mesh of `layout` for `variant`, with an empty ledger. Its communicators are those of the
    last mesh of the same groups: to make them takes eight ranks as long as a step of the model."""
    config = tiny_config(variant)
    ranks = tuple(comm.group.Translate_ranks(None, MPI.COMM_WORLD.group))
    key = ranks, *partitions(layout, config).values()
    if key not in _meshes:
        if ranks not in _communicators:
            _communicators[ranks] = comm.Dup()
        _meshes[key] = Mesh.split(_communicators[ranks], layout, config)
    mesh = _meshes[key]
    mesh.ledger.clear()
    sharding = weight_sharding_of(config, layout, placement)
    index = shard_index_of(sharding, comm.rank)
    yield replace(mesh, layout=layout, weight_sharding=sharding, shard_index=index)


@cache
def _weights(variant: str, dtype: type) -> dict[str, np.ndarray]:
    return separate_weights(variant, dtype)


def toy(variant: str, mesh: Mesh, dtype: type = np.float64) -> Decoder:
    """`variant` on this rank of `mesh`, sharded by the partition table."""
    config, weights = tiny_config(variant), _weights(variant, dtype)
    sharding, index = mesh.weight_sharding, mesh.shard_index
    shards = {
        weight.name: weights[weight.name][weight.slices(config, sharding, index)].copy()
        for weight in specs_of_shard(config, sharding, index)
    }
    return Decoder(config, shards, mesh)


class Recorder(Decoder):
    """A model that keeps every step it is fed, what it answers, and for each wanted token the
    cache of its sequence and the sequence's length by then."""

    def __init__(self, model: Decoder) -> None:
        self.__dict__.update(model.__dict__)
        self.steps: list[Step] = []
        self.logits: list[np.ndarray] = []
        self.asked: list[list[tuple[KVCache, int]]] = []

    def forward(self, step: Step, observe: HiddenStateHook | None = None) -> np.ndarray:
        self.steps.append(step)
        self.logits.append(super().forward(step, observe))
        complete = [s for s in step.segments if s.num_known == s.cache.length]
        self.asked.append([(segment.cache, segment.num_known) for segment in complete])
        return self.logits[-1]


class Remembering(Reference):
    """A reference that computes a sequence once, for all layouts that are held to it, and with it
    the sequences that it begins with."""

    def __init__(self, config: ModelConfig, weights: dict[str, np.ndarray]) -> None:
        super().__init__(config, weights)
        self.known: dict[tuple[int, ...], tuple[np.ndarray, list[np.ndarray]]] = {}
        self.last_logits: dict[tuple[int, ...], np.ndarray] = {}

    def forward(
        self, ids_S: Sequence[int], encoder_ids_T: Sequence[int] = ()
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        assert not len(encoder_ids_T), "sequences are known by their own tokens"
        ids = tuple(map(int, ids_S))
        if ids not in self.known:
            logits_SV, hidden = self.known[ids] = super().forward(ids)
            for array in (logits_SV, *hidden):
                array.flags.writeable = False
        return self.known[ids]

    @property
    def goes_by_length(self) -> bool:
        """Whether a sequence may have other rotary frequencies than its beginning."""
        lengths = (rope.frequency_length(sys.maxsize) for rope in self.config.ropes)
        return any(lengths)

    def logits_after(self, ids_S: Sequence[int]) -> np.ndarray:
        """The logits (V,) after a sequence, which may be the beginning of one that is known."""
        ids = tuple(map(int, ids_S))
        if ids not in self.last_logits:
            logits_SV, _ = self.forward(ids)
            for length in [len(ids)] if self.goes_by_length else range(1, len(ids) + 1):
                self.last_logits[ids[:length]] = logits_SV[length - 1]
        return self.last_logits[ids]

    def logits(self, ids_S: np.ndarray, length: int) -> np.ndarray:
        """The logits (S, V) of the first `length` tokens."""
        whole = ids_S[:length] if self.goes_by_length else ids_S
        return self.forward(whole.tolist())[0][:length]

    def greedy(self, ids: Sequence[int], count: int, encoder_ids: Sequence[int] = ()) -> list[int]:
        sequence = list(ids)
        for _ in range(count):
            sequence.append(int(np.argmax(self.logits_after(sequence))))
        return sequence[len(ids) :]


@cache
def oracle(variant: str) -> Remembering:
    """The reference of `variant`, in float64."""
    return Remembering(tiny_config(variant), tiny_weights(variant))


def whole_logits(logits_Mv: np.ndarray, model: Decoder, step: Step) -> np.ndarray:
    """The logits of all wanted tokens of a step and of all ranks' blocks of the vocabulary, in the
    order of the sequences: (M, V)."""
    tp = model.mesh.tp
    sizes = block_sizes(model.config.vocab, tp.size)
    logits_MV = all_gather(logits_Mv, tp, axis=1, sizes=sizes)
    return context.gather_sequence(logits_MV, step.logits_owner_index, model.mesh)


def slices(step: Step) -> list[slice]:
    """The places of each sequence's new tokens among those of all ranks."""
    stops = np.cumsum(
        [sum(map(len, segment.positions_by_rank)) for segment in step.segments]
    ).tolist()
    return [slice(*bounds) for bounds in pairwise([0, *stops])]


def tokens_of_ranks(mesh: Mesh, model: Decoder, count: int) -> list[np.ndarray]:
    """The positions of a prompt of `count` tokens, fed by the first replica, that each rank which
    shares the experts routes."""
    layout = mesh.layout
    if mesh.world.rank // max(layout.replica_size, layout.ep) != 0:
        return [np.empty(0, int)] * mesh.moe.size
    tokens = []
    for replica in range(layout.replicas_per_ep_group):
        for at in model.sequence_sharding.tokens(0, count):
            at = at if replica == 0 else at[:0]
            tokens += [at[block(len(at), layout.tp, rank)] for rank in range(layout.tp)]
    return tokens
