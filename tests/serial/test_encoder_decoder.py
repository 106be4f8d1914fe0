"""A model with an encoder on one rank: its configuration and weights, and its logits against the
reference, whose own are compared with transformers'."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from tiny_encoder_models import ENCODER_VARIANTS, encoder_prompts
from tiny_models import raw_config, tiny_config, tiny_weights, write_checkpoint

import mpishard
from mpishard.api import Model
from mpishard.arithmetic.attention import AttentionSpec, attend
from mpishard.arithmetic.relative_bias import RelativeBiases
from mpishard.config.active_options import active_options
from mpishard.config.layout import Layout
from mpishard.config.layout_checks import check_experts
from mpishard.config.model_config import ModelConfig
from mpishard.config.reader import read_model_config
from mpishard.config.weight_specs import missing_weights, specs_of_shard
from mpishard.errors import UserError
from mpishard.reference import Reference
from mpishard.sequences.inputs import token_input
from mpishard.storage.checkpoint import Checkpoint
from mpishard.storage.convert import convert
from mpishard.storage.inspection import describe
from mpishard.storage.shards import ShardDirectory
from mpishard.storage.source import open_source
from mpishard.storage.weights import load_weights

GOLDEN = Path(__file__).parents[1] / "golden"
MIXED = "switch_transformers-mixed"


def read(**changes: Any) -> ModelConfig:
    return read_model_config(raw_config(MIXED) | changes, None, "model/config.json")


@pytest.fixture(scope="module", params=ENCODER_VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


def test_layers_with_experts_follow_the_steps():
    config = read()
    assert config.moe is not None and config.encoder is not None and config.encoder.moe is not None
    assert config.encoder.moe.layers == (False, True, False)
    assert config.moe.layers == (False, True, False, True)
    for encoder, number, expected in (
        (None, 3, (True, True, True)),
        (None, 1, (False, True, False)),
        (None, 0, (False, True, False)),  # as transformers has it: the step is the layers
        (0, 3, (False, False, False)),
    ):
        changes = {"encoder_sparse_step": encoder, "num_sparse_encoder_layers": number}
        found = read(**changes).encoder
        assert found is not None and found.moe is not None and found.moe.layers == expected
    assert read(num_decoder_layers=None).layers == 3


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"decoder_start_token_id": None}, "must be the id of the decoder's first token"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder = false is not implemented"),
        ({"router_dtype": "bfloat16"}, 'router_dtype = "bfloat16" is not implemented'),
        ({"relative_attention_num_buckets": 6}, "must be a multiple of 4"),
        ({"relative_attention_max_distance": 4}, "must be more than 4"),
        ({"dense_act_fn": "gated-gelu"}, "is not implemented"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = false is not implemented for"),
        ({"num_decoder_layers": 10_001}, "num_decoder_layers = 10001 must be at most 10000"),
        ({"num_decoder_layers": 9_999, "num_experts": 60}, "must be at most 200000 in all 9999"),
        ({"something_new": 3}, "is not a field that is known for switch_transformers"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        read(**changes)


def test_a_second_capacity_is_refused():
    layout = Layout(expert_capacity_factor=1.5)
    with pytest.raises(UserError, match="--expert-capacity-factor 1.5 contradicts the model"):
        check_experts(read(), layout, ["expert_capacity_factor"])
    with pytest.raises(UserError, match="--expert-placement is not built for a model with an enc"):
        check_experts(read(), Layout(expert_placement="x"), ["expert_placement"])


def test_options_are_said(tmp_path: Path):
    assert active_options(read()) == [
        "norms before sub-layers",
        "no gate in the feed-forward network",
        "scores times 1",
        "biases of 8 buckets of distances up to 11",
        "logits times 0.171499",
        "experts weighted by softmax",
        "at most 3 tokens of a sequence for an expert",
        "a bias of the router",
    ]
    write_checkpoint(MIXED, tmp_path)
    lines = describe(open_source(tmp_path))
    assert "encoder       3 layers, 1 of them with experts" in lines


def test_weights_have_the_stored_names(variant: str, tmp_path: Path):
    write_checkpoint(variant, tmp_path)
    source, weights = Checkpoint.open(tmp_path), tiny_weights(variant)
    assert source.locations.keys() == weights.keys()
    for name, array in weights.items():
        whole = tuple(slice(0, length) for length in array.shape)
        np.testing.assert_array_equal(source.read(name, whole), array, err_msg=name)
    assert {source.locations[name].name for name in weights} >= {
        "shared.weight",
        "encoder.block.1.layer.1.mlp.experts.expert_5.wo.weight",
        "decoder.block.1.layer.1.EncDecAttention.k.weight",
        "decoder.block.1.layer.2.mlp.router.classifier.weight",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    }


@pytest.mark.parametrize("tp, ep", [(1, 1), (2, 2), (4, 1), (3, 3)])
def test_shards_hold_every_weight(variant: str, tp: int, ep: int, tmp_path: Path):
    write_checkpoint(variant, tmp_path / "model")
    convert(open_source(tmp_path / "model"), tmp_path / "shards", tp, ep=ep)
    shards, weights = ShardDirectory.open(tmp_path / "shards"), tiny_weights(variant)
    config, sharding = shards.config, shards.sharding
    assert missing_weights(config, sharding) == []
    for index in range(sharding.ranks):
        own = load_weights(shards, sharding, index, np.float32)
        specs = specs_of_shard(config, sharding, index)
        assert list(own) == [weight.name for weight in specs]
        for weight in specs:
            part = weight.slices(config, sharding, index)
            np.testing.assert_array_equal(own[weight.name], weights[weight.name][part])


def test_reference_computes_what_transformers_does(variant: str):
    golden = np.load(GOLDEN / f"{variant}.npz")
    model = Reference(tiny_config(variant), tiny_weights(variant))
    for p, (encoder_ids, ids) in enumerate(encoder_prompts(variant)):
        assert golden[f"encoder_ids_{p}"].tolist() == encoder_ids
        assert golden[f"ids_{p}"].tolist() == ids
        logits_SV, hidden = model.forward(ids, encoder_ids)
        scale = golden[f"logits_{p}"].std()
        np.testing.assert_allclose(logits_SV, golden[f"logits_{p}"], rtol=0, atol=2e-4 * scale)
        assert len(hidden) == tiny_config(variant).layers + 1
        assert model.greedy(ids, 8, encoder_ids) == golden[f"greedy_{p}"].tolist()


def test_tokens_are_dropped_in_both_stacks(variant: str):
    """Or the tests would not see how they are counted."""
    model = Reference(tiny_config(variant), tiny_weights(variant))
    encoder_ids, ids = encoder_prompts(variant)[0]
    assert model.encoder is not None
    for routings in (model.routings(ids, encoder_ids), model.encoder.routings(encoder_ids)):
        moe = model.config.moe
        assert moe is not None and moe.capacity is not None
        fullest = [np.bincount(one.experts_SA.ravel()).max() for one in routings.values()]
        assert max(fullest) > moe.capacity


MUTATIONS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("attention to later tokens in the decoder", {"causal": False}, {}),
    ("attention to earlier tokens alone in the encoder", {}, {"causal": True}),
    ("no biases in the decoder", {"relative_bias": None}, {}),
    ("no biases in the encoder", {}, {"relative_bias": None}),
    ("scaled scores", {"attention_scale": None}, {}),
    ("scaled scores in the encoder", {}, {"attention_scale": None}),
    ("another activation", {"activation": "silu"}, {}),
    ("logits that are not scaled", {"logits_scale": 0.5}, {}),
)


@pytest.mark.parametrize("what, decoder, encoder", MUTATIONS, ids=[one[0] for one in MUTATIONS])
def test_mutations_show(what: str, decoder: dict[str, Any], encoder: dict[str, Any]):
    config, weights = tiny_config(MIXED), tiny_weights(MIXED)
    assert config.encoder is not None
    mutant = replace(config, **decoder, encoder=replace(config.encoder, **encoder))
    encoder_ids, ids = encoder_prompts(MIXED)[0]
    right, _ = Reference(config, weights).forward(ids, encoder_ids)
    wrong, _ = Reference(mutant, weights).forward(ids, encoder_ids)
    assert np.abs(wrong - right).max() > 1e-2 * right.std(), what


@pytest.mark.parametrize("stack", ["decoder", "encoder"])
@pytest.mark.parametrize("capacity", [None, 2, 4])
def test_a_mutated_capacity_shows(stack: str, capacity: int | None):
    config, weights = tiny_config(MIXED), tiny_weights(MIXED)
    assert config.encoder is not None and config.moe is not None and config.encoder.moe is not None
    if stack == "decoder":
        mutant = replace(config, moe=replace(config.moe, capacity=capacity))
    else:
        moe = replace(config.encoder.moe, capacity=capacity)
        mutant = replace(config, encoder=replace(config.encoder, moe=moe))
    encoder_ids, ids = encoder_prompts(MIXED)[0]
    right, _ = Reference(config, weights).forward(ids, encoder_ids)
    wrong, _ = Reference(mutant, weights).forward(ids, encoder_ids)
    assert np.abs(wrong - right).max() > 1e-2 * right.std()


def test_relative_biases_of_blocks_of_keys_and_heads():
    """Attention in blocks, with biases, against all scores at once."""
    random = np.random.RandomState(2)
    q_ShK, k_gTK, v_gTK = (
        random.standard_normal(n) for n in ((70, 6, 5), (3, 400, 5), (3, 400, 5))
    )
    table_Bh = random.standard_normal((8, 6))
    for causal in (True, False):
        biases = RelativeBiases(table_Bh, 50, causal)
        spec = AttentionSpec(1.0, biases=biases, causal=causal)
        for q_pos_S in (np.arange(330, 400), np.array([200])):
            q = q_ShK[: len(q_pos_S)]
            out_ShK, _ = attend(q, q_pos_S, k_gTK, v_gTK, np.arange(400), spec)
            bias_hST = biases.between(q_pos_S, np.arange(400), np.dtype(float))
            for h in range(6):
                scores_ST = q[:, h] @ k_gTK[h // 2].T + bias_hST[h]
                if causal:
                    scores_ST[np.arange(400) > q_pos_S[:, np.newaxis]] = -np.inf
                weights_ST = np.exp(scores_ST - scores_ST.max(axis=1, keepdims=True))
                weights_ST /= weights_ST.sum(axis=1, keepdims=True)
                np.testing.assert_allclose(out_ShK[:, h], weights_ST @ v_gTK[h // 2], atol=1e-12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = tmp_path_factory.mktemp("switch")
    write_checkpoint(MIXED, directory)
    return mpishard.load(directory, MPI.COMM_SELF, compute_dtype="float64")


def test_float32_agrees_with_transformers(variant: str, tmp_path: Path):
    golden, inputs = np.load(GOLDEN / f"{variant}.npz"), encoder_prompts(variant)
    model = mpishard.load(write_checkpoint(variant, tmp_path))
    encoder_inputs, begins = map(list, zip(*inputs, strict=True))
    scores = model.logits(encoder_inputs, decoder_input_ids=begins)
    params = mpishard.SamplingParams(max_tokens=8, ignore_eos=True)
    answers = model.generate(encoder_inputs, params, decoder_input_ids=begins)
    for p, (score, answer) in enumerate(zip(scores, answers, strict=True)):
        expected_SV = golden[f"logits_{p}"]
        assert score is not None and score.logits.dtype == np.float32
        assert np.abs(score.logits - expected_SV).max() < 2e-4 * expected_SV.std()
        assert answer.output_ids == golden[f"greedy_{p}"].tolist()


@pytest.mark.parametrize("chunk", [None, 4])
def test_logits_are_the_reference_s(model: Model, chunk: int | None):
    reference = Reference(tiny_config(MIXED), tiny_weights(MIXED))
    inputs, begins = map(list, zip(*encoder_prompts(MIXED), strict=True))
    scores = model.logits(inputs, True, chunk, decoder_input_ids=begins)
    for score, encoder_ids, ids in zip(scores, inputs, begins, strict=True):
        logits_SV, hidden = reference.forward(ids, encoder_ids)
        assert score is not None
        np.testing.assert_allclose(score.logits, logits_SV, atol=1e-9)
        for found, expected in zip(score.hidden_states, hidden, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-9)


def test_generate_begins_with_the_first_token(model: Model):
    reference = Reference(tiny_config(MIXED), tiny_weights(MIXED))
    inputs = [encoder_ids for encoder_ids, _ in encoder_prompts(MIXED)]
    params = mpishard.SamplingParams(max_tokens=9, ignore_eos=True)
    for chunk in (None, 2):
        found = model.generate(inputs, params, chunked_prefill_size=chunk)
        expected = [reference.greedy([4], 9, encoder_ids) for encoder_ids in inputs]
        assert [one.output_ids for one in found] == expected
        assert [one.prompt_tokens for one in found] == list(map(len, inputs))
    begins = [ids for _, ids in encoder_prompts(MIXED)]
    found = model.generate(inputs, params, decoder_input_ids=begins)
    expected = [reference.greedy(ids, 9, one) for one, ids in zip(inputs, begins, strict=True)]
    assert [one.output_ids for one in found] == expected


@pytest.mark.parametrize(
    "begins, sentence",
    [
        ([[4]], "decoder_input_ids has 1 sequences, but there are 2 prompts"),
        ([[4], []], "prompt 2's decoder_input_ids is empty"),
        ([[4], [95]], "prompt 2's decoder_input_ids has token id 95"),
    ],
)
def test_decoder_ids_that_do_not_fit(model: Model, begins: list[list[int]], sentence: str):
    with pytest.raises(UserError, match=sentence):
        model.generate([[5], [6]], decoder_input_ids=begins)


def test_only_a_model_with_an_encoder_has_decoder_ids():
    config = tiny_config("llama-mha")
    assert token_input(config, [1, 2], None, "the line") == ([1, 2], [])
    assert token_input(read(), [1, 2], None, "the line") == ([4], [1, 2])
    assert token_input(read(), [1, 2], [4, 9], "the line") == ([4, 9], [1, 2])
    with pytest.raises(UserError, match="the line has decoder_input_ids, but a llama model has no"):
        token_input(config, [1, 2], [3], "the line")


def test_what_is_not_built_for_an_encoder_is_refused(model: Model):
    for call in (model.track_expert_load, model.record_routing):
        with pytest.raises(UserError, match="is not built for a model with an encoder"):
            call()


def test_batch_lines_have_decoder_ids(model: Model, tmp_path: Path):
    reference = Reference(tiny_config(MIXED), tiny_weights(MIXED))
    (long, begin), (other, _), _ = encoder_prompts(MIXED)
    lines = [
        {"id": "a", "input_ids": long, "decoder_input_ids": begin},
        {"id": "b", "input_ids": other},
        {"id": "c", "input_ids": other, "decoder_input_ids": "4"},
        {"id": "d", "input_ids": other, "decoder_input_ids": [99]},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    params = mpishard.SamplingParams(max_tokens=5, ignore_eos=True)
    model.batch(source, target, params)
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert answers[0]["output_ids"] == reference.greedy(begin, 5, long)
    assert answers[1]["output_ids"] == reference.greedy([4], 5, other)
    assert '"decoder_input_ids" must be a list of integers' in answers[2]["error"]
    assert '"decoder_input_ids" has token id 99' in answers[3]["error"]
