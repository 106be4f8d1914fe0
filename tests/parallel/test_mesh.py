"""The mesh: who shares which communicator."""

from __future__ import annotations

import pytest
from toys import layouts

from mpishard.communication.mesh import Mesh
from mpishard.description.layout import Layout

pytestmark = pytest.mark.ranks


def test_ranks_of_a_group_differ_in_one_coordinate(comm):
    for layout in layouts(comm.size):
        mesh = Mesh.split(comm, layout)
        dp, tp = layout.coordinates(comm.rank)
        assert (mesh.dp.size, mesh.tp.size, mesh.world.size) == (layout.dp, layout.tp, comm.size)
        assert (mesh.dp.rank, mesh.tp.rank, mesh.world.rank) == (dp, tp, comm.rank)
        beside = mesh.tp.comm.allgather(comm.rank)  # neighbours: tp is the innermost axis
        assert beside == list(range(dp * layout.tp, (dp + 1) * layout.tp))
        assert mesh.dp.comm.allgather(comm.rank) == list(range(tp, comm.size, layout.tp))


def test_all_groups_write_into_one_ledger(comm):
    mesh = Mesh.split(comm, Layout(dp=comm.size))
    assert mesh.tp.ledger is mesh.dp.ledger is mesh.world.ledger is mesh.ledger


def test_a_layout_of_another_size_is_refused(comm):
    with pytest.raises(ValueError, match=f"needs {2 * comm.size} ranks, not the {comm.size}"):
        Mesh.split(comm, Layout(tp=2, dp=comm.size))
