"""What a model has that the llama decoder has not, in words."""

from __future__ import annotations

from collections.abc import Iterator

from mpishard.config.model_config import LayerNormNames, ModelConfig, MoEConfig, Rope


def active_options(config: ModelConfig) -> list[str]:
    """The options of the mathematics that are in use, beside those that sizes tell."""
    found = [*_norms(config), *_attention(config), *_ropes(config), *_scales(config)]
    return [*found, *(_experts(config.moe) if config.moe else [])]


def _norms(config: ModelConfig) -> Iterator[str]:
    names = config.norms
    if config.layer_norm:
        parts = [
            name
            for name, has in (("weight", config.norm_weight), ("bias", config.norm_bias))
            if has
        ]
        yield f"LayerNorm with {' and '.join(parts) or 'neither weight nor bias'}"
    if config.embedding_norm:
        yield "a norm of the embedding"
    if config.parallel_residual:
        yield f"parallel residual with {'one norm' if names.ffn is None else 'two norms'}"
    elif names != LayerNormNames():
        before, after = names.attention is not None, names.attention_post is not None
        where = {(True, True): "before and after", (False, True): "after", (True, False): "before"}
        yield f"norms {where.get((before, after), 'neither before nor after')} sub-layers"
    if config.norm_offset:
        yield f"norms times {config.norm_offset:g} + weight"


def _attention(config: ModelConfig) -> Iterator[str]:
    biases = [
        name
        for name, has in (
            ("q, k, v", config.qkv_bias),
            ("o", config.o_bias),
            ("feed-forward", config.mlp_bias),
        )
        if has
    ]
    if config.head_bias:
        biases.append("head")
    if not config.gated_mlp:
        yield "no gate in the feed-forward network"
    if biases:
        yield f"biases of {' and '.join(biases)}"
    if config.qk_norm:
        yield f"norms of q and k by head{' after rope' if config.qk_norm_after_rope else ''}"
    if config.per_head_norm:
        yield "norms of q and k with weights for each head"
    if config.clip_qkv is not None:
        yield f"queries, keys and values cut off at {config.clip_qkv:g}"
    if config.full_width_qk_norm:
        yield "norms of q and k over all heads"
    if config.qk_l2_norm:
        yield "norms of q and k without a weight, after rope"
    chunked = [chunk for chunk in config.chunks if chunk is not None]
    if chunked:
        yield f"chunks of {chunked[0]} positions in {len(chunked)} of {config.layers} layers"
    if config.linear_attention:
        linear = config.linear_attention
        yield (
            f"gated delta nets in {sum(linear.layers)} of {config.layers} layers: "
            f"{linear.heads} value heads of {linear.value_width}, {linear.kv_heads} key heads of "
            f"{linear.key_width}, convolution of {linear.taps}"
        )
    if config.output_gate:
        yield "gated attention"
    if config.sinks:
        yield "attention sinks"
    if config.attn_logit_softcapping is not None:
        yield f"scores capped at {config.attn_logit_softcapping:g}"
    if config.attention_scale is not None:
        yield f"scores times {config.attention_scale:g}"
    if config.inverse_layer_scale:
        yield "scores divided by the number of the layer"


def _ropes(config: ModelConfig) -> Iterator[str]:
    if config.partial_rotary_dim is not None:
        yield f"rope on {config.partial_rotary_dim} of a head's {config.head_dim} elements"
    if config.rope_interleaved or (config.mla and config.mla.interleaved):
        yield "rope on pairs of neighbours"
    if config.learned_positions:
        offset = f", position 0 in row {config.position_offset}" if config.position_offset else ""
        yield f"learned positions{offset}"
    if config.relative_bias:
        bias = config.relative_bias
        yield f"biases of {bias.buckets} buckets of distances up to {bias.max_distance}"
    if config.alibi:
        yield f"ALiBi{' in bfloat16' if config.alibi == 'in bfloat16' else ''}"
    unrotated = sum(rope.kind == "none" for rope in config.ropes)
    if 0 < unrotated < config.layers:
        yield f"no rope in {unrotated} of {config.layers} layers"
    for rope in dict.fromkeys(config.ropes):
        if rope.kind != "none" and rope != config.rope:
            yield f"{_rope(rope)} in {config.ropes.count(rope)} of {config.layers} layers"
        if rope.query_scale_beta:
            yield f"queries grow with their position, beta {rope.query_scale_beta:g}"


def _rope(rope: Rope) -> str:
    factor = "" if rope.kind == "default" else f", factor {rope.factor:g}"
    return f"rope {rope.kind} of theta {rope.theta:g}{factor}"


def _scales(config: ModelConfig) -> Iterator[str]:
    for what, scale in (
        ("embeddings", config.embedding_scale),
        ("outputs of sub-layers", config.residual_scale),
        ("logits", config.logits_scale),
    ):
        if scale != 1:
            yield f"{what} times {scale:g}"
    if config.final_logit_softcapping is not None:
        yield f"logits capped at {config.final_logit_softcapping:g}"


def _experts(moe: MoEConfig) -> Iterator[str]:
    normalized = ", normalized" if moe.norm_topk_prob else ""
    scaled = f", times {moe.routed_scaling_factor:g}" if moe.routed_scaling_factor != 1 else ""
    yield f"experts weighted by {moe.scoring}{normalized}{scaled}"
    if moe.capacity is not None:
        yield f"at most {moe.capacity} tokens of a sequence for an expert"
    if moe.router_bias and not moe.expert_bias:
        yield "a bias of the router"
    if moe.scale_inputs:
        yield "weights multiply the inputs of experts"
    if moe.e_score_correction_bias:
        yield "experts chosen by scores and a bias"
    if moe.n_group > 1:
        yield f"experts of {moe.topk_group} of {moe.n_group} groups for a token"
    if moe.shared_gate:
        yield "a gate of the shared expert"
