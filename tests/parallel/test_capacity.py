"""Experts of limited capacity: every layout against a serial computation that drops rows one by
one, and what is sent, which is what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from math import ceil

import numpy as np
import pytest
from mpi4py import MPI
from tiny_models import tiny_config, tiny_weights
from toys import mesh_of, tokens_of_ranks, toy, whole_logits

from mpishard.communication.mesh import Mesh
from mpishard.config.layout import TOKEN_DISPATCHERS, TOKEN_DROP_POLICIES, Layout, block_sizes
from mpishard.reference import Reference, Routing
from mpishard.sequences.step import pack

pytestmark = pytest.mark.ranks(1, 2, 4)

VARIANT = "qwen2_moe-shared"  # 3 of 7 experts a token, and one that all go to
TOKENS = 13
LAYOUTS = {
    1: [Layout()],
    2: [Layout(tp=2, ep=2), Layout(tp=2), Layout(cp=2, ep=2), Layout(dp=2, ep=2)],
    4: [
        Layout(tp=2, cp=2, ep=2, sequence_parallel=True),
        Layout(tp=4, ep=4),
        Layout(tp=2, dp=2, ep=4),
        Layout(cp=2, dp=2, ep=1, cp_order="contiguous"),
    ],
}
by_both = pytest.mark.parametrize("drop", TOKEN_DROP_POLICIES)


class Dropping(Reference):
    """The reference, in which an expert takes only so many rows of each group of tokens."""

    def __init__(self, factor: str, drop: str, groups: list[np.ndarray]) -> None:
        super().__init__(tiny_config(VARIANT), tiny_weights(VARIANT, np.float64), np.float64)
        self.factor, self.drop, self.groups = Fraction(factor), drop, groups
        self.kept: dict[str, set[tuple[int, int]]] = {}  # (token, expert), by layer

    def route(self, x_SD: np.ndarray, name: str) -> Routing:
        routing = super().route(x_SD, name)
        kept = self.kept[name] = set(self._kept(routing))
        weights_SA = routing.weights_SA.copy()
        for (token, choice), expert in np.ndenumerate(routing.experts_SA):
            if (token, int(expert)) not in kept:
                weights_SA[token, choice] = 0
        return routing._replace(weights_SA=weights_SA)

    def _kept(self, routing: Routing) -> Iterator[tuple[int, int]]:
        moe = self.config.moe
        assert moe is not None
        for group in self.groups:
            limit = ceil(self.factor * len(group) * moe.top_k / moe.num_experts)
            for expert in range(moe.num_experts):
                rows = []
                for token in sorted(group.tolist()):
                    for choice in np.flatnonzero(routing.experts_SA[token] == expert):
                        rows.append((-routing.weights_SA[token, choice], token))
                if self.drop == "probs":
                    rows.sort()
                yield from ((token, expert) for _, token in rows[:limit])


def meshes(comm: MPI.Intracomm, factor: str, drop: str) -> Iterator[Mesh]:
    """A mesh of each layout and dispatch of the ranks of `comm`, with this capacity."""
    for layout in LAYOUTS[comm.size]:
        for dispatch in TOKEN_DISPATCHERS:
            layout = replace(
                layout,
                moe_token_dispatcher=dispatch,
                expert_capacity_factor=float(factor),
                token_drop_policy=drop,
            )
            with mesh_of(comm, VARIANT, layout) as mesh:
                yield mesh


def prompt() -> np.ndarray:
    """A prompt for the first replica; the others have none."""
    return np.random.RandomState(8).randint(0, tiny_config(VARIANT).vocab, TOKENS)


def forward(mesh: Mesh) -> np.ndarray:
    """The logits of the prompt, whole on the ranks of the first replica."""
    model = toy(VARIANT, mesh)
    feeds = [(prompt(), model.allocate_cache(TOKENS))] if mesh.dp.rank == 0 else []
    step = pack(feeds, model.sequence_sharding, all_logits=True)
    mesh.ledger.clear()
    return whole_logits(model.forward(step), model, step)


@by_both
@pytest.mark.parametrize("factor", ["0.3", "0.6", "1"])
def test_rows_above_the_capacity_add_nothing(comm: MPI.Intracomm, factor: str, drop: str):
    for mesh in meshes(comm, factor, drop):
        logits_SV = forward(mesh)
        if mesh.dp.rank == 0:
            reference = Dropping(factor, drop, groups_of(mesh))
            expected_SV = reference.forward(prompt().tolist())[0]
            assert all(len(kept) < 3 * TOKENS for kept in reference.kept.values()), "none dropped"
            np.testing.assert_allclose(logits_SV, expected_SV, rtol=0, atol=1e-9)


def groups_of(mesh: Mesh) -> list[np.ndarray]:
    """The tokens of the prompt that each rank of the first replicas routes, none left out."""
    groups = tokens_of_ranks(mesh, toy(VARIANT, mesh), TOKENS)
    if mesh.layout.replicas_per_ep_group == 1:  # with experts of the replica's own
        groups = groups[: mesh.layout.replica_size]
    assert sorted(np.concatenate(groups).tolist()) == list(range(TOKENS))
    return groups


@by_both
def test_only_what_is_kept_is_sent(comm: MPI.Intracomm, drop: str):
    config = tiny_config(VARIANT)
    assert config.moe is not None
    row = config.hidden * 8
    for mesh in meshes(comm, "0.6", drop):
        forward(mesh)
        if mesh.world.rank >= max(mesh.layout.replica_size, mesh.layout.ep):
            continue  # it shares no experts with the first replica
        groups = groups_of(mesh)
        reference = Dropping("0.6", drop, groups)
        reference.forward(prompt().tolist())
        if mesh.layout.moe_token_dispatcher == "all-gather":  # in which every token goes everywhere
            entry = mesh.ledger["reduce_scatter", "moe"]
            away = TOKENS - len(groups[mesh.moe.rank])
            assert entry.wire_bytes == away * row * config.layers
            continue
        ep, etp = mesh.ep, mesh.etp
        column = groups[etp.rank :: etp.size]  # of the ranks that send to each other
        home = {int(token): rank for rank, group in enumerate(column) for token in group}
        sizes = block_sizes(config.moe.num_experts, ep.size)
        owners = np.repeat(np.arange(ep.size), sizes)
        rows = [
            (home[token], owners[expert])
            for kept in reference.kept.values()
            for token, expert in kept
            if token in home
        ]
        sent = sum(source == ep.rank != target for source, target in rows)
        back = sum(target == ep.rank != source for source, target in rows)
        assert mesh.ledger["all_to_all", "ep"].wire_bytes == (sent + back) * row


@by_both
def test_a_capacity_for_all_rows_is_none_at_all(comm: MPI.Intracomm, drop: str):
    """Bit for bit."""
    for mesh in meshes(comm, "7", drop):
        logits_SV = forward(mesh)
        with mesh_of(comm, VARIANT, replace(mesh.layout, expert_capacity_factor=0.0)) as dropless:
            np.testing.assert_array_equal(logits_SV, forward(dropless))
