"""Every sub-layer of tensor parallelism against the reference, in float64 at 1e-9: all variants,
all layouts, sequences of different lengths packed together, prompt and decode."""

from __future__ import annotations

import numpy as np
import pytest
from mpi4py import MPI
from tiny_models import VARIANTS
from toys import meshes, oracle, toy, whole_logits

from mpishard.arithmetic.packed import Step, pack
from mpishard.communication.mesh import Mesh
from mpishard.model import Decoder
from mpishard.parallel import tensor

pytestmark = [pytest.mark.ranks, pytest.mark.parametrize("variant", VARIANTS)]

LENGTHS = (5, 1, 13)  # fewer, equal and more than most windows


def agree(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def streams(model: Decoder) -> list[np.ndarray]:
    """A made-up residual stream for each of several sequences."""
    random = np.random.RandomState(7)
    return [random.standard_normal((length, model.config.hidden)) for length in LENGTHS]


def attend_in_two_steps(model: Decoder, layer: int, mesh: Mesh) -> list[np.ndarray]:
    """The attention of `layer` for each sequence, its last position fed in a second step (unless
    that changes the frequencies of the first: then the engine, too, feeds it all at once)."""
    x = streams(model)
    weights = model.layers[layer].attention
    caches = [model.new_cache(length) for length in LENGTHS]
    outputs: list[list[np.ndarray]] = [[] for _ in LENGTHS]
    at_once = any(model.depends_on_length(length) for length in LENGTHS)
    for new in [slice(None)] if at_once else [slice(0, -1), slice(-1, None)]:
        fed = [place for place, x_SD in enumerate(x) if len(x_SD[new])]
        step: Step = pack([(np.zeros(len(x[p][new]), int), caches[p]) for p in fed])
        x_ND = np.concatenate([x[place][new] for place in fed])
        y_ND = tensor.attention(x_ND, weights, layer, step, model.turn(step), mesh)
        for place, segment in zip(fed, step.segments, strict=True):
            outputs[place].append(y_ND[segment.new])
    return [np.concatenate(parts) for parts in outputs]


def test_embedding(comm: MPI.Intracomm, variant: str):
    for mesh in meshes(comm, variant):
        model = toy(variant, mesh)
        ids_N = np.arange(model.config.vocab)[::-1]
        x_ND = tensor.embed(ids_N, model.embedding_vD, model.first_id, mesh)
        agree(x_ND, oracle(variant).weights["model.embed_tokens.weight"][ids_N])


def test_attention(comm: MPI.Intracomm, variant: str):
    reference = oracle(variant)
    for mesh in meshes(comm, variant):
        model = toy(variant, mesh)
        for layer, window in enumerate(model.config.windows):
            found = attend_in_two_steps(model, layer, mesh)
            for x_SD, y_SD in zip(streams(model), found, strict=True):
                name = f"model.layers.{layer}.self_attn"
                agree(y_SD, reference.attention(x_SD, name, window))


def test_feed_forward(comm: MPI.Intracomm, variant: str):
    reference = oracle(variant)
    for mesh in meshes(comm, variant):
        model = toy(variant, mesh)
        x_ND = np.concatenate(streams(model))
        for layer, weights in enumerate(model.layers):
            y_ND = tensor.feed_forward(x_ND, weights.ffn, mesh)
            agree(y_ND, reference.feed_forward(x_ND, f"model.layers.{layer}.mlp"))


def test_logits(comm: MPI.Intracomm, variant: str):
    reference = oracle(variant)
    head = "model.embed_tokens" if reference.config.tied else "lm_head"
    for mesh in meshes(comm, variant):
        model = toy(variant, mesh)
        x_MD = np.concatenate(streams(model))
        logits_MV = whole_logits(tensor.logits(x_MD, model.head_vD), model)
        agree(logits_MV, x_MD @ reference.weights[f"{head}.weight"].T)
