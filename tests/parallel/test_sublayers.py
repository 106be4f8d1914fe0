"""Sub-layers alone, in all forms of parallelism, against the reference, in float64 at 1e-9, so that
a fault is seen where it is: sequences of different lengths packed together, prompt and decode."""

from __future__ import annotations

import numpy as np
import pytest
from mpi4py import MPI
from sweep import swept
from toys import meshes, oracle, slices, toy, whole_logits

from mpishard.communication.mesh import Mesh
from mpishard.config.layout import block
from mpishard.model import Decoder
from mpishard.parallel import tensor
from mpishard.sequences.step import Step, pack

# Biases; few, one and uneven key/value heads; windows; norms of heads; dynamic RoPE; learned
# positions, whose first rows are not used; ALiBi; a head with a bias.
VARIANTS = """
    llama-bias llama-gqa llama-mqa mistral-window qwen3-mixed llama-dynamic-old opt-plain
    falcon-grouped-alibi phi-normed
""".split()

pytestmark = [pytest.mark.ranks(1, 2, 3, 4), pytest.mark.parametrize("variant", VARIANTS)]

LENGTHS = (5, 1, 13)  # fewer, equal and more than most windows


def agree(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def streams(model: Decoder) -> list[np.ndarray]:
    """A made-up residual stream for each of several sequences."""
    random = np.random.RandomState(7)
    return [random.standard_normal((length, model.config.hidden)) for length in LENGTHS]


def attend_in_steps(model: Decoder, layer: int) -> list[np.ndarray]:
    """The attention of `layer` for each sequence, fed in three steps: most of it, two tokens, one
    (unless that changes the frequencies of the first: then the engine, too, feeds it all at
    once)."""
    x = streams(model)
    weights = model.layers[layer].attention
    at_once = any(model.uses_dynamic_rope(length) for length in LENGTHS)
    cuts = [slice(None)] if at_once else [slice(0, -3), slice(-3, -1), slice(-1, None)]
    fed = [[len(x_SD[new]) for x_SD in x] for new in cuts]
    firsts = [next(filter(None, counts)) for counts in zip(*fed, strict=True)]
    caches = [
        model.allocate_cache(length, first) for length, first in zip(LENGTHS, firsts, strict=True)
    ]
    outputs: list[list[np.ndarray]] = [[] for _ in LENGTHS]
    for new, counts in zip(cuts, fed, strict=True):
        here = [place for place, count in enumerate(counts) if count]
        feeds = [(np.zeros(counts[place], int), caches[place]) for place in here]
        step = pack(feeds, model.sequence_sharding)
        x_nD = mine(np.concatenate([x[place][new] for place in here]), step, model.mesh)
        rope = model.rope(step)[layer]
        y_nD = model.stream.attention(x_nD, weights, layer, step, rope, model.attend, model.mesh)
        y_WD = model.gather_sequence(y_nD, step)
        for place, tokens in zip(here, slices(step), strict=True):
            outputs[place].append(y_WD[tokens])
    return [np.concatenate(parts) for parts in outputs]


def mine(x_WD: np.ndarray, step: Step, mesh: Mesh) -> np.ndarray:
    """This rank's rows of the residual stream of all tokens of a step."""
    x_ND = x_WD[step.global_index[mesh.cp.rank]]
    if not mesh.layout.sequence_parallel:
        return x_ND
    return x_ND[block(len(x_ND), mesh.tp.size, mesh.tp.rank)]


def test_embedding(comm: MPI.Intracomm, variant: str):
    weights = oracle(variant).weights
    for mesh in meshes(comm, variant, swept(comm.size, variant)):
        model = toy(variant, mesh)
        ids_W = np.arange(model.config.vocab)[: model.config.max_position_embeddings][::-1]
        step = pack([(ids_W, model.allocate_cache(len(ids_W)))], model.sequence_sharding)
        x_nD = model.stream.embed(model.embedding, step, mesh)
        expected = weights["model.embed_tokens.weight"][ids_W]
        if model.config.learned_positions:
            rows = slice(model.config.position_offset, model.config.position_offset + len(ids_W))
            expected = expected + weights["model.embed_positions.weight"][rows]
        agree(model.gather_sequence(x_nD, step), expected)


def test_attention(comm: MPI.Intracomm, variant: str):
    reference = oracle(variant)
    for mesh in meshes(comm, variant, swept(comm.size, variant)):
        model = toy(variant, mesh)
        for layer in range(model.config.layers):
            found = attend_in_steps(model, layer)
            for x_SD, y_SD in zip(streams(model), found, strict=True):
                agree(y_SD, reference.attention(x_SD, layer))


def test_feed_forward(comm: MPI.Intracomm, variant: str):
    reference = oracle(variant)
    for mesh in meshes(comm, variant, swept(comm.size, variant)):
        model = toy(variant, mesh)
        x_WD = np.concatenate(streams(model))
        step = pack(
            [(np.zeros(len(x_WD), int), model.allocate_cache(len(x_WD)))], model.sequence_sharding
        )
        x_nD = mine(x_WD, step, mesh)
        for layer, weights in enumerate(model.layers):
            y_nD = model.stream.feed_forward(x_nD, weights.ffn, step, mesh)
            expected = reference.feed_forward(x_WD, f"model.layers.{layer}.mlp")
            agree(model.gather_sequence(y_nD, step), expected)


def test_logits(comm: MPI.Intracomm, variant: str):
    """The rows that are wanted, wherever they are, times the head."""
    reference = oracle(variant)
    head = "model.embed_tokens" if reference.config.tied else "lm_head"
    for mesh in meshes(comm, variant, swept(comm.size, variant)):
        model = toy(variant, mesh)
        x = streams(model)
        feeds = [(np.zeros(len(x_SD), int), model.allocate_cache(len(x_SD))) for x_SD in x]
        step = pack(feeds, model.sequence_sharding)
        x_MD = model.stream.select_logits_rows(mine(np.concatenate(x), step, mesh), step, mesh)
        assert model.head is not None
        logits_MV = whole_logits(tensor.logits(x_MD, model.head), model, step)
        last_MD = np.array([x_SD[-1] for x_SD in x])
        bias_V = reference.weights["lm_head.bias"] if reference.config.head_bias else 0
        agree(logits_MV, last_MD @ reference.weights[f"{head}.weight"].T + bias_V)
