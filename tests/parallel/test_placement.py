"""Copies of experts: the same numbers as without, and the rows of ranks as they were placed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from mpi4py import MPI
from tiny_models import tiny_config, tiny_weights
from toys import mesh_of, oracle, tokens_of_ranks, toy, whole_logits

from mpishard.arithmetic import linear
from mpishard.arithmetic.eplb import rebalance_experts
from mpishard.communication.mesh import Mesh
from mpishard.config.expert_placement import ExpertPlacement
from mpishard.config.layout import TOKEN_DISPATCHERS, Layout
from mpishard.parallel.expert import MoELayer
from mpishard.parallel.expert_load import ExpertLoad
from mpishard.sequences.step import pack

pytestmark = pytest.mark.ranks(2, 4)

VARIANT = "qwen3_moe-normed"  # 8 experts in some of its layers, biases of none
TOKENS = 23
LAYOUTS = {
    2: [Layout(tp=2, ep=2), Layout(cp=2, ep=2), Layout(dp=2, ep=2)],
    4: [
        Layout(tp=4, ep=2, sequence_parallel=True),
        Layout(tp=2, cp=2, ep=4),
        Layout(tp=2, dp=2, ep=4),
        Layout(dp=4, ep=2),
    ],
}
by_both = pytest.mark.parametrize("dispatch", TOKEN_DISPATCHERS)


def prompt() -> list[int]:
    """A prompt for the first replica; the others have none."""
    vocab = tiny_config(VARIANT).vocab
    return np.random.RandomState(4).randint(0, vocab, TOKENS).tolist()


def routings() -> dict[int, np.ndarray]:
    """The experts of each token, by layer."""
    found = oracle(VARIANT).routings(prompt())
    return {layer: routing.experts_SA for layer, routing in found.items()}


def placement(ep: int) -> ExpertPlacement:
    """Of all experts on `ep` ranks and further copies, other ones in every layer."""
    moe = tiny_config(VARIANT).moe
    assert moe is not None
    layers = {}
    for layer, experts_SA in routings().items():
        loads_E = np.bincount(experts_SA.reshape(-1), minlength=moe.num_experts)
        layers[layer] = rebalance_experts(loads_E.tolist(), ep, moe.num_experts // ep + 1)
    return ExpertPlacement(moe.num_experts, layers)


def forward(mesh: Mesh, load: ExpertLoad | None = None) -> np.ndarray:
    """The logits of the prompt, whole on the ranks of the first replica."""
    model = toy(VARIANT, mesh)
    if load is not None:
        model = model.map_moe_layers(load.attach)
    feeds = [(np.array(prompt()), model.allocate_cache(TOKENS))] if mesh.dp.rank == 0 else []
    step = pack(feeds, model.sequence_sharding, all_logits=True)
    mesh.ledger.clear()
    return whole_logits(model.forward(step), model, step)


@by_both
def test_copies_change_nothing_but_who_computes(comm: MPI.Intracomm, dispatch: str):
    expected_SV = oracle(VARIANT).forward(prompt())[0]
    for layout in LAYOUTS[comm.size]:
        layout = replace(layout, moe_token_dispatcher=dispatch)
        with mesh_of(comm, VARIANT, layout, placement(layout.ep)) as mesh:
            logits_SV = forward(mesh)
            if mesh.dp.rank == 0:
                np.testing.assert_allclose(logits_SV, expected_SV, rtol=0, atol=1e-9)


def test_to_the_bit_where_products_are_row_by_row(comm: MPI.Intracomm, monkeypatch):
    """BLAS may round a row otherwise in the company of others; nothing else does. (In the gathering
    form who computes a row also begins to sum it up.)"""

    def by_rows(x_NI, w_OI, bias_O=None):
        y_NO = np.empty((len(x_NI), len(w_OI)), x_NI.dtype)
        for x_I, y_O in zip(x_NI, y_NO, strict=True):
            y_O[:] = w_OI @ x_I
        return y_NO if bias_O is None else y_NO + bias_O

    monkeypatch.setattr(linear, "linear", by_rows)
    monkeypatch.setattr(linear, "use_small_gemm", lambda rows: False)
    for layout in LAYOUTS[comm.size]:
        with mesh_of(comm, VARIANT, layout) as mesh:
            expected_SV = forward(mesh)
        with mesh_of(comm, VARIANT, layout, placement(layout.ep)) as mesh:
            np.testing.assert_array_equal(forward(mesh), expected_SV)


def rows_in_turn(
    experts_SA: np.ndarray, held: list[list[int]], groups: list[np.ndarray]
) -> np.ndarray:
    """The rows that each rank which routes one of the `groups` of tokens gives to each rank that
    has experts, one row at a time."""
    rows = np.zeros((len(groups), len(held)), int)
    for sender, group in enumerate(groups):
        turn = dict.fromkeys(range(experts_SA.max() + 1), sender)
        for number in experts_SA[group].reshape(-1).tolist():
            owners = [rank for rank, experts in enumerate(held) if number in experts]
            rows[sender, owners[turn[number] % len(owners)]] += 1
            turn[number] += 1
    return rows


@by_both
def test_copies_share_the_rows_in_turn(comm: MPI.Intracomm, dispatch: str):
    """What a rank computes and what it sends, from the experts that the reference's router
    chooses."""
    row = tiny_config(VARIANT).hidden * 8
    for layout in LAYOUTS[comm.size]:
        placed = placement(layout.ep)
        with mesh_of(comm, VARIANT, replace(layout, moe_token_dispatcher=dispatch), placed) as mesh:
            load = ExpertLoad()
            forward(mesh, load)
            entry = mesh.ledger["all_to_all", "ep"]
            groups = tokens_of_ranks(mesh, toy(VARIANT, mesh), TOKENS)
            rows = {
                layer: rows_in_turn(experts_SA, placed.layers[layer], groups)
                for layer, experts_SA in routings().items()
            }
            if dispatch == "all-to-all":
                wire = 0
                for of_layer in rows.values():  # from those whose rows come here: (ep, ep)
                    away = of_layer[mesh.etp.rank :: mesh.etp.size].copy()
                    np.fill_diagonal(away, 0)
                    wire += away[mesh.ep.rank].sum() + away[:, mesh.ep.rank].sum()
                assert entry.wire_bytes == wire * row
            first = range(max(layout.replica_size, layout.ep))  # the ranks that share its experts
            for counted in load.totals(mesh):
                if counted.phase == "prefill" and mesh.world.rank in first:
                    computed = rows[counted.layer].sum(axis=0)
                    expected = np.repeat(computed, mesh.etp.size).tolist()
                    assert counted.tokens_per_rank == expected + [0] * (comm.size - len(first))


@by_both
def test_what_is_dropped_does_not_depend_on_copies(comm: MPI.Intracomm, dispatch: str):
    """The capacity is an expert's, not that of a copy."""
    for layout in LAYOUTS[comm.size]:
        found, dropped = [], []
        for placed in (None, placement(layout.ep)):
            limited = replace(layout, moe_token_dispatcher=dispatch, expert_capacity_factor=0.6)
            with mesh_of(comm, VARIANT, limited, placed) as mesh:
                load = ExpertLoad()
                found.append(forward(mesh, load))
                totals = load.totals(mesh)
                dropped.append([(rows.tokens_per_expert, rows.dropped) for rows in totals])
        assert dropped[0] == dropped[1] and any(number for _, number in dropped[0])
        np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-9)


