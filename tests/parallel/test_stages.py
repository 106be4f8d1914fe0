"""A pipeline stage is a decoder: some of the layers, and another entry or exit."""

from __future__ import annotations

import numpy as np
import pytest
from mpi4py import MPI
from tiny_models import separate_weights, tiny_config
from toys import meshes, toy

from mpishard.communication.mesh import Mesh
from mpishard.config.weight_specs import specs_of_shard
from mpishard.model import Decoder
from mpishard.sequences.step import pack

VARIANTS = ["llama-gqa", "gemma2-capped", "qwen3-mixed"]


def stage(variant: str, mesh: Mesh, layers: range, is_first: bool) -> Decoder:
    """The first stage or the last of two, with the weights of its own `layers` alone."""
    config, weights = tiny_config(variant), separate_weights(variant, np.float64)
    ends: tuple[str, ...] = ("embedding",) if is_first else ("norm", "head")
    ends += ("embedding",) if config.tied else ()
    shards = {
        weight.name: weights[weight.name][
            weight.slices(config, mesh.weight_sharding, mesh.shard_index)
        ]
        for weight in specs_of_shard(config, mesh.weight_sharding, mesh.shard_index)
        if weight.layer in layers or (weight.layer is None and weight.field in ends)
    }
    if is_first:
        return Decoder(config, shards, mesh, layers, exit=lambda model, x_nD, step: x_nD)
    received: list[np.ndarray] = []
    decoder = Decoder(config, shards, mesh, layers, entry=lambda model, step: received.pop())
    decoder.received = received  # type: ignore[attr-defined]
    return decoder


@pytest.mark.ranks(1, 2, 4)
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_stages_are_the_whole_to_the_bit(comm: MPI.Intracomm, variant: str):
    """A prompt and the token after it: the stages have caches of their own layers."""
    cut = tiny_config(variant).layers // 2
    for mesh in meshes(comm, variant):
        whole = toy(variant, mesh)
        first = stage(variant, mesh, range(cut), True)
        last = stage(variant, mesh, range(cut, whole.config.layers), False)
        models = (whole, first, last)
        caches = [model.allocate_cache(8, 7) for model in models]
        assert caches[1].k.shape[0] + caches[2].k.shape[0] == caches[0].k.shape[0]
        for ids in (np.arange(7), np.array([3])):
            steps = [
                pack([(ids, cache)], model.sequence_sharding)
                for model, cache in zip(models, caches, strict=True)
            ]
            expected_Mv = whole.forward(steps[0])
            last.received.append(first.forward(steps[1]))  # type: ignore[attr-defined]
            np.testing.assert_array_equal(last.forward(steps[2]), expected_Mv)
