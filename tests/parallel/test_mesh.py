"""The mesh: who shares which communicator."""

from __future__ import annotations

from dataclasses import replace

import pytest
from mpi4py import MPI
from tiny_models import tiny_config
from toys import degrees, layouts, mesh_of

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
