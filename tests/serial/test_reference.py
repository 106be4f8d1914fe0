"""The oracle against transformers' numbers, and proof that those numbers can tell it is wrong."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from stored import stored
from tiny_encoder_models import ENCODER_VARIANTS
from tiny_models import (
    MOE_VARIANTS,
    VARIANTS,
    stacked_weights,
    tiny_config,
    tiny_prompts,
    tiny_weights,
    write_checkpoint,
)

from mpishard import reference
from mpishard.config.model_config import NO_ROPE, LayerNormNames, ModelConfig, MoEConfig, Rope
from mpishard.reference import Reference, Routing

GOLDEN = Path(__file__).parent.parent / "golden"
BOUND = 2e-4  # of the standard deviation of what is compared
NEAR_TIE = 2e-4  # of a router's scores, far more than rounding changes them
PROMPTS = range(2)

Weights = dict[str, np.ndarray]
EVERY_VARIANT = [*VARIANTS, *MOE_VARIANTS]


def golden(variant: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{variant}.npz") as file:
        return dict(file)


def deviation(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, in standard deviations of `theirs`."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / theirs.std())


def test_there_are_goldens_of_every_variant():
    others = {"repetition_penalty"}
    assert {file.stem for file in GOLDEN.glob("*.npz")} == {
        *EVERY_VARIANT,
        *ENCODER_VARIANTS,
    } | others


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_agrees_with_transformers(variant, dtype):
    expected = golden(variant)
    config = tiny_config(variant)
    model = Reference(config, tiny_weights(variant), dtype)
    for p in PROMPTS:
        ids = expected[f"ids_{p}"].tolist()
        assert ids == tiny_prompts(variant)[p]
        logits_SV, hidden = model.forward(ids)
        assert logits_SV.dtype == dtype
        assert logits_SV.shape == (len(ids), config.vocab)
        assert deviation(logits_SV, expected[f"logits_{p}"]) < BOUND
        assert len(hidden) == config.layers + 1
        for ours_SD, theirs_SD in zip(hidden, expected[f"hidden_{p}"], strict=True):
            assert ours_SD.dtype == dtype
            assert deviation(ours_SD, theirs_SD) < BOUND


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_continues_as_transformers(variant, dtype):
    expected = golden(variant)
    model = Reference(tiny_config(variant), tiny_weights(variant), dtype)
    assert expected["margin"] > BOUND  # so that every token can be compared
    for p in PROMPTS:
        theirs = expected[f"greedy_{p}"].tolist()
        assert len(set(theirs)) > 4  # a model that repeats itself would prove little
        assert model.greedy(expected[f"ids_{p}"].tolist(), len(theirs)) == theirs


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("variant", MOE_VARIANTS)
def test_routes_as_transformers(variant, dtype):
    expected = golden(variant)
    moe = mixture_of(variant)
    model = Reference(tiny_config(variant), tiny_weights(variant), dtype)
    for p in PROMPTS:
        routings = model.routings(expected[f"ids_{p}"].tolist())
        assert list(routings) == np.flatnonzero(moe.layers).tolist()
        assert near_ties(routings) == []  # which could not be compared
        theirs = zip(expected[f"experts_{p}"], expected[f"weights_{p}"], strict=True)
        for ours, (experts_SA, weights_SA) in zip(routings.values(), theirs, strict=True):
            assert ours.weights_SA.dtype == dtype
            assert np.array_equal(ours.experts_SA, experts_SA)
            assert deviation(ours.weights_SA, weights_SA) < BOUND


@pytest.mark.parametrize("variant", MOE_VARIANTS)
def test_no_router_comes_to_a_near_tie_in_a_continuation(variant):
    expected = golden(variant)
    model = Reference(tiny_config(variant), tiny_weights(variant))
    for p in PROMPTS:
        sequence = [*expected[f"ids_{p}"].tolist(), *expected[f"greedy_{p}"].tolist()]
        assert near_ties(model.routings(sequence)) == []


def mixture_of(variant: str) -> MoEConfig:
    moe = tiny_config(variant).moe
    assert moe is not None
    return moe


def near_ties(routings: dict[int, Routing]) -> list[str]:
    """Which choices of experts rounding might turn over."""
    return [
        f"layer {layer}, token {token}: scores {routing.margin_S[token]:.1e} apart"
        for layer, routing in routings.items()
        for token in np.flatnonzero(routing.margin_S < NEAR_TIE)
    ]


def test_a_near_tie_is_reported():
    variant = "mixtral-full"
    config, weights = tiny_config(variant), tiny_weights(variant)
    router = weights["model.layers.1.block_sparse_moe.gate.weight"]
    ids = tiny_prompts(variant)[0]
    routing = Reference(config, weights).routings(ids)[1]
    chosen, last = routing.experts_SA[3], routing.weights_SA[3].argmin()
    other = next(e for e in range(mixture_of(variant).num_experts) if e not in chosen)
    router[other] = router[chosen[last]]
    ties = near_ties(Reference(config, weights).routings(ids))
    assert any(tie.startswith("layer 1, token 3: ") for tie in ties)


def test_choosing_takes_the_lowest_of_equals_and_says_so():
    moe = replace(mixture_of("mixtral-full"), num_experts=4, top_k=2)
    scores_SE = np.array([[0.25, 0.5, 0.25, 0.125], [0.125, 0.5, 0.0, 1.0]])
    experts_SA, margin_S = reference.choose(scores_SE, moe)
    assert experts_SA.tolist() == [[0, 1], [1, 3]]
    assert margin_S.tolist() == [0, 0.375]


def test_experts_of_other_groups_are_not_chosen_whatever_their_scores():
    moe = replace(mixture_of("deepseek_v3-groups"), num_experts=6, n_group=3, topk_group=2, top_k=4)
    scores_SE = np.array([[-1.0, -2.0, -0.5, -8.0, -3.0, -4.0]])
    experts_SA, margin_S = reference.choose(scores_SE, moe)
    assert experts_SA.tolist() == [[0, 1, 4, 5]]  # sums of two: -3, -8.5 and -7
    assert margin_S.tolist() == [1.5]
    by_best = replace(moe, group_score="max")
    assert reference.choose(scores_SE, by_best)[0].tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
def test_the_bias_for_choosing_is_stored_in_float32(stored):
    weights = tiny_weights("deepseek_v3-groups", stored)
    wide = [name for name in weights if weights[name].dtype == np.float32]
    assert wide == [f"model.layers.{n}.mlp.gate.e_score_correction_bias" for n in (1, 2)]


@pytest.mark.parametrize("variant", MOE_VARIANTS)
def test_stacked_experts_are_the_same_experts(variant):
    config, ids = tiny_config(variant), tiny_prompts(variant)[0]
    one_by_one, _ = Reference(config, tiny_weights(variant)).forward(ids)
    stacked, _ = Reference(config, stacked_weights(variant)).forward(ids)
    assert np.array_equal(one_by_one, stacked)


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_a_mistake_shows(variant):
    config, weights = tiny_config(variant), tiny_weights(variant)
    expected = golden(variant)
    unseen = {}
    for mistake, wrong_config, wrong_weights in mistakes(config, weights):
        logits_SV, _ = Reference(wrong_config, wrong_weights).forward(expected["ids_1"].tolist())
        shows = deviation(logits_SV, expected["logits_1"])
        if shows < 50 * BOUND:
            unseen[mistake] = shows
    assert not unseen


def mistakes(config: ModelConfig, weights: Weights) -> Iterator[tuple[str, ModelConfig, Weights]]:
    """What an implementation may get wrong: ``(description, configuration, weights)`` that would
    make a right one compute the same as the wrong one."""
    # Some families have no field for it, and always a small one.
    factor, how = (0.1, "ten times too small") if config.norm_eps > 1e-4 else (1e4, "far too large")
    yield f"epsilon {how}", replace(config, norm_eps=factor * config.norm_eps), weights
    if config.moe is None or config.moe.alpha is None:
        activation = "silu" if config.activation != "silu" else "gelu_pytorch_tanh"
        yield "another activation", replace(config, activation=activation), weights
    if config.moe is not None:
        for mistake, moe in moe_mistakes(config.moe):
            yield mistake, replace(config, moe=moe), weights
    if config.full_width_qk_norm:
        norms = [name for name in weights if name.endswith(("q_norm.weight", "k_norm.weight"))]
        by_head = {name: weights[name][: config.head_dim] for name in norms}
        yield (
            "norms of each head",
            replace(config, qk_norm=True, full_width_qk_norm=False),
            weights | by_head,
        )
    if config.mla is not None:
        yield (
            "pairs the other way",
            with_mla(config, interleaved=not config.mla.interleaved),
            weights,
        )
        yield "the model's epsilon in latents", with_mla(config, norm_eps=config.norm_eps), weights
    if config.sinks:
        yield "no sinks", replace(config, sinks=False), weights
    for mistake, changes in [*scale_mistakes(config), *layer_norm_mistakes(config)]:
        yield mistake, replace(config, **changes), weights
    for mistake, names in norm_mistakes(config):
        yield mistake, replace(config, norms=names), weights
    for rope in dict.fromkeys(config.ropes):
        if not config.mla:
            ropes = tuple(NO_ROPE if one == rope else one for one in config.ropes)
            if ropes != config.ropes:
                yield f"no {rope.kind} rope", replace(config, ropes=ropes), weights
        for mistake, wrong in rope_mistakes(rope):
            ropes = tuple(wrong if one == rope else one for one in config.ropes)
            yield f"{mistake} ({rope.kind})", replace(config, ropes=ropes), weights
    if len(set(config.ropes)) > 1:
        ropes = config.ropes
        yield "ropes of other layers", replace(config, ropes=ropes[1:] + ropes[:1]), weights
        yield (
            "the same rope everywhere",
            replace(config, ropes=(config.rope,) * len(ropes)),
            weights,
        )
    for mistake, windows in window_mistakes(config):
        yield mistake, replace(config, windows=windows), weights
    for mistake, changed in weight_mistakes(config, weights):
        yield mistake, config, weights | changed


def moe_mistakes(moe: MoEConfig) -> Iterator[tuple[str, MoEConfig]]:
    if moe.scoring == "sparsemixer":
        yield "jitter a quarter too large", replace(moe, jitter=1.25 * moe.jitter)
        yield "the softmax of all", replace(moe, scoring="softmax")
    else:
        yield "one expert more", replace(moe, top_k=moe.top_k + 1)
        yield "one expert less", replace(moe, top_k=moe.top_k - 1)
        yield "normalized the other way", replace(moe, norm_topk_prob=not moe.norm_topk_prob)
    if moe.norm_min > 1e-3:
        yield "no least sum", replace(moe, norm_min=0.0)
    if moe.shared_expert_intermediate_size:
        yield "no shared expert", replace(moe, shared_expert_intermediate_size=0)
    if moe.shared_gate:
        yield "no gate of the shared expert", replace(moe, shared_gate=False)
    if moe.routed_scaling_factor != 1:
        yield "no scaling", replace(moe, routed_scaling_factor=1.0)
    if moe.n_group > 1:
        other = "max" if moe.group_score != "max" else "top-2 sum"
        yield "no groups", replace(moe, n_group=1, topk_group=1)
        yield "one group more", replace(moe, topk_group=moe.topk_group + 1)
        yield "another score of groups", replace(moe, group_score=other)
    if moe.scale_inputs:
        yield "weights of outputs", replace(moe, scale_inputs=False)
    if moe.router_bias:
        yield "no bias of the router", replace(moe, router_bias=False)
    if moe.alpha and moe.limit:
        yield "alpha a tenth too large", replace(moe, alpha=1.1 * moe.alpha)
        yield "limit a tenth too large", replace(moe, limit=1.1 * moe.limit)
        yield "no limit", replace(moe, limit=np.inf)


def with_mla(config: ModelConfig, **changes: Any) -> ModelConfig:
    assert config.mla is not None
    return replace(config, mla=replace(config.mla, **changes))


def router_of(config: ModelConfig) -> str:
    """The name of a layer's router in the checkpoints of `tiny_models`."""
    assert config.moe is not None
    return (config.moe.names.separate or config.moe.names.stacked).router


