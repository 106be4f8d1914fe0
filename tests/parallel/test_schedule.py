"""What is communicated: the ledger of the tensor-parallel forward pass against its closed form, and
the silence between replicas."""

from __future__ import annotations

import numpy as np
import pytest
from mpi4py import MPI
from tiny_models import VARIANTS, tiny_config
from toys import meshes, toy

from mpishard.arithmetic.packed import pack
from mpishard.communication.mesh import Mesh
from mpishard.engine.generate import Request, generate
from mpishard.engine.sampling import Sampling
from mpishard.parallel.data import deal

pytestmark = pytest.mark.ranks

PROMPTS = ([3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5])


def seen(mesh: Mesh) -> dict[tuple[str, str], tuple[int, int, float]]:
    """What the ledger holds: (calls, payload bytes, wire bytes) of each operation and group."""
    return {
        (operation, group): (entry.calls, entry.payload_bytes, entry.wire_bytes)
        for operation, group, entry in mesh.ledger
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_forward_pass_is_two_all_reduces_a_layer_and_one_for_the_embedding(
    comm: MPI.Intracomm, variant: str, dtype: type
):
    """Tokens x hidden each; 2 (p-1)/p of that on the wire; nothing else, in no group."""
    for mesh in meshes(comm, variant):
        model = toy(variant, mesh, dtype)
        caches = [model.new_cache(9) for _ in PROMPTS]
        for fed in (PROMPTS, [[1]] * len(PROMPTS)):  # prompts, then a decode step
            step = pack([(np.array(ids), cache) for ids, cache in zip(fed, caches, strict=True)])
            mesh.ledger.clear()
            model.forward(step)
            calls = 2 * model.config.layers + 1
            tokens = sum(map(len, fed))
            payload = calls * tokens * model.config.hidden * np.dtype(dtype).itemsize
            p = mesh.tp.size
            wire = pytest.approx(2 * (p - 1) / p * payload)
            assert seen(mesh) == {("all_reduce", "tp"): (calls, payload, wire)}


def test_a_greedy_token_costs_one_all_gather_of_a_candidate_for_each_sequence(
    comm: MPI.Intracomm,
):
    """(p-1) * sequences * (4 bytes of logit + 8 of id) on the wire."""
    for mesh in meshes(comm, "llama-gqa"):
        model = toy("llama-gqa", mesh, np.float32)
        mesh.ledger.clear()
        generate(model, [Request(index, ids, 4) for index, ids in enumerate(PROMPTS)])
        steps, sent = 4, 4 * len(PROMPTS) * 12
        assert mesh.ledger["all_gather", "tp"].calls == steps
        assert mesh.ledger["all_gather", "tp"].payload_bytes == sent
        assert mesh.ledger["all_gather", "tp"].wire_bytes == (mesh.tp.size - 1) * sent
        assert mesh.ledger["all_reduce", "tp"].calls == steps * (2 * model.config.layers + 1)
        assert set(seen(mesh)) == {("all_gather", "tp"), ("all_reduce", "tp")}


@pytest.mark.parametrize(
    "sampling, gathers, broadcasts",
    [
        (Sampling(temperature=1), 1, 0),
        (Sampling(temperature=1, top_k=3), 1, 1),
        (Sampling(temperature=1, top_k=9, min_p=0.1), 1, 1),
        (Sampling(temperature=1, top_k=5, top_p=0.5), 1, 1),
        (Sampling(temperature=1, top_p=0.5), 2, 1),
    ],
)
def test_a_sampled_token_costs_what_its_filters_need(
    comm: MPI.Intracomm, sampling: Sampling, gathers: int, broadcasts: int
):
    for mesh in meshes(comm, "llama-gqa"):
        model = toy("llama-gqa", mesh, np.float32)
        mesh.ledger.clear()
        generate(model, [Request(0, [1, 2, 3], 2, sampling)])
        assert mesh.ledger["all_gather", "tp"].calls == 2 * gathers
        assert mesh.ledger["broadcast", "tp"].calls == 2 * broadcasts


def test_replicas_never_meet_in_the_forward_pass(comm: MPI.Intracomm):
    for mesh in meshes(comm, "qwen3-mixed"):
        model = toy("qwen3-mixed", mesh)
        requests = [Request(index, [1 + index], 5) for index in range(7)]
        generate(model, [requests[place] for place in deal(len(requests), mesh)])
        assert {group for _, group in seen(mesh)} <= {"tp"}


def test_the_embedding_and_the_cache_are_divided(comm: MPI.Intracomm):
    """No rank holds more than its share: the bytes of each rank's large weights and cache."""
    config = tiny_config("llama-gqa")
    for mesh in meshes(comm, "llama-gqa"):
        model = toy("llama-gqa", mesh)
        rows = comm.allgather(len(model.embedding_vD))
        assert sum(rows) == config.vocab * mesh.layout.dp
        assert max(rows) - min(rows) <= 1
        kv_heads = mesh.tp.comm.allgather(model.new_cache(4).k.shape[1])
        held = max(config.kv_heads, mesh.tp.size)  # where ranks share a head, each has it
        assert sum(kv_heads) == held
