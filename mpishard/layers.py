"""A model's weights on this rank, as the layers that `mpishard.model` calls.

Families differ in the data of their configuration alone: which weights there are, and what norms,
rotary embedding, windows, scales and soft caps a layer has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from mpishard.arithmetic import rotary
from mpishard.arithmetic.alibi import LinearBiases, alibi_slopes
from mpishard.arithmetic.attention import AttentionSpec
from mpishard.arithmetic.layer_norm import Affine, LayerNorm, Standardize
from mpishard.arithmetic.linear import Linear, elementwise
from mpishard.arithmetic.ops import (
    ACTIVATIONS,
    GLU,
    Multiplier,
    RMSNorm,
    clamped_swiglu,
    glu,
    identity,
)
from mpishard.arithmetic.position_bias import HeadBiases
from mpishard.arithmetic.relative_bias import RelativeBiases
from mpishard.arithmetic.routing import ExpertCapacity, Router
from mpishard.communication.mesh import Mesh
from mpishard.config.layout import block, kv_replica_ranks, query_heads_of
from mpishard.config.model_config import LinearAttentionConfig, MLAConfig, ModelConfig, MoEConfig
from mpishard.config.weight_specs import experts_by_ep_rank, name_of_encoder, weight_specs
from mpishard.parallel import expert
from mpishard.parallel.cross_attention import CrossAttention
from mpishard.parallel.expert import MoELayer
from mpishard.parallel.linear_attention import GatedDeltaNet
from mpishard.parallel.physical_experts import PhysicalExperts
from mpishard.parallel.qkv import MLA, Attention, FullWidthNorm
from mpishard.parallel.sequence_capacity import SequenceCapacity
from mpishard.parallel.tensor import (
    Embedding,
    FeedForward,
    GatedFeedForward,
    ParallelLayer,
    UngatedFeedForward,
)

Norm = Callable[[np.ndarray], np.ndarray]
Fields = dict[str, np.ndarray]


@dataclass(frozen=True)
class Layer:
    """One decoder layer on this rank. A norm that the family does not have is the identity, and
    after a sub-layer the factor of what the sub-layer adds to the residual stream."""

    attention_norm: Norm
    attention: Attention | MLA | GatedDeltaNet
    attention_post_norm: Norm
    ffn_norm: Norm
    ffn: FeedForward | MoELayer
    ffn_post_norm: Norm
    cross_norm: Norm = identity
    cross_attention: CrossAttention | None = None  # beside an encoder


def weights_by_field(
    config: ModelConfig, weights: Fields
) -> tuple[Fields, list[dict[int | None, Fields]]]:
    """The weights by the field names of `weight_specs`: the model's own, and each layer's, those of
    each expert apart. Of the experts there are those that this rank has."""
    own: Fields = {}
    layers: list[dict[int | None, Fields]] = [{None: {}} for _ in range(config.layers)]
    for weight in weight_specs(config):
        if weight.name in weights and not weight.of_encoder:
            fields = own
            if weight.layer is not None:
                fields = layers[weight.layer].setdefault(weight.expert, {})
            fields[weight.field] = weights[weight.name]
    if "relative_bias" in own:  # which all layers share
        for experts in layers:
            experts[None]["relative_bias"] = own["relative_bias"]
    return own, layers


def weights_of_encoder(encoder: ModelConfig, weights: Fields) -> Fields:
    """The weights of an encoder by the names that they have in a model of its own."""
    names = {weight.name: name_of_encoder(weight.name) for weight in weight_specs(encoder)}
    return {own: weights[name] for own, name in names.items() if name in weights}


def make_embedding(config: ModelConfig, own: Fields, mesh: Mesh) -> Embedding | None:
    """This rank's part of the embedding, of a stage that has it."""
    if "embedding" not in own:
        return None
    rows, tp = config.learned_positions, mesh.tp
    return Embedding(
        tokens_vD=own["embedding"],
        vocab_start=block(config.vocab, tp.size, tp.rank).start,
        positions=own.get("positions"),
        first_row=block(rows, tp.size, tp.rank).start,
        position_offset=config.position_offset,
    )


