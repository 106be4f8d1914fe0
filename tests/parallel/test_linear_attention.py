"""Linear attention over cp: what it sends, and states that are carried through chunks and decode,
against the reference. The sweeps over all variants have the layouts without cp."""

from __future__ import annotations

import numpy as np
import pytest
from mpi4py import MPI
from tiny_models import tiny_config
from toys import oracle, toy

from mpishard.communication.mesh import Mesh
from mpishard.config.layout import Layout
from mpishard.engine.generate import generate
from mpishard.engine.sampling_params import SamplingParams
from mpishard.engine.scheduler import SchedulerConfig
from mpishard.engine.sequence import Request
from mpishard.model import Decoder
from mpishard.parallel.linear_attention import GatedDeltaNet, runs_of
from mpishard.sequences.step import pack

VARIANT = "qwen3_next-mixed"
CONFIG = tiny_config(VARIANT)


def calls_of_layer(model: Decoder, lengths: list[int], start: int) -> dict[str, tuple[int, float]]:
    """Calls and bytes sent by one layer's `recur` of sequences that are extended by `lengths`
    tokens at position `start`."""
    caches = [model.allocate_cache(start + length, start or None) for length in lengths]
    if start:
        pack([(np.zeros(start, int), cache) for cache in caches], model.sequence_sharding)
    chunks = [(np.zeros(n, int), cache) for n, cache in zip(lengths, caches, strict=True)]
    step, w = pack(chunks, model.sequence_sharding), model.layers[0].attention
    assert isinstance(w, GatedDeltaNet)
    inputs = w.project(np.ones((len(step.ids_N), CONFIG.hidden)))
    model.mesh.ledger.clear()
    model.recur(inputs, w, 0, step, model.mesh)
    return {what: (entry.calls, entry.wire_bytes) for what, _, entry in model.mesh.ledger}


@pytest.mark.ranks(2, 3, 4)
def test_first_chunks_send_maps_and_the_rows_of_convolutions(comm: MPI.Intracomm):
    """Whose size does not depend on the length of a prompt."""
    mesh = Mesh.split(comm, Layout(cp=comm.size), CONFIG)
    model, linear = toy(VARIANT, mesh), CONFIG.linear_attention
    assert linear is not None
    one_map = linear.heads * linear.key_width * (linear.key_width + linear.value_width)
    tail = (linear.taps - 1) * linear.channels
    sent = []
    for length in (12 * comm.size, 700):
        runs = 2 if mesh.cp.rank < comm.size - 1 else 1  # the last rank's two blocks are neighbours
        expected = 8 * (comm.size - 1) * runs * (one_map + tail)
        (found,) = calls_of_layer(model, [length], 0).values()
        assert found == (2, expected)
        sent.append(found)
    assert sent[0] == sent[1]
    mesh.free()


@pytest.mark.ranks(2, 3)
def test_extends_gather_the_inputs_of_the_new_tokens(comm: MPI.Intracomm):
    mesh = Mesh.split(comm, Layout(cp=comm.size), CONFIG)
    model, linear = toy(VARIANT, mesh), CONFIG.linear_attention
    assert linear is not None
    (found,) = calls_of_layer(model, [2, 1], comm.size * 4).values()
    # Tokens go to the ranks in turn: positions 4 R and 4 R + 1, and 4 R again.
    tokens = {0: 2, 1: 1}.get(mesh.cp.rank, 0)
    assert found == (1, 8 * (comm.size - 1) * tokens * (linear.channels + 2 * linear.heads))
    mesh.free()


@pytest.mark.ranks(2, 3, 4)
def test_states_are_carried_through_chunks_batches_and_decode(comm: MPI.Intracomm):
    """Greedy tokens of prompts shorter than the convolution, than the ranks, and of several chunks,
    in batches in which sequences come and go."""
    random = np.random.RandomState(3)
    prompts = [random.randint(0, CONFIG.vocab, n).tolist() for n in (1, 2, 5, 19, 33, 19)]
    prompts[-1] = prompts[3][:15] + prompts[-1][15:]  # with a prefix in common
    reference = oracle(VARIANT)
    for layout, limits in (
        (Layout(cp=comm.size), SchedulerConfig(chunked_prefill_size=7, max_num_seqs=3)),
        (
            Layout(cp=comm.size, cp_order="contiguous", cp_kv_cache_interleave_size=3),
            SchedulerConfig(),
        ),
    ):
        mesh = Mesh.split(comm, layout, CONFIG)
        params = SamplingParams(max_tokens=4)
        requests = [Request(place, ids, params) for place, ids in enumerate(prompts)]
        outputs = generate(toy(VARIANT, mesh), requests, limits=limits)
        assert [out.ids for out in outputs] == [reference.greedy(ids, 4) for ids in prompts]
        mesh.free()


def test_runs_are_in_the_order_of_the_sequences():
    mesh = Mesh.split(MPI.COMM_SELF, Layout(), CONFIG)
    model = toy(VARIANT, mesh)
    for length, cp in ((1, 3), (5, 2), (40, 4)):
        sharding = type(model.sequence_sharding)(cp=cp)
        step = pack([(np.zeros(length, int), model.allocate_cache(length))] * 1, sharding)
        runs = runs_of(step.first_chunks)
        ends = np.cumsum([0, *(run.length for run in runs)])
        assert [run.start for run in runs] == ends[:-1].tolist()
        assert ends[-1] == length
    mesh.free()