def gate_for_up(weights: Weights, layer: str) -> Weights:
    """The gates and ups of a layer, each under the name of the other."""
    twins = {"gate_proj.weight": "up_proj.weight", ".w1.weight": ".w3.weight"}
    changed: Weights = {}
    for name in weights:
        if name.startswith(layer) and name.endswith("gate_up_proj"):  # they take turns
            pairs = weights[name].reshape(*weights[name].shape[:2], -1, 2)
            changed[name] = pairs[..., ::-1].reshape(weights[name].shape)
        if name.startswith(layer) and name.endswith("moe.input_linear.weight"):
            changed[name] = np.roll(weights[name], weights[name].shape[1] // 2, axis=1)
        for gate, up in twins.items():
            if name.startswith(layer) and name.endswith(gate) and "self_attn" not in name:
                other = name.removesuffix(gate) + up
                changed |= {name: weights[other], other: weights[name]}
    return changed


def scale_mistakes(config: ModelConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    if config.norm_offset:
        yield "no offset of norms", {"norm_offset": 0.0}
    for name in ("embedding_scale", "residual_scale", "logits_scale"):
        if getattr(config, name) != 1:
            yield f"no {name}", {name: 1.0}
            yield f"{name} a tenth too large", {name: 1.1 * getattr(config, name)}
    if config.attention_scale:
        yield "the usual scale of scores", {"attention_scale": None}
    if config.qk_norm:
        later = not config.qk_norm_after_rope
        yield "norms of q and k on the other side of rope", {"qk_norm_after_rope": later}
        yield "no norms of q and k", {"qk_norm": False}
    if config.rope_interleaved:
        yield "pairs of halves", {"rope_interleaved": False}
    if config.qk_l2_norm:
        yield "no norms of q and k", {"qk_l2_norm": False}
    chunks = config.chunks
    if any(chunks):
        longest, none = max(c for c in chunks if c), (None,) * config.layers
        yield "chunks one too long", {"chunks": tuple(c and c + 1 for c in chunks)}
        yield "no chunks", {"chunks": none}
        yield "windows for chunks", {"chunks": none, "windows": chunks}
        yield "chunks everywhere", {"chunks": (longest,) * config.layers}
    if config.partial_rotary_dim and config.rope.kind != "longrope":
        yield "one pair more", {"partial_rotary_dim": config.partial_rotary_dim + 2}
        yield "one pair less", {"partial_rotary_dim": config.partial_rotary_dim - 2}


def layer_norm_mistakes(config: ModelConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """What there is beside LayerNorm in the families that have it."""
    if config.layer_norm:
        yield "a mean that stays", {"layer_norm": False}
    if config.parallel_residual:
        yield "one sub-layer after the other", {"parallel_residual": False}
    if config.learned_positions:
        yield "no positions", {"learned_positions": 0}
        yield "positions off by one", {"position_offset": config.position_offset + 1}
    if config.alibi:
        yield "no biases of scores", {"alibi": None}

    if config.alibi == "in bfloat16":
        yield "biases that are not scaled as scores are", {"alibi": "exact"}
    if config.clip_qkv:
        yield "nothing clipped", {"clip_qkv": None}
        yield "clipped a tenth too late", {"clip_qkv": 1.1 * config.clip_qkv}
    if config.inverse_layer_scale:
        yield "the same scale in all layers", {"inverse_layer_scale": False}
    if config.embedding_norm:
        yield "no norm of the embedding", {"embedding_norm": False}
    if config.per_head_norm:
        yield "no norms of heads", {"per_head_norm": False}


def norm_mistakes(config: ModelConfig) -> Iterator[tuple[str, LayerNormNames]]:
    """Norms left out, and norms before sub-layers instead of after them."""
    norms = config.norms
    for field in fields(norms):
        if getattr(norms, field.name) is not None:
            yield f"no {field.name} norm", replace(norms, **{field.name: None})
    before_and_after = LayerNormNames(
        attention=norms.attention_post,
        attention_post=norms.attention,
        ffn=norms.ffn_post,
        ffn_post=norms.ffn,
    )
    yield "norms on the other side of sub-layers", before_and_after


def rope_mistakes(rope: Rope) -> Iterator[tuple[str, Rope]]:
    if rope.query_scale_beta:
        yield "queries not scaled by position", replace(rope, query_scale_beta=0.0)
        later = 1 - rope.query_scale_offset
        yield "queries scaled one position later", replace(rope, query_scale_offset=later)
    if rope.kind == "none":
        return
    yield "theta a tenth too large", replace(rope, theta=1.1 * rope.theta)
    if rope.kind != "default":
        yield "no rope scaling", replace(rope, kind="default")
    if rope.kind != "default" and rope.attention_factor is None and not rope.mscales:
        yield "factor a tenth too large", replace(rope, factor=1.1 * rope.factor)
    if rope.kind in ("dynamic", "llama3", "yarn", "longrope") and not rope.mscales:
        longer = replace(rope, original_positions=rope.original_positions + 1)
        yield "original length one too long", longer
    used = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
    }
    for name in used.get(rope.kind, ()):
        value = getattr(rope, name)
        default = next(field.default for field in fields(rope) if field.name == name)
        if value != default:
            changes: dict[str, Any] = {name: default}
            yield f"{name} ignored", replace(rope, **changes)
    if rope.kind == "yarn":
        yield "truncate the other way", replace(rope, truncate=not rope.truncate)
        yield "no attention factor", replace(rope, attention_factor=1.0)
    if rope.mscales:
        first, second = rope.mscales
        yield "the short mscale alone", replace(rope, mscales=(first, first))
    if rope.kind == "longrope" and not rope.mscales:
        yield "short factors alone", replace(rope, long_factors=rope.short_factors)
        yield "no attention factor", replace(rope, attention_factor=1.0)


def window_mistakes(config):
    windows = config.windows
    if any(windows):
        yield "window one too wide", tuple(w and w + 1 for w in windows)
        yield "window one too narrow", tuple(w and w - 1 for w in windows)
        yield "no window", (None,) * config.layers
    if len(set(windows)) > 1:
        yield "windows on other layers", windows[1:] + windows[:1]
        yield "windows everywhere", (max(w for w in windows if w),) * config.layers


def weight_mistakes(config, weights):
    layer = f"model.layers.{config.layers - 1}."
    # Without rope a bias of k adds the same to all scores of a query.
    unrotated = {
        f"model.layers.{number}.self_attn.k_proj.bias"
        for number, rope in enumerate(config.ropes)
        if rope.kind == "none"
    }
    for name in weights:
        if name.endswith("bias") and weights[name].any() and name not in unrotated:
            yield f"no {name}", {name: np.zeros_like(weights[name])}
        if "norm" in name and not name.endswith("bias"):
            yield f"no {name}", {name: np.ones_like(weights[name])}
    if config.gated_mlp:
        yield "gate for up", gate_for_up(weights, layer)
    for part in "qk" if config.per_head_norm and config.kv_heads > 1 else "":
        norm = f"{layer}self_attn.{part}_norm.weight"
        yield f"norms of other {part}", {norm: np.roll(weights[norm], 1, axis=0)}
    if config.moe is not None and config.moe.layers[-1]:
        router = layer + router_of(config)
        yield "experts in another order", {router: np.roll(weights[router], 1, axis=0)}
    if not config.tied:
        yield "embedding for head", {"lm_head.weight": weights["model.embed_tokens.weight"]}

    heads = latent_mistakes if config.mla else head_mistakes
    yield from heads(config, weights, layer)
    if config.linear_attention:
        yield from linear_mistakes(config.linear_attention, weights)


def linear_mistakes(linear, weights):
    """Of the first gated delta net."""
    layer = f"model.layers.{linear.layers.index(True)}.linear_attn."

    def changed(name, array):
        return {layer + name: array.reshape(weights[layer + name].shape)}

    def by_head(name, heads):
        return weights[layer + name].reshape(heads, -1)

    for part, heads in (("q", linear.kv_heads), ("k", linear.kv_heads), ("v", linear.heads)):
        name = f"{part}_proj.weight"
        turned = [1, 0, *range(2, heads)]
        yield f"heads 0 and 1 of linear {part} swapped", changed(name, by_head(name, heads)[turned])
        taps = weights[f"{layer}{part}_conv1d.weight"]
        yield f"taps of {part} reversed", changed(f"{part}_conv1d.weight", taps[..., ::-1])
    # As if value head h had key head h % G in place of h // (H / G).
    order = np.arange(linear.heads).reshape(-1, linear.kv_heads).T.ravel()
    dealt: Weights = {}
    for name in ("v_proj.weight", "b_proj.weight", "a_proj.weight", "A_log", "dt_bias"):
        dealt |= changed(name, by_head(name, linear.heads)[order])
    yield "value heads dealt in turn", dealt
    yield (
        "decay and rate swapped",
        {
            f"{layer}a_proj.weight": weights[f"{layer}b_proj.weight"],
            f"{layer}b_proj.weight": weights[f"{layer}a_proj.weight"],
        },
    )
    yield "no decay of a head's own", changed("A_log", np.zeros(linear.heads))


def head_mistakes(config, weights, layer):
    def by_head(part, heads):
        return weights[f"{layer}self_attn.{part}_proj.weight"].reshape(heads, config.head_dim, -1)

    H, G, D = config.heads, config.kv_heads, config.hidden
    for part in ("k", "v"):
        if G > 1:
            name = f"{layer}self_attn.{part}_proj.weight"
            swapped = by_head(part, G)[[1, 0, *range(2, G)]]
            yield f"heads 0 and 1 of {part} swapped", {name: swapped.reshape(-1, D)}
    if 1 < G < H:
        # As if query head h had key/value head h % G in place of h // (H / G).
        order = np.arange(H).reshape(H // G, G).T.ravel()
        q, o = f"{layer}self_attn.q_proj.weight", f"{layer}self_attn.o_proj.weight"
        dealt = {q: by_head("q", H)[order].reshape(-1, D)}
        columns = weights[o].reshape(D, H, config.head_dim)[:, order]
        if f"{layer}self_attn.q_proj.bias" in weights:
            bias = f"{layer}self_attn.q_proj.bias"
            dealt[bias] = weights[bias].reshape(H, -1)[order].ravel()
        yield "key/value heads dealt in turn", dealt | {o: columns.reshape(D, -1)}
    turned = weights[f"{layer}self_attn.q_proj.weight"] / np.sqrt(config.head_dim)
    yield "scores scaled twice", {f"{layer}self_attn.q_proj.weight": turned}


def latent_mistakes(config, weights, layer):
    mla, H = config.mla, config.heads
    q = f"{layer}self_attn.q_{'b_' if mla.q_lora_rank else ''}proj.weight"
    kv = f"{layer}self_attn.kv_b_proj.weight"
    o = f"{layer}self_attn.o_proj.weight"
    turned = [1, 0, *range(2, H)]
    for name in (q, kv):
        by_head = weights[name].reshape(H, -1, weights[name].shape[1])
        yield (
            f"heads 0 and 1 of {name} swapped",
            {name: by_head[turned].reshape(-1, by_head.shape[2])},
        )
    by_head = weights[kv].reshape(H, mla.qk_nope_head_dim + mla.v_head_dim, mla.kv_lora_rank)
    keys, values = by_head[:, : mla.qk_nope_head_dim], by_head[:, mla.qk_nope_head_dim :]
    values_first = np.concatenate([values, keys], axis=1)
    yield "values before keys", {kv: values_first.reshape(weights[kv].shape)}
    rolled = np.roll(
        weights[f"{layer}self_attn.kv_a_proj_with_mqa.weight"], mla.qk_rope_head_dim, axis=0
    )
    yield "shared key before the latent", {f"{layer}self_attn.kv_a_proj_with_mqa.weight": rolled}
    yield "scores scaled twice", {q: weights[q] / np.sqrt(config.head_dim)}
    by_head = weights[o].reshape(len(weights[o]), H, -1)
    yield "heads 0 and 1 of o swapped", {o: by_head[:, turned].reshape(weights[o].shape)}


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_pairs_of_neighbours_in_place_of_halves_show(variant, monkeypatch):
    if tiny_config(variant).rope == NO_ROPE:
        return
    halves, neighbours = reference.rotate, reference.rotate_neighbours
    monkeypatch.setattr(reference, "rotate", neighbours)
    monkeypatch.setattr(reference, "rotate_neighbours", halves)
    expected = golden(variant)
    logits_SV, _ = Reference(tiny_config(variant), tiny_weights(variant)).forward(
        expected["ids_1"].tolist()
    )
    assert deviation(logits_SV, expected["logits_1"]) > 50 * BOUND


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_other_form_of_gelu_shows(variant):
    """It differs by little, but by more than the tolerance."""
    config, expected = tiny_config(variant), golden(variant)
    others = {"gelu": "gelu_pytorch_tanh", "gelu_pytorch_tanh": "gelu"}
    if config.activation in others:
        config = replace(config, activation=others[config.activation])
        logits_SV, _ = Reference(config, tiny_weights(variant)).forward(expected["ids_1"].tolist())
        assert deviation(logits_SV, expected["logits_1"]) > 1.5 * BOUND


def test_biases_that_are_not_rounded_show(monkeypatch):
    expected = golden("falcon-alibi")
    model = Reference(tiny_config("falcon-alibi"), tiny_weights("falcon-alibi"))
    monkeypatch.setattr(reference, "bfloat16", lambda x: x)
    logits_SV, _ = model.forward(expected["ids_1"].tolist())
    assert deviation(logits_SV, expected["logits_1"]) > 1.5 * BOUND


def test_an_older_token_does_not_see_a_newer_one():
    variant = "llama-gqa"
    model = Reference(tiny_config(variant), tiny_weights(variant))
    ids = tiny_prompts(variant)[1]
    logits_SV, _ = model.forward(ids)
    shorter_SV, _ = model.forward(ids[:9])
    assert np.abs(logits_SV[:9] - shorter_SV).max() < 1e-12


def test_visible():
    assert reference.visible(4, 2).astype(int).tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]
    assert np.array_equal(reference.visible(4, None), np.tri(4, dtype=bool))


def test_greedy_takes_the_lowest_of_equals():
    weights = tiny_weights("llama-mha")
    head_VD = weights["lm_head.weight"]
    tokens = Reference(tiny_config("llama-mha"), weights).greedy([3, 4], 1)
    token = tokens[0]
    other = token - 1 if token else token + 1
    head_VD[other] = head_VD[token]
    assert Reference(tiny_config("llama-mha"), weights).greedy([3, 4], 1) == [min(token, other)]


def test_extreme_activations_are_exact_and_silent():
    x = np.array([-1000.0, -1.0, 0.0, 1000.0], np.float32)
    with np.errstate(all="raise", under="ignore"):
        assert reference.silu(x)[[0, 2, 3]].tolist() == [0, 0, 1000]
        assert reference.relu(x).tolist() == [0, 0, 0, 1000]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_weights_are_widened(dtype):
    config = tiny_config("llama-mha")
    ids = tiny_prompts("llama-mha")[0]
    narrow = Reference(config, tiny_weights("llama-mha", dtype), np.float32).forward(ids)[0]
    wide = Reference(config, tiny_weights("llama-mha"), np.float32).forward(ids)[0]
    assert np.array_equal(narrow, wide)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_checkpoints_of_every_type_hold_the_same_model(dtype, shards, tmp_path):
    directory = write_checkpoint("qwen3-bias", tmp_path / "model", dtype, shards)
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) == shards
    weights = {name: array for file in files for name, array in load_file(file).items()}
    expected = tiny_weights("qwen3-bias")
    assert weights.keys() == expected.keys()
    for name, array in weights.items():
        assert array.dtype.name == dtype
        assert np.array_equal(array.astype(np.float32), expected[name])
    if shards > 1:
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        for file in files:
            held = {name for name, where in index["weight_map"].items() if where == file.name}
            assert held == load_file(file).keys()


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("variant", MOE_VARIANTS)
def test_checkpoints_of_mixtures(variant, stacked, tmp_path):
    directory = write_checkpoint(variant, tmp_path, "bfloat16", stacked=stacked)
    weights = load_file(directory / "model.safetensors")
    expected = stored(tiny_config(variant), (stacked_weights if stacked else tiny_weights)(variant))
    assert weights.keys() == expected.keys()
    assert all(np.array_equal(weights[name], expected[name]) for name in weights)


def test_the_oracle_shares_no_arithmetic():
    tree = ast.parse(Path(reference.__file__).read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module or ".")
    standard = {"__future__", "math", "collections.abc", "typing"}
    allowed = standard | {"numpy", "mpishard.config.model_config"}
    assert imported <= allowed
