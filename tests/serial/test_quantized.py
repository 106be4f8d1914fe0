"""Quantized checkpoints: every storage form, and how each damage is refused."""

from __future__ import annotations

import numpy as np
import pytest
from quantized_models import MODELS, drawn, write_quantized

from mpishard.config.weight_sharding import WeightSharding
from mpishard.config.weight_specs import specs_of_shard
from mpishard.storage.source import open_source
from mpishard.storage.weights import load_weights


@pytest.mark.parametrize("form", MODELS)
def test_every_part_is_what_the_codes_mean(tmp_path, form):
    source = open_source(write_quantized(form, tmp_path))
    _, numbers = drawn(form)
    for tp in (1, 3, 5):
        for rank in range(tp):
            loaded = load_weights(source, WeightSharding(tp), rank)
            for weight in specs_of_shard(source.config, WeightSharding(tp), rank):
                slices = weight.slices(source.config, WeightSharding(tp), rank)
                np.testing.assert_array_equal(
                    loaded[weight.name], numbers[weight.name][slices], weight.name
                )
