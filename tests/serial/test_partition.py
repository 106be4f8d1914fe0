"""The table of weights and the layouts: whatever the sizes, the shards joined are the whole."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from tiny_models import MOE_VARIANTS, VARIANTS, tiny_config, tiny_weights

from mpishard.config import weight_specs as weight_specs_module
from mpishard.config.layout import (
    AXES,
    LAYOUT_OPTIONS,
    Layout,
    block,
    block_sizes,
    kv_heads_of,
    kv_replica_ranks,
    layout_options,
    query_heads_of,
)
from mpishard.config.layout_checks import (
    NEEDS,
    check_experts,
    check_flash_decoding,
    check_tensor_parallel,
    make_layout,
)
from mpishard.config.model_config import ModelConfig
from mpishard.config.weight_sharding import WeightSharding
from mpishard.config.weight_specs import (
    check_weight_sharding,
    missing_weights,
    specs_of_shard,
    weight_specs,
)
from mpishard.errors import UserError, WrongRanks

# (query heads, key/value heads): all, groups, one; powers of two and not
HEADS = [(h, g) for h in range(1, 13) for g in range(1, h + 1) if h % g == 0]
MANY_HEADS = [(28, 4), (32, 8), (40, 10), (64, 8), (71, 1)]


def config_of(heads: int, kv_heads: int, variant: str = "llama-bias") -> ModelConfig:
    return replace(tiny_config(variant), heads=heads, kv_heads=kv_heads)


def every_layout(
    sizes: list[tuple[int, int]] = HEADS + MANY_HEADS,
) -> Iterator[tuple[ModelConfig, int]]:
    for heads, kv_heads in sizes:
        for tp in range(1, heads + 1):
            yield config_of(heads, kv_heads), tp


def join(shards: list[np.ndarray], parts: list[slice], axis: int) -> np.ndarray:
    """The shards end to end, of those that hold the same slice only the first."""
    first = {(part.start, part.stop): shard for part, shard in zip(parts, shards, strict=True)}
    return np.concatenate(list(first.values()), axis)


def test_blocks_cover_a_range_in_order_and_differ_by_at_most_one():
    for length in range(12):
        for parts in range(1, 15):
            whole = range(length)
            blocks = [whole[block(length, parts, index)] for index in range(parts)]
            assert [i for indices in blocks for i in indices] == list(whole)
            assert block_sizes(length, parts) == [len(indices) for indices in blocks]
            assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


def test_shards_joined_are_the_whole_for_every_weight_and_layout():
    for config, tp in every_layout(HEADS):
        for weight in weight_specs(replace(config, layers=1)):
            whole = np.arange(np.prod(weight.shape)).reshape(weight.shape)
            slices = [weight.slices(config, WeightSharding(tp), rank) for rank in range(tp)]
            shards = [whole[sharding] for sharding in slices]
            assert [shard.shape for shard in shards] == [
                weight.shard_shape(config, WeightSharding(tp), rank) for rank in range(tp)
            ]
            if weight.axis is None:
                assert all((shard == whole).all() for shard in shards)
                continue
            joined = join(shards, [sharding[weight.axis] for sharding in slices], weight.axis)
            np.testing.assert_array_equal(joined, whole, f"{weight.name}, tp {tp}")


def test_the_proof_of_coverage_holds_for_every_layout():
    assert [
        config for config, tp in every_layout() if missing_weights(config, WeightSharding(tp))
    ] == []


def test_a_width_smaller_than_tp_leaves_ranks_with_nothing_and_still_covers():
    config = replace(config_of(8, 4), vocab=5, ffn=3)
    assert missing_weights(config, WeightSharding(8)) == []
    down = next(weight for weight in weight_specs(config) if weight.field == "down")
    assert [down.shard_shape(config, WeightSharding(8), rank)[1] for rank in range(8)] == [
        1,
        1,
        1,
        0,
        0,
        0,
        0,
        0,
    ]


def test_each_query_head_lies_once_beside_its_own_kv_head():
    for config, tp in every_layout():
        per_kv = config.heads // config.kv_heads
        seen: list[int] = []
        for rank in range(tp):
            queries = range(config.heads)[query_heads_of(config, tp, rank)]
            keys = range(config.kv_heads)[kv_heads_of(config, tp, rank)]
            assert len(queries) > 0, f"rank {rank} of {tp} has nothing to do"
            assert len(queries) % len(keys) == 0
            # Locally, query head i uses key/value head i // (query heads per key/value head).
            group = len(queries) // len(keys)
            assert [keys[i // group] for i in range(len(queries))] == [q // per_kv for q in queries]
            seen += queries
        assert seen == list(range(config.heads))


def test_kv_heads_are_repeated_only_where_there_are_too_few():
    for config, tp in every_layout():
        held = [range(config.kv_heads)[kv_heads_of(config, tp, rank)] for rank in range(tp)]
        assert sum(map(len, held)) == max(tp, config.kv_heads)


@pytest.mark.parametrize("lost", ["first", "last"])
def test_the_proof_of_coverage_notices_a_gap(monkeypatch, lost):
    def short(length: int, parts: int, index: int) -> slice:
        sharding = block(length, parts, index)
        return slice(sharding.start + (lost == "first"), sharding.stop - (lost == "last"))

    monkeypatch.setattr(weight_specs_module, "block", short)
    gaps = missing_weights(config_of(6, 3), WeightSharding(2))
    assert "model.embed_tokens.weight" in gaps
    assert "model.layers.1.mlp.down_proj.weight" in gaps
    assert "model.layers.1.self_attn.q_proj.weight" not in gaps


def test_the_table_names_what_checkpoints_hold():
    def names(variant: str) -> set[str]:
        table = [weight.name for weight in weight_specs(tiny_config(variant))]
        assert len(table) == len(set(table))
        return {name.replace("model.layers.1.", "") for name in table if "layers.0" not in name}

    outside = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    layer = {
        *("input_layernorm.weight", "post_attention_layernorm.weight"),
        *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
        *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    }
    qkv_biases = {f"self_attn.{part}_proj.bias" for part in "qkv"}
    other_biases = {
        "self_attn.o_proj.bias",
        *(f"mlp.{part}_proj.bias" for part in ("gate", "up", "down")),
    }
    assert names("llama-mha") == outside | layer
    assert names("llama-bias") == outside | layer | qkv_biases | other_biases
    assert names("qwen2-tied") == (outside | layer | qkv_biases) - {"lm_head.weight"}
    assert names("qwen3-tied") == (outside - {"lm_head.weight"}) | layer | {
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_covered_in_every_layout(variant):
    config = tiny_config(variant)
    assert [missing_weights(config, WeightSharding(tp)) for tp in range(1, config.heads + 1)] == [
        []
    ] * config.heads


# Experts.

CUTS = [WeightSharding(tp, ep) for tp in range(1, 5) for ep in range(1, 5)]
CUTS += [
    WeightSharding(1, 1, 3),
    WeightSharding(2, 1, 4),
    WeightSharding(1, 2, 6),
    WeightSharding(2, 2, 4),
    WeightSharding(2, 3, 12),
]


def test_the_fewest_sets_that_tp_and_ep_divide():
    assert [sharding.ranks for sharding in CUTS[:16]] == [
        1,
        2,
        3,
        4,
        2,
        2,
        6,
        4,
        3,
        6,
        3,
        12,
        4,
        4,
        12,
        4,
    ]
    assert WeightSharding(2) == WeightSharding(2, 1, 2) and WeightSharding(2, 3) == WeightSharding(
        2, 3, 6
    ) != WeightSharding(2, 3, 12)
    assert [
        str(sharding)
        for sharding in (WeightSharding(3), WeightSharding(2, 3), WeightSharding(1, 2, 6))
    ] == [
        *("--tp 3", "--tp 2 --ep 3", "--tp 1 --cp 6 --ep 2"),
    ]


def test_neighbours_divide_the_width_of_the_same_experts():
    sharding = WeightSharding(4, 2)
    assert sharding.etp == 2
    assert [sharding.tp_rank(index) for index in range(4)] == [0, 1, 2, 3]
    assert [sharding.ep_rank(index) for index in range(4)] == [0, 0, 1, 1]
    assert [sharding.etp_rank(index) for index in range(4)] == [0, 1, 0, 1]
    assert [WeightSharding(2, 4).tp_rank(index) for index in range(4)] == [0, 1, 0, 1]
    assert [WeightSharding(2, 4).ep_rank(index) for index in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("variant", MOE_VARIANTS)
def test_every_element_of_an_moe_model_lies_where_it_should(variant):
    config = tiny_config(variant)
    for sharding in CUTS:
        held = [specs_of_shard(config, sharding, index) for index in range(sharding.ranks)]
        copies = {weight: np.zeros(weight.shape, int) for weight in weight_specs(config)}
        for index, weights in enumerate(held):
            for weight in weights:
                part = copies[weight][weight.slices(config, sharding, index)]
                assert part.shape == weight.shard_shape(config, sharding, index)
                part += 1
        for weight, copies_of_element in copies.items():
            if weight.split_by in ("kv heads", "key heads"):  # which more ranks may share
                assert copies_of_element.min() >= sharding.ranks // sharding.tp
                continue
            expected = {
                (False, False): sharding.ranks,
                (False, True): sharding.ranks // sharding.tp,
                (True, False): sharding.etp,
                (True, True): 1,
            }[weight.expert is not None, weight.axis is not None]
            assert (copies_of_element == expected).all(), f"{weight.name}, {sharding}"
        assert missing_weights(config, sharding) == []


def test_experts_are_sharded_in_blocks_however_many():
    config = tiny_config("mixtral-window")  # 5 experts of width 21

    def held(sharding: WeightSharding) -> list[tuple[list[int], int]]:
        sets = []
        for index in range(sharding.ranks):
            ups = [w for w in specs_of_shard(config, sharding, index) if w.expert is not None]
            ups = [w for w in ups if (w.layer, w.field) == (1, "up")]
            (width,) = {w.shard_shape(config, sharding, index)[0] for w in ups}
            sets.append(([w.expert for w in ups if w.expert is not None], width))
        return sets

    assert held(WeightSharding(1, 3)) == [([0, 1], 21), ([2, 3], 21), ([4], 21)]
    assert held(WeightSharding(4, 2)) == [
        ([0, 1, 2], 11),
        ([0, 1, 2], 10),
        ([3, 4], 11),
        ([3, 4], 10),
    ]
    assert held(WeightSharding(1, 5)) == [([expert], 21) for expert in range(5)]
    assert held(WeightSharding(1, 1, 2)) == [([0, 1, 2, 3, 4], 11), ([0, 1, 2, 3, 4], 10)]


@pytest.mark.parametrize("variant", MOE_VARIANTS)
def test_the_table_has_what_checkpoints_of_moe_models_hold(variant):
    config = tiny_config(variant)
    table = {weight.name: weight.shape for weight in weight_specs(config)}
    stored = {name: array.shape for name, array in tiny_weights(variant).items()}
    assert config.moe is not None
    if config.moe.names.separate is None:  # then the table's names of experts are its own
        parameters = sum(map(math.prod, stored.values()))
        assert sum(map(math.prod, table.values())) == parameters
        table = {name: shape for name, shape in table.items() if "experts" not in name}
        stacked = config.moe.names.stacked
        together = (stacked.gate_up, stacked.down, "experts")
        stored = {n: shape for n, shape in stored.items() if not any(one in n for one in together)}
    assert table == stored


def test_rows_say_where_the_model_keeps_them():
    config = tiny_config("qwen2_moe-mixed")  # of four layers, one has experts
    places = [(w.layer, w.field, w.expert) for w in weight_specs(config) if w.layer is not None]
    assert len(places) == len(set(places))
    gates = [place for place in places if place[1] == "gate"]
    assert gates == [(0, "gate", None), (1, "gate", None)] + [
        *((1, "gate", expert) for expert in range(8)),
        *((2, "gate", None), (3, "gate", None)),
    ]
    shapes = {(w.layer, w.expert): w.shape for w in weight_specs(config) if w.field == "gate"}
    assert shapes[0, None] == (35, 36) and shapes[1, None] == (27, 36) and shapes[1, 7] == (15, 36)


def test_the_proof_of_coverage_names_a_missing_expert(monkeypatch):
    config = tiny_config("mixtral-window")

    def forgetful(experts: int, sharding: WeightSharding, index: int) -> slice:
        return block(experts - 1, sharding.ep, sharding.ep_rank(index))

    monkeypatch.setattr(weight_specs_module, "local_experts", forgetful)
    lost = [
        f"model.layers.{layer}.block_sparse_moe.experts.4.{part}.weight"
        for layer in range(2)
        for part in ("w1", "w3", "w2")
    ]
    assert (
        missing_weights(config, WeightSharding(1, 2))
        == missing_weights(config, WeightSharding(4, 2))
        == lost
    )
    with_biases = missing_weights(tiny_config("gpt_oss-plain"), WeightSharding(2, 2))
    assert len(with_biases) == 2 * 6 and all(".experts.7." in name for name in with_biases)


def test_the_proof_of_coverage_notices_a_gap_in_an_experts_width(monkeypatch):
    config = tiny_config("mixtral-window")
    monkeypatch.setattr(WeightSharding, "etp_rank", lambda self, index: 0)
    assert missing_weights(config, WeightSharding(2, 2)) == []
    gaps = missing_weights(config, WeightSharding(4, 2))
    assert len(gaps) == 2 * 5 * 3 and all("experts" in name for name in gaps)


@pytest.mark.parametrize(
    ("variant", "sharding", "fact"),
    [
        ("mixtral-window", WeightSharding(1, 6), "--ep 6 must be 1 to the model's 5 experts"),
        ("mixtral-window", WeightSharding(7, 1), "--tp 7 .* 6 query heads"),
        ("mixtral-window", WeightSharding(1, 0), "--ep 0 must be at least 1"),
        ("mixtral-window", WeightSharding(0, 2), "--tp 0 must be at least 1"),
        ("mixtral-window", WeightSharding(2, 3, 9), "into 9 parts for --tp 2 --ep 3.* as 6 is"),
        ("mixtral-window", WeightSharding(2, 2, -2), "into -2 parts"),
        (
            "llama-gqa",
            WeightSharding(2, 2),
            "--tp 2 --ep 2 divides experts, but a llama .* use --tp 2 alone",
        ),
        ("llama-gqa", WeightSharding(2, 1, 4), "--tp 2 --cp 2 divides experts"),
    ],
)
def test_a_sharding_that_does_not_fit_is_refused(variant, sharding, fact):
    with pytest.raises(UserError, match=fact):
        check_weight_sharding(tiny_config(variant), sharding)


def test_ranks_that_share_a_kv_head_are_neighbours():
    for config, tp in every_layout():
        for rank in range(tp):
            mine = kv_heads_of(config, tp, rank)
            same = [other for other in range(tp) if kv_heads_of(config, tp, other) == mine]
            assert kv_replica_ranks(config, tp, rank) == (mine.start, range(same[0], same[-1] + 1))


def test_coordinates_put_tensor_parallel_ranks_next_to_each_other():
    layout = Layout(tp=3, dp=2)
    assert layout.world_size == 6
    assert [layout.coordinates(rank) for rank in range(6)] == [
        *((0, 0, 0), (0, 0, 1), (0, 0, 2)),
        *((1, 0, 0), (1, 0, 1), (1, 0, 2)),
    ]


def test_coordinates_put_the_ranks_of_a_replica_next_to_each_other():
    layout = Layout(tp=2, dp=2, cp=3)
    assert (layout.world_size, layout.replica_size) == (12, 6)
    assert [layout.coordinates(rank) for rank in range(12)] == list(
        product(range(2), range(3), range(2))
    )


def test_dp_is_what_tp_and_cp_leave_of_the_world():
    assert make_layout(8, tp=2) == Layout(tp=2, dp=4)
    assert make_layout(6, tp=3, dp=2) == Layout(tp=3, dp=2)
    assert make_layout(8, cp=2) == Layout(cp=2, dp=4)
    assert make_layout(12, tp=2, cp=3) == Layout(tp=2, cp=3, dp=2)
    assert make_layout(1) == Layout()


def test_a_layout_is_written_as_the_flags_that_ask_for_it():
    assert str(Layout()) == "--tp 1 --dp 1"
    assert str(Layout(tp=2, dp=3)) == "--tp 2 --dp 3"
    assert str(Layout(tp=2, cp=4, sequence_parallel=True)) == (
        "--tp 2 --cp 4 --dp 1 --sequence-parallel"
    )
    everything = Layout(4, 3, 2, True, True, "all-gather", "contiguous", "all-reduce", 16)
    assert str(everything) == (
        "--tp 4 --cp 2 --dp 3 --sequence-parallel --flash-decoding --cp-prefill all-gather "
        "--cp-order contiguous --decode-merge all-reduce --cp-kv-cache-interleave-size 16"
    )
    assert everything.degrees == "--tp 4 --cp 2 --dp 3"


def test_every_field_of_a_layout_is_an_option():
    """And has one definition: flags of its own, a default among its choices, and a need that the
    checks know. The axes of the grid are fields, too."""
    options = layout_options()
    assert sorted(one.name for one in options) == sorted(one.name for one in fields(Layout))
    flags = [flag for one in options for flag in one.flags]
    assert len(set(flags)) == len(flags)
    for one in options:
        assert one.default == getattr(Layout(), one.name) and one.kind in (bool, int, float, str)
        assert not one.choices or one.default == one.choices[0]
        assert not one.needs or one.needs in NEEDS
    assert {one.needs for one in options} == {"", *NEEDS}
    assert [one.name for one in options if one.name not in LAYOUT_OPTIONS] == list(reversed(AXES))
    assert Layout(2, 3, 4).shape == (3, 4, 2)


def test_an_option_that_needs_experts_is_refused_without_them():
    dense = tiny_config("llama-gqa")
    assert [one.name for one in layout_options() if one.moe] == [
        "ep",
        "moe_token_dispatcher",
        "expert_capacity_factor",
        "token_drop_policy",
        "expert_placement",
    ]
    for one in LAYOUT_OPTIONS.values():
        given: dict[str, Any] = {one.name: one.choices[-1] if one.choices else 2}
        layout = replace(Layout(), **given)
        if not one.moe:
            check_experts(dense, layout, [one.name])
            continue
        with pytest.raises(UserError, match=rf"^{one.flag} .* a model without experts"):
            check_experts(dense, layout, [one.name])


def test_options_that_are_not_given_have_their_defaults():
    nothing: dict[str, Any] = dict.fromkeys(LAYOUT_OPTIONS)
    assert make_layout(1, **nothing) == Layout()
    given = make_layout(
        2, cp=2, cp_prefill="all-gather", decode_merge="all-reduce", cp_kv_cache_interleave_size=4
    )
    assert given == Layout(
        cp=2, cp_prefill="all-gather", decode_merge="all-reduce", cp_kv_cache_interleave_size=4
    )


def test_options_of_a_sharded_cache_go_with_flash_decoding():
    layout = make_layout(
        2, tp=2, flash_decoding=True, decode_merge="all-to-all", cp_kv_cache_interleave_size=2
    )
    assert layout.shards_kv_positions and layout.decode_merge == "all-to-all"


def test_sequence_parallelism_needs_tensor_parallelism():
    assert make_layout(2, tp=2, sequence_parallel=True).sequence_parallel
    assert not make_layout(2, sequence_parallel=False).sequence_parallel
    with pytest.raises(UserError, match="^--sequence-parallel has no effect with --tp 1: leave it"):
        make_layout(2, sequence_parallel=True)


@pytest.mark.parametrize(
    ("world", "tp", "cp", "dp", "sentence"),
    [
        (3, 2, 1, None, "--tp 2 does not divide the 3 ranks that were started: run `mpirun -n 2"),
        (7, 3, 1, None, "--tp 3 does not divide the 7 ranks that were started: run `mpirun -n 6"),
        (1, 4, 1, None, "--tp 4 does not divide the 1 rank that was started: run `mpirun -n 4"),
        (4, 2, 1, 1, "--tp 2 --dp 1 needs 2 ranks but 4 were started: run `mpirun -n 2"),
        (1, 2, 1, 2, "--tp 2 --dp 2 needs 4 ranks but 1 was started: run `mpirun -n 4"),
        (6, 1, 4, None, "--tp 1 --cp 4 makes replicas of 4 ranks, which do not divide the 6 ranks"),
        (14, 2, 3, None, "which do not divide the 14 ranks that were started: run `mpirun -n 12"),
        (1, 2, 3, None, "which do not divide the 1 rank that was started: run `mpirun -n 6"),
        (8, 2, 2, 3, "--tp 2 --cp 2 --dp 3 needs 12 ranks but 8 were started: run `mpirun -n 12"),
    ],
)
def test_a_wrong_number_of_ranks_is_refused_with_the_command_to_type(world, tp, cp, dp, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        make_layout(world, tp, dp, cp)
    with pytest.raises(WrongRanks) as refusal:
        make_layout(world, tp, dp, cp)
    error = pickle.loads(pickle.dumps(refusal.value))  # as ranks tell each other
    assert str(error) == str(refusal.value)
    assert error.tp == tp
    named = error.with_command(f"srun -n {error.ranks} mpishard --tp {error.tp}")
    assert re.search(f": run `srun -n {error.ranks} mpishard --tp {tp}`$", str(named))


def test_a_tp_above_the_query_heads_is_refused():
    config = config_of(6, 2)
    check_tensor_parallel(config, 6)
    with pytest.raises(UserError, match=r"--tp 7 .* 6 query heads"):
        check_tensor_parallel(config, 7)


def test_flash_decoding_is_refused_where_no_ranks_share_a_head():
    for config, tp in every_layout():
        if any(len(kv_replica_ranks(config, tp, rank)[1]) > 1 for rank in range(tp)):
            check_flash_decoding(config, tp)
            continue
        heads, kv_heads = config.heads, config.kv_heads
        words = rf"with {heads} query heads and {heads} key/value heads no --tp .*"
        if heads > kv_heads:
            words = rf"with --tp {tp} and {kv_heads} .*, give --tp {kv_heads + 1} to {heads}, or .*"
        with pytest.raises(UserError, match=rf"^--flash-decoding .* {words} --cp 2$"):
            check_flash_decoding(config, tp)


@pytest.mark.parametrize(
    ("degrees", "flag"),
    [({"tp": 0}, "--tp 0"), ({"dp": 0}, "--dp 0"), ({"cp": 0}, "--cp 0"), ({"cp": -1}, "--cp -1")],
)
def test_degrees_below_one_are_refused(degrees, flag):
    with pytest.raises(UserError, match=f"{flag} must be at least 1"):
        make_layout(4, **degrees)


@pytest.mark.parametrize(
    ("cp", "layout_options", "sentence"),
    [
        (2, {"cp_prefill": "rong"}, "--cp-prefill rong must be one of ring, all-gather"),
        (2, {"cp_order": "zag"}, "--cp-order zag must be one of zigzag, contiguous"),
        (
            2,
            {"decode_merge": "sum"},
            "--decode-merge sum must be one of reduce-scatter, all-to-all, all-",
        ),
        (
            2,
            {"cp_kv_cache_interleave_size": 0},
            "--cp-kv-cache-interleave-size 0 must be 1 to 2147483647",
        ),
        (
            2,
            {"cp_kv_cache_interleave_size": 2**31},
            "--cp-kv-cache-interleave-size 2147483648 must be 1 to 2147483647",
        ),
        (1, {"cp_prefill": "rong"}, "--cp-prefill rong must be one of"),
        (1, {"cp_prefill": "ring"}, "--cp-prefill ring has no effect with --cp 1"),
        (1, {"cp_order": "contiguous"}, "--cp-order contiguous has no effect with --cp 1"),
        (1, {"cp_order": "zigzag", "flash_decoding": True}, "--cp-order zigzag has no effect"),
        (
            1,
            {"decode_merge": "all-reduce"},
            "--decode-merge all-reduce has no effect where every rank",
        ),
        (
            1,
            {"cp_kv_cache_interleave_size": 1},
            "--cp-kv-cache-interleave-size 1 has no effect where every rank has the whole",
        ),
        (
            1,
            {"cp_kv_cache_interleave_size": 8, "sequence_parallel": True},
            "with --flash-decoding or --cp 2",
        ),
    ],
)
def test_options_that_are_wrong_or_without_effect_are_refused(cp, layout_options, sentence):
    with pytest.raises(UserError) as refusal:
        make_layout(cp, cp=cp, **layout_options)
    assert sentence in str(refusal.value)
