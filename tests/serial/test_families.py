"""What single families read from config.json, and how options in use are said."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import raw_config, tiny_config

from mpishard.config.active_options import active_options
from mpishard.config.model_config import NO_ROPE, ModelConfig, Rope
from mpishard.config.reader import read_model_config
from mpishard.errors import UserError

ABSENT = object()


def read(variant: str, **changes: Any) -> ModelConfig:
    raw = {n: v for n, v in (raw_config(variant) | changes).items() if v is not ABSENT}
    return read_model_config(raw, None, "model/config.json")


def test_gemma3_spells_its_two_ropes_in_two_ways():
    old = read("gemma3-old")
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 300.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
    }
    without = {"rope_theta": ABSENT, "rope_scaling": ABSENT, "rope_local_base_freq": ABSENT}
    assert read("gemma3-old", rope_parameters=nested, **without).ropes == old.ropes
    defaults = read("gemma3-old", **without)
    assert [rope.theta for rope in defaults.ropes] == [1e4, 1e4, 1e6, 1e4, 1e4]


def test_layers_by_a_pattern():
    types = ["full_attention", "sliding_attention"] * 2 + ["full_attention"]
    assert read("gemma3-old").windows == (5, 5, None, 5, 5)
    assert read("gemma3-old", layer_types=types).windows == (None, 5, None, 5, None)
    assert read("exaone4-hybrid").windows == (6, None, 6)
    pattern = {"sliding_window_pattern": "LG", "layer_types": types[:3]}
    hybrid = read("exaone4-hybrid", **pattern)
    assert [rope == NO_ROPE for rope in hybrid.ropes] == [True, False, True]
    everywhere = read("exaone4-hybrid", sliding_window=None)
    assert everywhere.windows == (None,) * 3 and NO_ROPE not in everywhere.ropes


def test_smollm3_slides_where_it_has_no_rope():
    config = read("smollm3-nope")
    assert config.windows == (None, 5, None, 5)
    assert [rope == NO_ROPE for rope in config.ropes] == [False, True, False, True]
    by_interval = {"no_rope_layers": ABSENT, "no_rope_layer_interval": 3}
    config = read("smollm3-nope", use_sliding_window=False, **by_interval)
    assert config.windows == (None,) * 4
    assert [rope == NO_ROPE for rope in config.ropes] == [False, False, True, False]


def test_olmo3_has_its_own_theta_in_layers_with_a_window():
    old = read("olmo3-yarn", rope_parameters=ABSENT, rope_theta=77.0)
    assert [rope.theta for rope in old.ropes] == [500000.0, 77.0, 500000.0]


def test_longrope():
    rope = read("phi3-longrope").rope
    assert rope == Rope(
        *("longrope", 7.0, 64 / 11, 11),
        short_factors=(1.0, 1.2, 1.5),
        long_factors=(1.5, 2.5, 8.0),
    )
    assert [rope.frequency_length(length) for length in (1, 11, 12, 60)] == [0, 0, 12, 12]
    old = raw_config("phi3-longrope")["rope_scaling"] | {"type": "su"}
    assert read("phi3-longrope", rope_scaling=old).rope == rope


def test_partial_rotation_has_three_spellings():
    assert read("glm-partial").rotary_dim == 6
    assert read("glm4-partial").rotary_dim == 4
    assert read("glm4-partial", partial_rotary_factor=ABSENT, head_dim=12).rotary_dim == 6
    assert read("minimax_m2-partial").rotary_dim == 6
    assert read("minimax_m2-partial", rotary_dim=ABSENT).rotary_dim == 10


def test_llama4_has_chunks_where_it_has_rope():
    config = read("llama4-chunks")
    assert config.chunks == (6, None, 6, 6)
    warm = Rope("none", original_positions=4, query_scale_beta=0.4, query_scale_offset=1)
    assert config.ropes[1] == warm and config.ropes[0].kind == "llama3"
    assert config.moe is not None and config.moe.layers == (False, True, False, True)
    plain = read("llama4-chunks", attn_temperature_tuning=False, moe_layers=[0])
    assert plain.ropes[1] == NO_ROPE
    assert plain.moe is not None and plain.moe.layers == (True, False, False, False)
    assert read("llama4-chunks", attention_chunk_size=None).chunks == (None,) * 4
    types = ["chunked_attention", *["full_attention"] * 3]
    assert read("llama4-chunks", layer_types=types).chunks == (6, None, None, None)


def test_a_fixed_alpha_of_hunyuan():
    rope = read("hunyuan_v1_dense-alpha").rope
    assert (rope.kind, rope.factor, rope.frequency_length(60)) == ("ntk_alpha", 9.0, 0)


def test_ernie_decides_about_all_biases_at_once():
    config = read("ernie4_5_moe-clamped")
    assert config.moe is not None and config.moe.layers == (False, True, True, False)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.head_bias) == (True,) * 4
    config = read("ernie4_5_moe-clamped", use_bias=False, moe_layer_end_index=-1)
    assert config.moe is not None and config.moe.layers == (False, True, True, True)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.head_bias) == (False,) * 4


def test_phimoe_has_its_short_factors_at_all_lengths():
    rope = read("phimoe-mixer").rope
    assert rope.short_factors == rope.long_factors == (1.0, 1.2, 1.5, 2.0)
    assert rope.mscales == (1.1, 1.3)


REFUSALS = (
    ("smollm3-nope", {"no_rope_layers": [1, 2, 1, 0]}, "no_rope_layers = [1, 2, 1, 0] must be a"),
    ("smollm3-nope", {"no_rope_layers": [1, 0]}, "must have an entry for each of the 4 layers"),
    ("gemma3-old", {"sliding_window": None}, "sliding_window = null must be a positive"),
    (
        "gemma3-old",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        'rope_parameters.rope_type = "linear" is not a field that is known for gemma3_text',
    ),
    (
        "exaone4-hybrid",
        {"sliding_window_pattern": "LLLG"},
        'sliding_window_pattern = "LLLG" must be a positive whole number',
    ),
    ("glm-partial", {"head_dim": 10}, "to rotate, not 5"),
    (
        "phi3-longrope",
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1, 2, 3]}},
        "short_factor of the rope has 1 numbers, but heads have 3 pairs to rotate",
    ),
    (
        "phi3-longrope",
        {"rope_scaling": {"type": "longrope", "short_factor": [1, 0, 2], "long_factor": []}},
        "rope_scaling.short_factor = [1, 0, 2] must be a list of positive numbers",
    ),
    (
        "phi3-longrope",
        {"original_max_position_embeddings": 1},
        "original_max_position_embeddings = 1 must be above 1 for longrope",
    ),
    ("hunyuan_v1_moe-alpha", {"moe_topk": [2, 3]}, "moe_topk = [2, 3] is not implemented"),
    ("hunyuan_v1_moe-alpha", {"num_shared_expert": [2, 2]}, "num_shared_expert = 2 is not"),
    ("minimax_m2-partial", {"attn_type_list": [1, 0]}, "attn_type_list = [1, 0] is not impl"),
    ("mimo-plain", {"attention_bias": False}, "attention_bias = false contradicts"),
    (
        "llama4-chunks",
        {"attention_chunk_size": None, "layer_types": ["chunked_attention"] * 4},
        "has chunked_attention, but no attention_chunk_size",
    ),
    ("llama4-chunks", {"moe_layers": 1}, "moe_layers = 1 must be a list"),
    ("phimoe-mixer", {"num_experts_per_tok": 3}, "must be 2 for a sparsemixer, not 3"),
    ("ernie4_5_moe-clamped", {"moe_layer_end_index": -2}, "must be the number of a layer, or -1"),
    ("granite-plain", {"residual_multiplier": 0}, "residual_multiplier = 0 must be a positive"),
)


@pytest.mark.parametrize("variant, changes, words", REFUSALS, ids=[row[2] for row in REFUSALS])
def test_refusals(variant, changes, words):
    with pytest.raises(UserError) as raised:
        read(variant, **changes)
    assert words in str(raised.value)


def test_options_in_use_are_said():
    assert active_options(tiny_config("llama-mha")) == []
    assert active_options(tiny_config("gemma3-old")) == [
        "norms before and after sub-layers",
        "norms times 1 + weight",
        "norms of q and k by head",
        "scores times 0.377964",
        "rope default of theta 20 in 4 of 5 layers",
        "embeddings times 4.47214",
        "logits capped at 2.5",
    ]
    assert active_options(tiny_config("glm4_moe-partial")) == [
        "biases of q, k, v",
        "norms of q and k by head",
        "rope on 6 of a head's 12 elements",
        "experts weighted by sigmoid, normalized, times 1.6",
        "experts chosen by scores and a bias",
        "experts of 1 of 2 groups for a token",
    ]
    assert active_options(tiny_config("exaone4-hybrid"))[-1] == "no rope in 1 of 3 layers"
    assert "queries grow with their position, beta 0.3" in active_options(
        tiny_config("ministral3-scaled")
    )