def model_norm(config: ModelConfig, own: Fields, field: str) -> Norm:
    """A norm outside of the layers; the identity where the family or the stage has none."""
    is_there = field in own or (field == "norm" and not config.norm_weight)
    return make_norm(config, own, field) if is_there else identity


def make_layer(
    config: ModelConfig, number: int, fields: dict[int | None, Fields], mesh: Mesh
) -> Layer | ParallelLayer:
    """Layer `number` of the model on this rank of `mesh`, from its weights by field and expert."""
    w = fields[None]
    ffn: FeedForward | MoELayer
    if config.moe and config.moe.layers[number]:
        experts = {place: own for place, own in fields.items() if place is not None}
        ffn = _moe_layer(config, config.moe, number, w, experts, mesh)
    else:
        ffn = _feed_forward(w, config)
    names = config.norms
    attention = _any_attention(config, number, w, mesh)
    if config.parallel_residual:
        assert isinstance(attention, Attention), "no family has another attention beside it"
        assert not isinstance(ffn, MoELayer), "no family has experts beside attention"
        return _parallel_layer(config, w, attention, ffn)
    return Layer(
        attention_norm=_norm_if(names.attention, config, w, "attention_norm"),
        attention=attention,
        attention_post_norm=_post_norm(names.attention_post, config, w, "attention_post_norm"),
        ffn_norm=_norm_if(names.ffn, config, w, "ffn_norm"),
        ffn=ffn,
        ffn_post_norm=_post_norm(names.ffn_post, config, w, "ffn_post_norm"),
        cross_norm=_norm_if(names.cross if config.encoder else None, config, w, "cross_norm"),
        cross_attention=_cross_attention(config, w) if config.encoder else None,
    )


def _parallel_layer(
    config: ModelConfig, w: Fields, attention: Attention, ffn: FeedForward
) -> ParallelLayer:
    if config.norms.ffn is None:
        norm = make_norm(config, w, "attention_norm")
        return ParallelLayer(norm, identity, attention, identity, ffn)
    # Both norms standardize the same rows.
    affines = [Affine(w[field], w.get(f"{field}_bias")) for field in ("attention_norm", "ffn_norm")]
    return ParallelLayer(Standardize(config.norm_eps), affines[0], attention, affines[1], ffn)


def make_norm(config: ModelConfig, w: Fields, field: str) -> Norm:
    """The norm whose weight is `field` of `w` and whose bias stands beside it, if it has them."""
    weight, bias = w.get(field), w.get(f"{field}_bias")
    if weight is not None and config.norm_offset:
        weight = weight + weight.dtype.type(config.norm_offset)
    if config.layer_norm:
        return LayerNorm(weight, bias, config.norm_eps)
    assert weight is not None, "every RMSNorm has a weight"
    return RMSNorm(weight, config.norm_eps)


def _norm_if(name: str | None, config: ModelConfig, w: Fields, field: str) -> Norm:
    """The norm in `field`, if the family has a `name` for it."""
    return identity if name is None else make_norm(config, w, field)


def _post_norm(name: str | None, config: ModelConfig, w: Fields, field: str) -> Norm:
    """What is done with the output of a sub-layer before it is added to the residual stream."""
    if config.residual_scale != 1:
        assert name is None, "no family has both"
        return Multiplier(config.residual_scale)
    return _norm_if(name, config, w, field)


def _linear(w: Fields, field: str) -> Linear:
    return Linear(w[field], w.get(f"{field}_bias"))


def _any_attention(
    config: ModelConfig, number: int, w: Fields, mesh: Mesh
) -> Attention | MLA | GatedDeltaNet:
    if config.linear_attention and config.linear_attention.layers[number]:
        return _gated_delta_net(config, config.linear_attention, w)
    if config.mla:
        return _mla(config, config.mla, number, w)
    return _attention(config, number, w, mesh)


