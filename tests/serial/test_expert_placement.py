"""The file that says which rank has which experts: what is refused, and what ranks then hold."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import tiny_config

from mpishard.config.expert_placement import FORMAT, ExpertPlacement, num_physical_per_rank
from mpishard.config.weight_sharding import WeightSharding
from mpishard.config.weight_specs import specs_of_shard, weight_specs
from mpishard.errors import UserError

CONFIG = tiny_config("qwen2_moe-mixed")  # 8 experts, in layer 1 of four
HELD = [[0, 1, 2, 3, 7], [3, 4, 5, 6, 0]]


def content(**changed: Any) -> dict[str, Any]:
    right = {"format": FORMAT, "experts": 8, "ep": 2, "layers": {"1": HELD}}
    return right | changed


def placement(of: dict[str, Any]) -> ExpertPlacement:
    assert CONFIG.moe is not None
    return ExpertPlacement.of(of, CONFIG.moe, 2, "FILE")


def test_a_file_is_read_as_it_is_written():
    placed = placement(content())
    assert placed.layers == {1: HELD} and placed.ep == 2
    assert placement(placed.content) == placed
    assert [placed.replicas(1, expert) for expert in range(8)] == [2, 1, 1, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "changed, sentence",
    [
        ({"format": 1}, f'FILE has the "format" 1, not {FORMAT!r}: make it with `mpishard eplb`'),
        ({"experts": 7}, 'FILE has "experts" 7, but the model has 8: make another with'),
        ({"ep": 4}, 'FILE has "ep" 4, but --ep is 2: make another with `mpishard eplb`'),
        ({"layers": {"0": HELD, "1": HELD}}, "has the layers 0, 1, but those with experts are 1"),
        ({"layers": []}, "FILE has the layers [], but those with experts are 1"),
        ({"layers": {"1": HELD[:1]}}, "FILE, layer 1 must be a list of 2 lists, of the experts"),
        ({"layers": {"1": [HELD[0], []]}}, "layer 1, rank 1 must be a list of experts, not []"),
        ({"layers": {"1": [[0, True], []]}}, "rank 0 must be a list of experts, not [0, True]"),
        ({"layers": {"1": [HELD[0], [8]]}}, "layer 1, rank 1 has expert 8, but they are 0 to 7"),
        ({"layers": {"1": [HELD[0], [10**900]]}}, f"rank 1 has expert 1{99 * '0'}…, but they are"),
        ({"layers": {"1": [HELD[0], ["x" * 900]]}}, f"of experts, not ['{98 * 'x'}…"),
        ({"layers": 900 * "x"}, f"FILE has the layers {100 * 'x'}…, but those"),
        ({"ep": 900 * "x"}, f'FILE has "ep" \'{99 * "x"}…, but --ep is 2'),
        ({"layers": {"1": [HELD[0], [4, 4]]}}, "FILE, layer 1, rank 1 has expert 4 twice"),
        ({"layers": {"1": [HELD[0], [4, 5]]}}, "FILE, layer 1 has expert 6 on no rank"),
    ],
)
def test_what_is_no_placement(changed, sentence):
    with pytest.raises(UserError) as refusal:
        placement(content(**changed))
    assert sentence in str(refusal.value) and str(refusal.value).startswith("FILE")


def test_ranks_hold_the_experts_that_are_placed_on_them():
    for sharding in (
        WeightSharding(1, 2, placement=placement(content())),
        WeightSharding(4, 2, 4, placement(content())),
    ):
        for index in range(sharding.ranks):
            specs = specs_of_shard(CONFIG, sharding, index)
            held = {one.expert for one in specs if one.layer == 1} - {None}
            assert held == set(HELD[sharding.ep_rank(index)])
        everything = {weight.name for weight in weight_specs(CONFIG)}
        assert everything == {
            w.name for i in range(sharding.ranks) for w in specs_of_shard(CONFIG, sharding, i)
        }
    assert WeightSharding(1, 2, placement=placement(content())) == WeightSharding(1, 2), (
        "which files it takes"
    )


def test_slots_of_each():
    assert num_physical_per_rank(experts=8, replicas=0, ep=4) == 2
    assert num_physical_per_rank(experts=6, replicas=2, ep=4) == 2
    assert num_physical_per_rank(experts=3, replicas=3, ep=2) == 3


@pytest.mark.parametrize(
    "experts, copies, ep, sentence",
    [
        (
            6,
            1,
            4,
            "--redundant-experts 1 makes 7 slots, which --ep 4 ranks cannot have equally many of",
        ),
        (6, 3, 4, "equally many of: use --redundant-experts 2 or 6"),
        (6, 0, 4, "equally many of: use --redundant-experts 2"),
        (
            6,
            -1,
            4,
            "--redundant-experts -1 must be 0 to 18: more than one copy of each of 6 experts",
        ),
        (3, 4, 2, "--redundant-experts 4 must be 0 to 3"),
        (3, 1, 4, "--ep 4 must be 1 to the 3 experts: a rank without an expert would have nothing"),
    ],
)
def test_slots_that_are_not_the_same_on_all_ranks(experts, copies, ep, sentence):
    with pytest.raises(UserError) as refusal:
        num_physical_per_rank(experts, copies, ep)
    assert sentence in str(refusal.value)
