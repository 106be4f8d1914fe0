"""What the families with LayerNorm read from config.json."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import raw_config, tiny_config

from mpishard.config.active_options import active_options
from mpishard.config.model_config import MAX_POSITIONS, ModelConfig
from mpishard.config.reader import read_model_config
from mpishard.config.weight_specs import weight_specs
from mpishard.errors import UserError

ABSENT = object()


def read(variant: str, **changes: Any) -> ModelConfig:
    raw = {n: v for n, v in (raw_config(variant) | changes).items() if v is not ABSENT}
    return read_model_config(raw, None, "model/config.json")


def test_the_forms_of_falcon():
    def form(variant: str, **changes: Any) -> tuple[int, bool, int, str | None]:
        config = read(variant, **changes)
        norms = sum(weight.field.endswith("_norm") for weight in weight_specs(config))
        return config.kv_heads, config.parallel_residual, norms // config.layers, config.alibi

    assert form("falcon-mqa") == (1, True, 1, None)
    assert form("falcon-mqa", num_kv_heads=ABSENT) == (1, True, 1, None)
    assert form("falcon-mqa", multi_query=False) == (6, True, 1, None)
    assert form("falcon-new") == (3, True, 2, None)
    assert form("falcon-new", num_ln_in_parallel_attn=1) == (3, True, 1, None)
    assert form("falcon-new", num_kv_heads=ABSENT) == (6, True, 2, None)
    assert form("falcon-alibi") == (12, False, 2, "in bfloat16")
    assert read("falcon-mqa", ffn_hidden_size=ABSENT).ffn == 4 * 48


def test_names_that_two_versions_of_a_file_give_to_a_size():
    assert read("falcon-mqa", n_head=6, n_layer=2) == read("falcon-mqa")
    assert read("bloom-six", hidden_size=ABSENT, n_embed=30) == read("bloom-six")
    assert read("gpt2-layers", n_embd=ABSENT, hidden_size=30) == read("gpt2-layers")
    turned = {"rotary_pct": ABSENT, "rotary_emb_base": ABSENT}
    new = {"rope_type": "default", "rope_theta": 200, "partial_rotary_factor": 0.75}
    assert read("gpt_neox-parallel", rope_parameters=new, **turned) == read("gpt_neox-parallel")


def test_what_a_file_leaves_out():
    assert read("gpt2-unscaled").ffn == read("gpt2-unscaled", n_inner=ABSENT).ffn == 4 * 28
    assert read("gptj-partial", rotary_dim=None).rotary_dim == 10  # the whole head
    assert read("gptj-partial", n_embd=512, rotary_dim=ABSENT).rotary_dim == 64
    assert read("gpt_neox-parallel", use_parallel_residual=ABSENT).parallel_residual
    assert read("cohere-normed", logit_scale=ABSENT).logits_scale == 0.0625
    assert read("bloom-six").max_position_embeddings == MAX_POSITIONS
    assert read("mpt-clipped", attn_config=ABSENT).clip_qkv is None
    assert read("olmo-clipped", clip_qkv=None).clip_qkv is None


def test_learned_positions_are_rows_of_a_table():
    assert (read("gpt2-layers").learned_positions, read("gpt2-layers").position_offset) == (64, 0)
    assert (read("opt-plain").learned_positions, read("opt-plain").position_offset) == (66, 2)


REFUSALS = (
    ("gpt2-layers", {"hidden_size": 31}, "hidden_size = 31 contradicts n_embd = 30"),
    ("gpt2-layers", {"n_embd": 31}, "n_embd = 31 must be a multiple of num_attention_heads = 6"),
    ("gpt2-layers", {"n_head": ABSENT}, "n_head is missing: it must be a positive whole number"),
    ("gpt2-layers", {"rms_norm_eps": 1.0}, "which spells it layer_norm_epsilon"),
    ("gpt2-layers", {"activation_function": "mish"}, 'activation_function = "mish" is not impl'),
    ("gpt2-layers", {"add_cross_attention": True}, "asks for cross-attention, not implemented"),
    ("olmo-clipped", {"rms_norm_eps": 1.0}, "rms_norm_eps = 1.0 is not a field that is known for"),
    ("opt-plain", {"do_layer_norm_before": False}, "do_layer_norm_before = false is not impl"),
    ("opt-plain", {"word_embed_proj_dim": 20}, "word_embed_proj_dim = 20 is not implemented: 42"),
    ("opt-plain", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm = true is not"),
    (
        "bloom-six",
        {"apply_residual_connection_post_layernorm": True},
        "apply_residual_connection_post_layernorm = true is not implemented for bloom: false is",
    ),
    ("mpt-clipped", {"no_bias": False}, "no_bias = false is not implemented for mpt: true is"),
    ("mpt-clipped", {"attn_config": {"alibi": False}}, "attn_config.alibi = false is not impl"),
    ("mpt-clipped", {"attn_config": {"rope": True}}, "attn_config.rope = true is not a field"),
    ("falcon-new", {"parallel_attn": False}, "parallel_attn = false contradicts new_decoder_arch"),
    ("falcon-new", {"num_kv_heads": 4}, "must be a multiple of num_key_value_heads = 4"),
    ("falcon-mqa", {"num_ln_in_parallel_attn": 2}, "must be 1, or 2 for the new architecture"),
    ("gptj-partial", {"rotary_dim": 5}, "to rotate, not 5"),
    ("cohere2-windows", {"sliding_window": None}, "sliding_window = null must be a positive"),
    ("cohere2-windows", {"use_qk_norm": True}, "use_qk_norm = true is not implemented for cohere2"),
    ("phi-normed", {"attention_bias": False}, "attention_bias = false contradicts"),
)


@pytest.mark.parametrize("variant, changes, words", REFUSALS, ids=[row[2] for row in REFUSALS])
def test_refusals(variant, changes, words):
    with pytest.raises(UserError) as raised:
        read(variant, **changes)
    assert words in str(raised.value)


def test_options_in_use_are_said():
    assert active_options(tiny_config("gpt_neox-parallel")) == [
        "LayerNorm with weight and bias",
        "parallel residual with two norms",
        "no gate in the feed-forward network",
        "biases of q, k, v and o and feed-forward",
        "rope on 6 of a head's 8 elements",
    ]
    assert active_options(tiny_config("falcon-alibi"))[-1] == "ALiBi in bfloat16"
    assert "learned positions, position 0 in row 2" in active_options(tiny_config("opt-plain"))
    olmo = active_options(tiny_config("olmo-clipped"))
    assert olmo[0] == "LayerNorm with neither weight nor bias"
    assert "queries, keys and values cut off at 0.8" in olmo
    assert "norms of q and k with weights for each head" in active_options(
        tiny_config("stablelm-parallel")
    )