def _gated_delta_net(
    config: ModelConfig, linear: LinearAttentionConfig, w: Fields
) -> GatedDeltaNet:
    g, h = len(w["k"]) // linear.key_width, len(w["rate"])
    return GatedDeltaNet(
        q=_linear(w, "q"),
        k=_linear(w, "k"),
        v=_linear(w, "v"),
        o_gate=_linear(w, "o_gate"),
        rate=_linear(w, "rate"),
        decay=_linear(w, "decay"),
        taps_XT=np.concatenate([w[f"{part}_taps"][:, 0] for part in ("q", "k", "v")]),
        log_a_h=w["log_a"],
        dt_bias_h=w["dt_bias"],
        norm=RMSNorm(w["o_norm"], config.norm_eps),  # without the offset of the other norms
        o=_linear(w, "o"),
        key_head_h=np.arange(h) // (h // g),
        key_width=linear.key_width,
        value_width=linear.value_width,
    )


def _attention(config: ModelConfig, number: int, w: Fields, mesh: Mesh) -> Attention:
    scale = config.attention_scale or config.head_dim**-0.5
    if config.inverse_layer_scale:
        scale /= number + 1
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    if config.qk_l2_norm and config.ropes[number].kind != "none":
        q_norm = k_norm = RMSNorm(np.ones(config.head_dim, w["q"].dtype), config.norm_eps)
    if config.qk_norm or config.per_head_norm:
        q_norm, k_norm = make_norm(config, w, "q_norm"), make_norm(config, w, "k_norm")
    biases, group_biases = _position_biases(config, w, mesh)
    return Attention(
        q=_linear(w, "q"),
        k=_linear(w, "k"),
        v=_linear(w, "v"),
        o=_linear(w, "o"),
        head_dim=config.head_dim,
        spec=AttentionSpec(
            scale,
            config.windows[number],
            config.attn_logit_softcapping,
            w.get("sinks"),
            chunk=config.chunks[number],
            biases=biases,
            group_biases=group_biases,
            causal=config.causal,
        ),
        clip=config.clip_qkv,
        q_norm=q_norm,
        k_norm=k_norm,
        norm_after_rope=config.qk_norm_after_rope,
        full_width_norm=_full_width_norm(config, w, mesh) if config.full_width_qk_norm else None,
        o_gate=_linear(w, "o_gate") if config.output_gate else None,
        interleaved=config.rope_interleaved,
    )


def _cross_attention(config: ModelConfig, w: Fields) -> CrossAttention:
    scale = config.attention_scale or config.head_dim**-0.5
    return CrossAttention(
        q=_linear(w, "cross_q"),
        k=_linear(w, "cross_k"),
        v=_linear(w, "cross_v"),
        o=_linear(w, "cross_o"),
        head_dim=config.head_dim,
        spec=AttentionSpec(scale, causal=False),
    )


def _position_biases(
    config: ModelConfig, w: Fields, mesh: Mesh
) -> tuple[HeadBiases | None, HeadBiases | None]:
    """The biases of the scores of this rank's query heads, and of those of all ranks that share a
    cache."""
    biases = _all_biases(config, w)
    if biases is None:
        return None, None
    tp, rank = mesh.tp.size, mesh.tp.rank
    own = query_heads_of(config, tp, rank)
    _, ranks = kv_replica_ranks(config, tp, rank)
    group = own
    if mesh.layout.flash_decoding:
        held = [query_heads_of(config, tp, one) for one in ranks]
        group = slice(held[0].start, held[-1].stop)
    return biases.of_heads(own), biases.of_heads(group)


def _all_biases(config: ModelConfig, w: Fields) -> HeadBiases | None:
    """The biases of all heads."""
    if config.relative_bias is not None:
        max_distance = config.relative_bias.max_distance
        return RelativeBiases(w["relative_bias"], max_distance, config.causal)
    if config.alibi is None:
        return None
    biases = LinearBiases(alibi_slopes(config.heads))
    if config.alibi == "in bfloat16":  # Falcon scales the biases as it scales the scores
        return replace(biases, scale=config.head_dim**-0.5, rounded=True)
    return biases


