"""Reads the mixture of experts in a ``config.json``."""

from __future__ import annotations

from mpishard.config.families.family import MoEFamily
from mpishard.config.fields import Fields
from mpishard.config.model_config import MoEConfig

# No model has so many experts in all layers together. A damaged number must not fill the memory
# with names of experts before there is any weight to compare it with.
MOST_EXPERTS = 200_000

# The spellings of the number of experts, and of the number of experts per token.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "experts_per_token", "moe_topk", "moe_k")

_DEFAULT_ALPHA = 1.702
_DEFAULT_LIMIT = 7.0


def read_moe(fields: Fields, family: MoEFamily, layers: int) -> MoEConfig:
    """The mixture of experts of a model of so many `layers`. Raises UserError as
    `read_model_config` does."""
    experts = fields.same_integer(*_EXPERTS)
    if experts * layers > MOST_EXPERTS:
        name = next(name for name in _EXPERTS if fields.values.get(name) is not None)
        fields.refuse(name, f"must be at most {MOST_EXPERTS} in all {layers} layers together")
    top_k = family.top_k or fields.same_integer(*_TOP_K)
    ffn = fields.integer(family.ffn)
    normalized = family.normalized
    if normalized is None:
        normalized = fields.flag("norm_topk_prob", family.normalized_default)
    groups, topk_group = _groups(fields, family, experts)
    if top_k > experts // groups * topk_group:
        within = f" in {topk_group} of {groups} groups" if groups > 1 else ""
        fields.refuse(
            _TOP_K[0], f"must be at most the {experts // groups * topk_group} experts{within}"
        )
    fields.only("scoring_func", family.scoring)
    norm_min = jitter = 0.0
    if family.normalized_by_at_least is not None:
        norm_min = fields.number("moe_norm_min", family.normalized_by_at_least)
    if family.scoring == "sparsemixer":
        jitter = fields.number("router_jitter_noise", 0.01)
        if top_k != 2:
            fields.refuse(_TOP_K[0], f"must be 2 for a sparsemixer, not {top_k}")
    return MoEConfig(
        num_experts=experts,
        top_k=top_k,
        moe_intermediate_size=ffn,
        layers=_moe_layers(fields, family, layers),
        scoring=family.scoring,
        norm_topk_prob=normalized,
        names=family.names,
        norm_min=norm_min,
        jitter=jitter,
        routed_scaling_factor=fields.number("routed_scaling_factor", family.scaling)
        if family.scaling
        else 1.0,
        e_score_correction_bias=family.names.e_score_correction_bias is not None,
        n_group=groups,
        topk_group=topk_group,
        group_score="top-2 sum" if family.choice == "noaux_tc" else "max",
        shared_expert_intermediate_size=_shared_width(fields, family, ffn),
        shared_gate=family.names.shared_gate is not None,
        scale_inputs=family.scale_inputs,
        router_bias=family.biases or (family.capacity and fields.flag("router_bias", False)),
        expert_bias=family.biases,
        alpha=fields.number("swiglu_alpha", _DEFAULT_ALPHA) if family.clamped else None,
        limit=fields.number("swiglu_limit", _DEFAULT_LIMIT) if family.clamped else None,
        capacity=fields.integer("expert_capacity", 64) if family.capacity else None,
    )


def _moe_layers(fields: Fields, family: MoEFamily, layers: int) -> tuple[bool, ...]:
    """Whether each layer has experts."""
    if family.dense == "the first":
        fields.only("moe_layer_freq", 1)
        first = fields.non_negative_integer("first_k_dense_replace", family.first_dense)
        return tuple(layer >= first for layer in range(layers))
    if family.dense == "outside of a range":
        first = fields.non_negative_integer("moe_layer_start_index", family.first_dense)
        last = fields.get("moe_layer_end_index")
        step = fields.integer("moe_layer_interval", 1)
        if last is not None and (type(last) is not int or last < -1):
            fields.refuse("moe_layer_end_index", "must be the number of a layer, or -1")
        end = layers - 1 if last in (None, -1) else last
        return tuple(first <= n <= end and (n + 1) % step == 0 for n in range(layers))
    if family.dense == "interleaved":
        step = fields.integer("interleave_moe_layer_step", 1)
        chosen = fields.get("moe_layers")
        if chosen is None:
            return tuple((layer + 1) % step == 0 for layer in range(layers))
        if not isinstance(chosen, list) or not all(type(layer) is int for layer in chosen):
            fields.refuse("moe_layers", "must be a list of the numbers of layers")
        return tuple(layer in chosen for layer in range(layers))
    if family.dense == "by step":
        step = fields.integer("decoder_sparse_step", 1)
        dense = fields.get("mlp_only_layers") or []
        if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
            fields.refuse("mlp_only_layers", "must be a list of the numbers of layers")
        return tuple((n + 1) % step == 0 and n not in dense for n in range(layers))
    return (True,) * layers


def _groups(fields: Fields, family: MoEFamily, experts: int) -> tuple[int, int]:
    """The number of groups of experts, and the number of groups that a token can choose from."""
    if family.choice == "topk_method":
        fields.only("topk_method", "greedy", "group_limited_greedy")
        fields.asked |= {"n_group", "topk_group"}
        if fields.text("topk_method", "greedy") == "greedy":
            return 1, 1
        groups, kept = fields.integer("n_group"), fields.integer("topk_group")
    elif family.choice == "noaux_tc":
        fields.only("topk_method", "noaux_tc")
        default_groups, default_kept = family.groups
        groups = fields.integer("n_group", default_groups)
        kept = fields.integer("topk_group", default_kept)
    else:
        return 1, 1
    if experts % groups:
        fields.refuse("n_group", f"must divide the {experts} experts")
    if kept > groups:
        fields.refuse("topk_group", f"must be at most n_group = {groups}")
    if family.choice == "noaux_tc" and experts // groups < 2:
        fields.refuse("n_group", f"must leave two of the {experts} experts to a group")
    return groups, kept


def _shared_width(fields: Fields, family: MoEFamily, ffn: int) -> int:
    """The width of the shared expert, 0 if there is none."""
    if family.shared is None:
        return 0
    if not family.shared_count:
        if family.shared_default is not None:
            return fields.non_negative_integer(family.shared, family.shared_default)
        return fields.integer(family.shared)
    return ffn * (fields.optional_integer(family.shared, absent=family.shared_count) or 0)
