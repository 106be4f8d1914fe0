"""The mesh: who shares which communicator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from mpi4py import MPI
from sweep import degrees, layouts
from tiny_models import tiny_config
from toys import mesh_of

from mpishard.communication.mesh import Mesh
from mpishard.config.layout import Layout, kv_heads_of, query_heads_of
from mpishard.config.model_config import ModelConfig

pytestmark = pytest.mark.ranks

CONFIG = tiny_config("llama-uneven")  # 12 query heads, 3 key/value heads


def members(comm: MPI.Comm, world: MPI.Intracomm) -> list[int]:
    """The ranks of a communicator, in its order, as the world numbers them."""
    return comm.allgather(world.rank)


def test_ranks_of_a_group_differ_in_one_coordinate(comm):
    for layout in layouts(comm.size, "llama-uneven"):
        everyones = [layout.coordinates(rank) for rank in range(comm.size)]
        with mesh_of(comm, "llama-uneven", layout) as mesh:
            mine = (mesh.dp.rank, mesh.cp.rank, mesh.tp.rank)
            assert mine == everyones[comm.rank]
            assert (mesh.dp.size, mesh.cp.size, mesh.tp.size) == (layout.dp, layout.cp, layout.tp)
            assert (mesh.world.rank, mesh.world.size) == (comm.rank, comm.size)
            for axis, group in enumerate((mesh.dp, mesh.cp, mesh.tp)):
                others = [other for other in range(3) if other != axis]
                assert members(group.comm, comm) == [
                    rank
                    for rank, theirs in enumerate(everyones)
                    if all(theirs[other] == mine[other] for other in others)
                ]


def test_tensor_parallel_ranks_are_neighbours_and_then_those_of_a_replica(comm):
    for layout in layouts(comm.size, "llama-uneven"):
        with mesh_of(comm, "llama-uneven", layout) as mesh:
            first = comm.rank - comm.rank % layout.tp
            assert members(mesh.tp.comm, comm) == list(range(first, first + layout.tp))
            first = comm.rank - comm.rank % layout.replica_size
            replica = mesh.tp.comm.allgather(members(mesh.cp.comm, comm))
            assert sorted(sum(replica, [])) == list(range(first, first + layout.replica_size))


def test_a_replica_is_a_group_of_its_own(comm):
    """By cp, then tp: its rank 0 is the first of both."""
    for layout in layouts(comm.size, "llama-uneven"):
        with mesh_of(comm, "llama-uneven", layout) as mesh:
            first = comm.rank - comm.rank % layout.replica_size
            ranks = list(range(first, first + layout.replica_size))
            assert members(mesh.replica.comm, comm) == list(mesh.replica.members) == ranks
            assert mesh.replica.rank == mesh.cp.rank * layout.tp + mesh.tp.rank


def every_kind(ranks: int) -> Iterator[tuple[str, Layout]]:
    """Layouts with flash decoding and without, and such that shard experts over ranks of a replica
    and over replicas."""
    for layout in layouts(ranks, "llama-uneven"):
        yield "llama-uneven", layout
    for layout in degrees(ranks):
        for ep in sorted({1, layout.replica_size, ranks}):
            yield "mixtral-window", replace(layout, ep=ep)


def test_groups_of_the_same_ranks_share_a_communicator(comm):
    """And no others do: MPI has few communicators. A group knows its ranks of the world."""
    fields = ("replica", "dp", "cp", "tp", "kv", "moe", "ep", "etp")
    for variant, layout in every_kind(comm.size):
        with mesh_of(comm, variant, layout) as mesh:
            groups = [getattr(mesh, field) for field in fields]
            for group in groups:
                assert list(group.members) == members(group.comm, comm)
            everyones = comm.allgather([group.members for group in groups])
            different = set(zip(*everyones, strict=True))
            assert len(mesh.comms) == len(different) == len({id(group.comm) for group in groups})
            assert all(group.comm is not comm for group in groups)


@pytest.mark.ranks(1, 2, 4, 6, 8)
def test_ranks_with_the_same_experts_and_parts_of_them(comm):
    """Ranks of moe are by ep, then etp; a rank of ep has other experts than its neighbours, a rank
    of etp other parts of the same."""
    for variant, layout in every_kind(comm.size):
        with mesh_of(comm, variant, layout) as mesh:
            assert (
                mesh.moe.size == max(layout.replica_size, layout.ep) == mesh.ep.size * mesh.etp.size
            )
            assert (mesh.ep.size, mesh.moe.rank) == (
                layout.ep,
                mesh.ep.rank * mesh.etp.size + mesh.etp.rank,
            )
            sharding, own = mesh.weight_sharding, mesh.shard_index
            if tiny_config(variant).moe:
                assert mesh.ep.rank == sharding.ep_rank(own)
                assert mesh.etp.rank == sharding.etp_rank(own)


def kv_heads(config: ModelConfig, layout: Layout, rank: int) -> tuple[int, range]:
    """The replica of a world rank and the key/value heads it holds."""
    dp, _, tp = layout.coordinates(rank)
    return dp, range(config.kv_heads)[kv_heads_of(config, layout.tp, tp)]


@pytest.mark.ranks(1, 2, 3, 4, 6, 8)
@pytest.mark.parametrize("variant", ["llama-uneven", "llama-gqa", "llama-mqa", "llama-mha"])
def test_the_ranks_that_hold_the_same_heads_divide_their_cache(comm, variant):
    """Their number is cp times how many tensor-parallel ranks share a head, which may differ from
    head to head; with flash decoding, and without it cp alone."""
    config = tiny_config(variant)
    for layout in degrees(comm.size):
        if layout.tp > config.heads:
            continue
        with mesh_of(comm, variant, layout) as mesh:
            assert members(mesh.kv.comm, comm) == members(mesh.cp.comm, comm)
        flash = replace(layout, flash_decoding=True)
        mine = kv_heads(config, flash, comm.rank)
        with mesh_of(comm, variant, flash) as mesh:
            group = members(mesh.kv.comm, comm)
        # Ascending ranks of one replica are cp-major.
        assert group == [rank for rank in range(comm.size) if kv_heads(config, flash, rank) == mine]
        if layout.tp <= config.kv_heads:
            assert len(group) == layout.cp


@pytest.mark.ranks(8)
def test_heads_that_are_shared_unevenly(comm):
    """Three key/value heads over eight ranks: by three, three and two of them."""
    for layout, sizes in (
        (Layout(tp=8, flash_decoding=True), [3, 3, 3, 3, 3, 3, 2, 2]),
        (Layout(tp=4, cp=2, flash_decoding=True), [4, 4, 2, 2, 4, 4, 2, 2]),
        (Layout(tp=4, dp=2, flash_decoding=True), [2, 2, 1, 1, 2, 2, 1, 1]),
        (Layout(tp=4, cp=2), [2] * 8),
    ):
        with mesh_of(comm, "llama-uneven", layout) as mesh:
            assert comm.allgather(mesh.kv.size) == sizes
            heads = query_heads_of(CONFIG, layout.tp, mesh.tp.rank)
            held = mesh.kv.comm.allgather(range(CONFIG.heads)[heads])
        # Each cp rank's sharers have all query heads of their key/value head between them.
        if layout.flash_decoding:
            per_cp = len(held) // layout.cp
            for start in range(0, len(held), per_cp):
                of_one = [head for part in held[start : start + per_cp] for head in part]
                first = 4 * (of_one[0] // 4)
                assert of_one == list(range(first, first + 4))


def test_all_groups_write_into_one_ledger(comm):
    mesh = Mesh.split(comm, Layout(dp=comm.size), CONFIG)
    for group in (mesh.world, mesh.dp, mesh.cp, mesh.tp, mesh.kv):
        assert group.ledger is mesh.ledger
    assert [g.name for g in (mesh.dp, mesh.cp, mesh.tp, mesh.kv)] == ["dp", "cp", "tp", "kv"]


def test_a_layout_of_another_size_is_refused(comm):
    for wrong in (Layout(tp=2, dp=comm.size), Layout(cp=2, dp=comm.size)):
        with pytest.raises(ValueError, match=f"needs {2 * comm.size} ranks, not the {comm.size}"):
            Mesh.split(comm, wrong, CONFIG)


@pytest.mark.ranks(1)
def test_every_product_is_tried():
    found = {(one.dp, one.cp, one.tp) for one in degrees(12)}
    numbers = range(1, 13)
    assert found == {
        (dp, cp, tp) for dp in numbers for cp in numbers for tp in numbers if dp * cp * tp == 12
    }