def test_the_fullest_rank_has_less_to_do(comm: MPI.Intracomm):
    layout = Layout(tp=comm.size, ep=comm.size)
    most = []
    for placed in (None, placement(layout.ep)):
        with mesh_of(comm, VARIANT, layout, placed) as mesh:
            load = ExpertLoad()
            forward(mesh, load)
            totals = [rows for rows in load.totals(mesh) if rows.phase == "prefill"]
            most.append(sum(max(rows.tokens_per_rank) for rows in totals))
            assert {sum(rows.tokens_per_rank) for rows in totals} == {
                TOKENS * routings()[0].shape[1]
            }
    assert most[1] < most[0]


def test_every_rank_holds_the_weights_of_its_experts_and_no_others(comm: MPI.Intracomm):
    weights = tiny_weights(VARIANT, np.float64)
    placed = placement(comm.size)
    with mesh_of(comm, VARIANT, Layout(tp=comm.size, ep=comm.size), placed) as mesh:
        for number, layer in enumerate(toy(VARIANT, mesh).layers):
            if isinstance(layer.ffn, MoELayer):
                own = placed.layers[number][mesh.ep.rank]
                assert sorted(layer.ffn.experts) == own
                for chosen in own:
                    name = f"model.layers.{number}.mlp.experts.{chosen}.down_proj.weight"
                    np.testing.assert_array_equal(
                        layer.ffn.experts[chosen].down.weight, weights[name]
                    )
