"""A model's weights on this rank, as the layers that `mpishard.model` calls.

Families differ in the data of their configuration alone: which weights there are, and what norms,
rotary embedding, windows, scales and soft caps a layer has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mpishard.arithmetic import rotary
from mpishard.arithmetic.attention import AttentionSpec
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
from mpishard.arithmetic.routing import ExpertCapacity, Router
from mpishard.communication.mesh import Mesh
from mpishard.config.layout import kv_replica_ranks
from mpishard.config.model_config import LinearAttentionConfig, MLAConfig, ModelConfig, MoEConfig
from mpishard.config.weight_specs import experts_by_ep_rank, weight_specs
from mpishard.parallel import expert
from mpishard.parallel.expert import MoELayer
from mpishard.parallel.linear_attention import GatedDeltaNet
from mpishard.parallel.physical_experts import PhysicalExperts
from mpishard.parallel.qkv import MLA, Attention, FullWidthNorm
from mpishard.parallel.tensor import FeedForward, GatedFeedForward, UngatedFeedForward

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


def weights_by_field(
    config: ModelConfig, weights: Fields
) -> tuple[Fields, list[dict[int | None, Fields]]]:
    """The weights by the field names of `weight_specs`: the model's own, and each layer's, those of
    each expert apart. Of the experts there are those that this rank has."""
    own: Fields = {}
    layers: list[dict[int | None, Fields]] = [{None: {}} for _ in range(config.layers)]
    for weight in weight_specs(config):
        if weight.name in weights:
            fields = own
            if weight.layer is not None:
                fields = layers[weight.layer].setdefault(weight.expert, {})
            fields[weight.field] = weights[weight.name]
    return own, layers


def make_layer(
    config: ModelConfig, number: int, fields: dict[int | None, Fields], mesh: Mesh
) -> Layer:
    """Layer `number` of the model on this rank of `mesh`, from its weights by field and expert."""
    w = fields[None]
    ffn: FeedForward | MoELayer
    if config.moe and config.moe.layers[number]:
        experts = {place: own for place, own in fields.items() if place is not None}
        ffn = _moe_layer(config, config.moe, number, w, experts, mesh)
    else:
        ffn = _feed_forward(w, config)
    return Layer(
        attention_norm=make_norm(config, w, "attention_norm"),
        attention=_any_attention(config, number, w, mesh),
        attention_post_norm=_post_norm(config, w, "attention_post_norm"),
        ffn_norm=make_norm(config, w, "ffn_norm"),
        ffn=ffn,
        ffn_post_norm=_post_norm(config, w, "ffn_post_norm"),
    )


def make_norm(config: ModelConfig, w: Fields, field: str) -> Norm:
    """The norm whose weight is `field` of `w`; the identity where there is none."""
    return _rms_norm(config, w[field]) if field in w else identity


def _post_norm(config: ModelConfig, w: Fields, field: str) -> Norm:
    """What is done with the output of a sub-layer before it is added to the residual stream."""
    if config.residual_scale != 1:
        assert field not in w, "no family has both"
        return Multiplier(config.residual_scale)
    return make_norm(config, w, field)


def _rms_norm(config: ModelConfig, weight: np.ndarray) -> RMSNorm:
    if config.norm_offset:
        weight = weight + weight.dtype.type(config.norm_offset)
    return RMSNorm(weight, config.norm_eps)


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
    q_norm = k_norm = None
    if config.qk_norm:
        q_norm, k_norm = _rms_norm(config, w["q_norm"]), _rms_norm(config, w["k_norm"])
    return Attention(
        q=_linear(w, "q"),
        k=_linear(w, "k"),
        v=_linear(w, "v"),
        o=_linear(w, "o"),
        head_dim=config.head_dim,
        spec=AttentionSpec(
            scale, config.windows[number], config.attn_logit_softcapping, w.get("sinks")
        ),
        q_norm=q_norm,
        k_norm=k_norm,
        norm_after_rope=config.qk_norm_after_rope,
        full_width_norm=_full_width_norm(config, w, mesh) if config.full_width_qk_norm else None,
        o_gate=_linear(w, "o_gate") if config.output_gate else None,
        interleaved=config.rope_interleaved,
    )


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


def _feed_forward(w: Fields, config: ModelConfig) -> FeedForward:
    if config.gated_mlp:
        return _gated(w, glu(config.activation))
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
        ),
        experts={expert: _gated(own, of_experts) for expert, own in experts.items()},
        shared_expert=_gated(w, dense) if moe.shared_expert_intermediate_size else None,
        shared_expert_gate=Linear(w["shared_gate"]) if "shared_gate" in w else None,
        physical_experts=PhysicalExperts.of(
            experts_by_ep_rank(moe.num_experts, mesh.weight_sharding, number)
        ),
        capacity=capacity,
        dispatch=expert.DISPATCHERS[layout.moe_token_dispatcher],
    )