def _full_width_norm(config: ModelConfig, w: Fields, mesh: Mesh) -> FullWidthNorm:
    K, (_, ranks) = config.head_dim, kv_replica_ranks(config, mesh.tp.size, mesh.tp.rank)
    return FullWidthNorm(
        q_weight=w["q_norm"],
        k_weight=w["k_norm"],
        q_width=config.heads * K,
        k_width=config.kv_heads * K,
        kv_head_replicas=len(ranks),
        eps=config.norm_eps,
    )


def _mla(config: ModelConfig, mla: MLAConfig, number: int, w: Fields) -> MLA:
    rope, scale = config.ropes[number], config.head_dim**-0.5
    if rope.kind == "yarn":
        scale *= rotary.yarn_softmax_scale(rope.factor, rope.mscale_all_dim)
    return MLA(
        q=Linear(w["q"] if mla.q_lora_rank is None else w["q_b"]),
        q_a=_linear(w, "q_a") if "q_a" in w else None,
        q_a_norm=RMSNorm(w["q_a_norm"], mla.norm_eps) if "q_a_norm" in w else None,
        kv_a=_linear(w, "kv_a"),
        kv_a_norm=RMSNorm(w["kv_a_norm"], mla.norm_eps),
        kv_b=Linear(w["kv_b"]),
        o=_linear(w, "o"),
        qk_nope_head_dim=mla.qk_nope_head_dim,
        v_head_dim=mla.v_head_dim,
        interleaved=mla.interleaved,
        spec=AttentionSpec(scale, config.windows[number], values_in_keys=True),
    )


def _feed_forward(w: Fields, config: ModelConfig, act_and_mul: GLU | None = None) -> FeedForward:
    if config.gated_mlp:
        return _gated(w, act_and_mul or glu(config.activation))
    up = Linear(w["up"], w.get("up_bias"), keep_packed=True)
    return UngatedFeedForward(up, _linear(w, "down"), elementwise(ACTIVATIONS[config.activation]))


def _gated(w: Fields, act_and_mul: GLU) -> GatedFeedForward:
    return GatedFeedForward(
        gate=Linear(w["gate"], w.get("gate_bias"), keep_packed=True),
        up=Linear(w["up"], w.get("up_bias"), keep_packed=True),
        down=_linear(w, "down"),
        act_and_mul=elementwise(act_and_mul),
    )


def _moe_layer(
    config: ModelConfig,
    moe: MoEConfig,
    number: int,
    w: Fields,
    experts: dict[int, Fields],
    mesh: Mesh,
) -> MoELayer:
    dense = glu(config.activation)
    of_experts = dense
    if moe.alpha is not None and moe.limit is not None:
        of_experts = clamped_swiglu(moe.alpha, moe.limit)
    layout = mesh.layout
    sequence_capacity = None
    if moe.capacity is not None:
        sequence_capacity = SequenceCapacity(moe.capacity, sum(moe.layers[:number]))
    capacity = None
    if layout.expert_capacity_factor:
        capacity = ExpertCapacity(layout.expert_capacity_factor, layout.token_drop_policy)
    return MoELayer(
        gate=_linear(w, "router"),
        e_score_correction_bias=w.get("e_score_correction_bias"),
        router=Router(
            moe.top_k,
            moe.scoring,
            moe.norm_topk_prob,
            moe.routed_scaling_factor,
            moe.n_group,
            moe.topk_group,
            moe.group_score,
            moe.norm_min,
            moe.jitter,
        ),
        scale_inputs=moe.scale_inputs,
        experts={expert: _feed_forward(own, config, of_experts) for expert, own in experts.items()},
        shared_expert=_gated(w, dense) if moe.shared_expert_intermediate_size else None,
        shared_expert_gate=Linear(w["shared_gate"]) if "shared_gate" in w else None,
        physical_experts=PhysicalExperts.of(
            experts_by_ep_rank(moe.num_experts, mesh.weight_sharding, number)
        ),
        capacity=capacity,
        sequence_capacity=sequence_capacity,
        dispatch=expert.DISPATCHERS[layout.moe_token_dispatcher],
    )
