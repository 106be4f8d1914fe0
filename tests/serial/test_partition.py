"""The partition table and the layouts: whatever the sizes, the shards joined are the whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from tiny_models import VARIANTS, tiny_config

from mpishard.description import partition
from mpishard.description.config import ModelConfig
from mpishard.description.layout import (
    Layout,
    block,
    block_sizes,
    check_tensor_parallel,
    kv_heads_of,
    make_layout,
    query_heads_of,
)
from mpishard.description.partition import uncovered, weight_table
from mpishard.errors import UserError

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


def join(shards: list[np.ndarray], cuts: list[slice], axis: int) -> np.ndarray:
    """The shards end to end, of those that hold the same slice only the first."""
    first = {(cut.start, cut.stop): shard for cut, shard in zip(cuts, shards, strict=True)}
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
        for weight in weight_table(replace(config, layers=1)):
            whole = np.arange(np.prod(weight.shape)).reshape(weight.shape)
            slices = [weight.slices(config, tp, rank) for rank in range(tp)]
            shards = [whole[cut] for cut in slices]
            assert [shard.shape for shard in shards] == [
                weight.shard_shape(config, tp, rank) for rank in range(tp)
            ]
            if weight.axis is None:
                assert all((shard == whole).all() for shard in shards)
                continue
            joined = join(shards, [cut[weight.axis] for cut in slices], weight.axis)
            np.testing.assert_array_equal(joined, whole, f"{weight.name}, tp {tp}")


def test_the_proof_of_coverage_holds_for_every_layout():
    assert [config for config, tp in every_layout() if uncovered(config, tp)] == []


def test_a_width_smaller_than_tp_leaves_ranks_with_nothing_and_still_covers():
    config = replace(config_of(8, 4), vocab=5, ffn=3)
    assert uncovered(config, 8) == []
    down = next(weight for weight in weight_table(config) if weight.field == "down")
    assert [down.shard_shape(config, 8, rank)[1] for rank in range(8)] == [1, 1, 1, 0, 0, 0, 0, 0]


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
        cut = block(length, parts, index)
        return slice(cut.start + (lost == "first"), cut.stop - (lost == "last"))

    monkeypatch.setattr(partition, "block", short)
    gaps = uncovered(config_of(6, 3), 2)
    assert "model.embed_tokens.weight" in gaps
    assert "model.layers.1.mlp.down_proj.weight" in gaps
    assert "model.layers.1.self_attn.q_proj.weight" not in gaps


def test_the_table_names_what_checkpoints_hold():
    def names(variant: str) -> set[str]:
        table = [weight.name for weight in weight_table(tiny_config(variant))]
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
    assert [uncovered(config, tp) for tp in range(1, config.heads + 1)] == [[]] * config.heads


def test_coordinates_put_tensor_parallel_ranks_next_to_each_other():
    layout = Layout(tp=3, dp=2)
    assert layout.world == 6
    assert [layout.coordinates(rank) for rank in range(6)] == [
        *((0, 0), (0, 1), (0, 2)),
        *((1, 0), (1, 1), (1, 2)),
    ]


def test_dp_is_what_tp_leaves_of_the_world():
    assert make_layout(8, tp=2) == Layout(tp=2, dp=4)
    assert make_layout(6, tp=3, dp=2) == Layout(tp=3, dp=2)
    assert make_layout(1) == Layout()


@pytest.mark.parametrize(
    ("world", "tp", "dp", "command"),
    [(3, 2, None, "mpirun -n 2"), (7, 3, None, "mpirun -n 6"), (1, 4, None, "mpirun -n 4")]
    + [(4, 2, 1, "mpirun -n 2"), (1, 2, 2, "mpirun -n 4")],
)
def test_a_wrong_number_of_ranks_is_refused_with_the_command_to_type(world, tp, dp, command):
    with pytest.raises(UserError, match=f"{command} mpishard generate m") as refusal:
        make_layout(world, tp, dp, "mpishard generate m")
    assert f"--tp {tp}" in str(refusal.value) and f"{world} " in str(refusal.value)


def test_a_tp_above_the_query_heads_is_refused():
    config = config_of(6, 2)
    check_tensor_parallel(config, 6)
    with pytest.raises(UserError, match=r"--tp 7 .* 6 query heads"):
        check_tensor_parallel(config, 7)


@pytest.mark.parametrize(("tp", "dp", "flag"), [(0, None, "--tp 0"), (1, 0, "--dp 0")])
def test_degrees_below_one_are_refused(tp, dp, flag):
    with pytest.raises(UserError, match=f"{flag} must be at least 1"):
        make_layout(4, tp, dp)
