"""Expert parallelism: mixtures on every layout against the reference and transformers, and what is
sent against its closed form."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import covering
import numpy as np
import pytest
from mpi4py import MPI
from tiny_models import MOE_VARIANTS, tiny_config
from toys import (
    AXES,
    MANY,
    REPRESENTATIVES,
    Recorder,
    dealt,
    degrees,
    every_mixture,
    has_effect,
    layout_of,
    mesh_of,
    oracle,
    slices,
    switched,
    tokens_of_ranks,
    toy,
    whole_logits,
)

from mpishard.communication.mesh import Mesh
from mpishard.config.layout import TOKEN_DISPATCHERS, Layout, block
from mpishard.config.layout_checks import check_experts
from mpishard.engine.generate import generate
from mpishard.engine.sampling_params import SamplingParams
from mpishard.engine.scheduler import SchedulerConfig
from mpishard.engine.sequence import Request
from mpishard.errors import UserError
from mpishard.parallel.data import assign_requests
from mpishard.parallel.expert import MoELayer
from mpishard.sequences.step import pack

pytestmark = pytest.mark.ranks

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_TOLERANCE = 2e-4  # of the logits' standard deviation


def expert_layouts(ranks: int, variant: str) -> list[Layout]:
    """Every ``dp * cp * tp`` of `ranks` ranks with every `ep` that fits it, in forms that go round;
    more ranks take turns in them, and many divide a covering design, unless all is asked for."""
    if ranks in MANY and not covering.exhaustive:
        return _designed(ranks)[variant]
    config, number, found = tiny_config(variant), list(MOE_VARIANTS).index(variant), []
    for place, plain in enumerate(degrees(ranks)):
        for ep in range(1, ranks + 1):
            layout = switched(plain, config, 37 * number + 29 * place + 7 * ep)
            layout = replace(
                layout, ep=ep, moe_token_dispatcher=TOKEN_DISPATCHERS[(place + ep) % 2]
            )
            if _fits(variant, layout):
                found.append(layout)
    return found if ranks <= 2 else found[number % 3 :: 3]


@functools.cache
def _designed(ranks: int) -> dict[str, list[Layout]]:
    """Layouts in which every two of the degrees, the forms and the ways to divide experts meet."""
    axes = AXES | {
        "degrees": degrees(ranks),
        "ep": range(1, ranks + 1),
        "moe_token_dispatcher": TOKEN_DISPATCHERS,
    }
    del axes["cp_kv_cache_interleave_size"]  # of the cache alone

    def allowed(row: covering.Row) -> bool:
        layout = layout_of(row)
        return any(has_effect(layout, shares) for shares in fitting(row).values())

    def fits(row: covering.Row, variant: str) -> bool:
        shares = fitting(row)
        return variant in shares and has_effect(layout_of(row), shares[variant])

    def fitting(row: covering.Row) -> dict[str, bool]:
        return _fitting(row["degrees"], row["ep"])

    mixtures = [variant for variant in REPRESENTATIVES if variant in MOE_VARIANTS]
    return dealt(covering.covering(axes, allowed=allowed), mixtures, fits)


@functools.cache
def _fitting(plain: Layout, ep: int) -> dict[str, bool]:
    """The mixtures that can be divided so, and whether their heads share key/value heads."""
    found = {}
    for variant in MOE_VARIANTS:
        config = tiny_config(variant)
        if variant in REPRESENTATIVES and _fits(variant, replace(plain, ep=ep)):
            found[variant] = config.heads > config.kv_heads
    return found


def _fits(variant: str, layout: Layout) -> bool:
    config = tiny_config(variant)
    try:
        check_experts(config, layout, [])
    except UserError:
        return False
    return layout.tp <= config.heads


def expert_meshes(comm: MPI.Intracomm, variant: str) -> Iterator[Mesh]:
    """A mesh of each of the `expert_layouts` of the ranks of `comm`."""
    for layout in expert_layouts(comm.size, variant):
        with mesh_of(comm, variant, layout) as mesh:
            yield mesh


@every_mixture
def test_float32_agrees_with_transformers(comm: MPI.Intracomm, variant: str):
    golden = np.load(GOLDEN / f"{variant}.npz")
    prompts = [golden["ids_0"], golden["ids_1"]]
    for mesh in expert_meshes(comm, variant):
        model = toy(variant, mesh, np.float32)
        feeds = [(ids_S, model.allocate_cache(len(ids_S))) for ids_S in prompts]
        step = pack(feeds, model.sequence_sharding, all_logits=True)
        logits_WV = whole_logits(model.forward(step), model, step)
        for place, new in enumerate(slices(step)):
            expected = golden[f"logits_{place}"]
            error = np.abs(logits_WV[new] - expected).max() / expected.std()
            assert error < GOLDEN_TOLERANCE, f"{mesh.layout}: {error} of the standard deviation"


@pytest.mark.parametrize("chunk", [None, 4])
@every_mixture
def test_every_step_is_the_references(comm: MPI.Intracomm, variant: str, chunk: int | None):
    """Replicas that share experts step together, with unequal work and with none."""
    reference = oracle(variant)
    vocab = reference.config.vocab
    random = np.random.RandomState(5)
    requests = [
        Request(
            index, random.randint(0, vocab, length).tolist(), SamplingParams(max_tokens=max_tokens)
        )
        for index, (length, max_tokens) in enumerate([(9, 3), (1, 5), (14, 1)])
    ]
    for mesh in expert_meshes(comm, variant):
        model = Recorder(toy(variant, mesh))
        mine = [requests[place] for place in assign_requests(len(requests), mesh)]
        answers = generate(model, mine, limits=SchedulerConfig(chunked_prefill_size=chunk))
        for request, answer in zip(mine, answers, strict=True):
            assert answer.ids == reference.greedy(request.ids, request.params.max_tokens), (
                mesh.layout
            )
        segments = [segment for step in model.steps for segment in step.segments]
        caches = list({id(segment.cache): segment.cache for segment in segments}.values())
        sequences = [r.ids + answer.ids for r, answer in zip(mine, answers, strict=True)]
        for step, logits_Mv, asked in zip(model.steps, model.logits, model.asked, strict=True):
            found_MV = whole_logits(logits_Mv, model, step)
            for found_V, (cache, length) in zip(found_MV, asked, strict=True):
                expected_V = reference.forward(sequences[caches.index(cache)][:length])[0][-1]
                np.testing.assert_allclose(found_V, expected_V, rtol=0, atol=1e-9)


@every_mixture
def test_what_is_sent(comm: MPI.Intracomm, variant: str):
    """Rows by the experts that the reference's router chooses, token by token."""
    config, reference = tiny_config(variant), oracle(variant)
    moe = config.moe
    assert moe is not None
    ids = np.random.RandomState(3).randint(0, config.vocab, 13)
    chosen = {layer: r.experts_SA for layer, r in reference.routings(ids.tolist()).items()}
    for mesh in expert_meshes(comm, variant):
        layout = mesh.layout
        model = toy(variant, mesh)
        feeds = [(ids, model.allocate_cache(len(ids)))] if mesh.dp.rank == 0 else []
        mesh.ledger.clear()
        model.forward(pack(feeds, model.sequence_sharding))
        tokens = tokens_of_ranks(mesh, model, len(ids))  # of every rank that shares the experts
        row, e = config.hidden * 8, 8
        mine = tokens[mesh.moe.rank]
        if layout.moe_token_dispatcher == "all-gather":
            per_layer = (8 + len(mine) * (row + moe.top_k * (8 + e))) * (mesh.moe.size - 1)
            entry = mesh.ledger["all_gather", "moe"]
            assert entry.calls == 4 * len(chosen)
            assert entry.wire_bytes == per_layer * len(chosen)
            entry = mesh.ledger["reduce_scatter", "moe"]
            everyone = sum(map(len, tokens))
            assert entry.wire_bytes == (everyone - len(mine)) * row * len(chosen)
            continue
        assert mesh.ledger["all_gather", "moe"].calls == len(chosen)
        counts = 8 * moe.num_experts * (mesh.moe.size - 1) * len(chosen)
        assert mesh.ledger["all_gather", "moe"].wire_bytes == counts
        own = range(moe.num_experts)[block(moe.num_experts, mesh.ep.size, mesh.ep.rank)]
        etp = mesh.etp.size
        column = [tokens[rank * etp + mesh.etp.rank] for rank in range(mesh.ep.size)]
        wire = came = 0
        for experts_SA in chosen.values():
            away = ~np.isin(experts_SA[mine], own)
            arriving = [np.isin(experts_SA[there], own).sum() for there in column]
            arriving[mesh.ep.rank] = 0
            wire += int(away.sum()) + int(sum(arriving))
            came += int(sum(np.isin(experts_SA[there], own).sum() for there in column))
        entry = mesh.ledger["all_to_all", "ep"]
        assert entry.calls == 2 * len(chosen)
        assert entry.wire_bytes == wire * row
        assert mesh.ledger["all_gather", "etp"].payload_bytes == came * row


@pytest.mark.ranks(2)
def test_all_tokens_for_one_expert_and_none_for_the_others(comm: MPI.Intracomm):
    """A router that always chooses the same: other ranks have nothing to do, and take part."""
    variant = "mixtral-full"
    for dispatch in TOKEN_DISPATCHERS:
        for layout in (Layout(tp=2, ep=2), Layout(tp=2, ep=1), Layout(dp=2, ep=2)):
            with mesh_of(comm, variant, replace(layout, moe_token_dispatcher=dispatch)) as mesh:
                model = toy(variant, mesh)
                for layer in model.layers:
                    assert isinstance(layer.ffn, MoELayer)
                    layer.ffn.gate.weight[:] = 0  # equal scores: the lowest experts are taken
                reference = oracle(variant)
                for name in reference.weights:
                    if name.endswith("gate.weight"):
                        reference.weights[name][:] = 0
                request = Request(0, [5], SamplingParams(max_tokens=3))
                mine = [request][: 1 if mesh.dp.rank == 0 else 0]
                answers = generate(model, mine)
                assert [a.ids for a in answers] == [reference.greedy([5], 3) for _ in mine]
