"""The decoder, written once and oblivious of the layout.

The residual stream enters and leaves each sub-layer; how it and the weights are divided and what is
communicated stands in `mpishard.parallel`, in the form that the layout chose. Model families differ
only in which optional weights they have, what their rotary embedding is and which layers have a
sliding window.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace

import numpy as np

from mpishard.arithmetic import rotary
from mpishard.arithmetic.ops import GLU, clamped_swiglu, glu, rms_norm
from mpishard.arithmetic.routing import ExpertCapacity, Router
from mpishard.communication.mesh import Mesh
from mpishard.config.layout import (
    Layout,
    block,
    kv_heads_of,
    kv_replica_ranks,
    query_heads_of,
)
from mpishard.config.model_config import MLAConfig, ModelConfig, MoEConfig
from mpishard.config.weight_specs import experts_by_ep_rank, weight_specs
from mpishard.parallel import context, expert, sequence, tensor
from mpishard.parallel.attention import select_attention
from mpishard.parallel.qkv import MLA, Attend, Attention, QKNormAllHeads
from mpishard.sequences.step import FirstChunk, KVCache, SequenceSharding, Step

# Called with (layer, x_nD) for this rank's tokens of the residual stream entering each layer, and
# with the number of layers for the stream after the final norm.
HiddenStateHook = Callable[[int, np.ndarray], None]


@dataclass(frozen=True)
class Layer:
    """One decoder layer on this rank."""

    attention_norm: np.ndarray  # (D,)
    attention: Attention | MLA
    ffn_norm: np.ndarray  # (D,)
    ffn: tensor.FeedForward | expert.MoELayer


class Decoder:
    """A model's layers on this rank of a mesh.

    `weights` are this rank's shards by Hugging Face name, all of one floating-point type, in which
    everything is computed.
    """

    def __init__(self, config: ModelConfig, weights: dict[str, np.ndarray], mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        own, layers = _by_field(config, weights)
        self.embedding_vD = own["embedding"]
        self.norm = own["norm"]
        self.head_vD = own.get("head", self.embedding_vD)  # tied: the embedding is the head
        self.stream = sequence if mesh.layout.sequence_parallel else tensor
        attend = select_attention(mesh.layout)
        qk_norm_all_heads = _qk_norm_all_heads(config, mesh) if config.full_width_qk_norm else None
        self.layers = [
            _layer(config, number, w, attend, mesh, qk_norm_all_heads)
            for number, w in enumerate(layers)
        ]
        # Of this rank and of those beside it, by which all know the fullest cache.
        self._sequence_shardings = [
            sequence_sharding_of(config, mesh.layout, mesh.cp.rank, rank)
            for rank in range(mesh.tp.size)
        ]
        self._kv_heads = [_kv_heads(config, mesh.layout, rank) for rank in range(mesh.tp.size)]
        self.sequence_sharding = self._sequence_shardings[mesh.tp.rank]
        self.dtype = self.embedding_vD.dtype
        self.kv_heads = self._kv_heads[mesh.tp.rank]
        self.vocab_start = block(config.vocab, mesh.tp.size, mesh.tp.rank).start
        self._inv_freq_J, self._attention_scaling = inverse_frequencies(config)

    def map_moe_layers(self, change: Callable[[int, expert.MoELayer], expert.MoELayer]) -> Decoder:
        """This model, with what `change` makes of each layer's number and mixture in its place."""
        changed = copy(self)
        changed.layers = [
            replace(layer, ffn=change(number, layer.ffn))
            if isinstance(layer.ffn, expert.MoELayer)
            else layer
            for number, layer in enumerate(self.layers)
        ]
        return changed

    def allocate_cache(
        self, capacity: int, first: int | None = None, kept: int | None = None
    ) -> KVCache:
        """An empty cache for one sequence of up to `capacity` positions, of which `first` (all
        unless given) are fed in its first step; or, with `kept`, for one that `first_chunk` so by
        taking over what another's cache holds: see `FirstChunk`."""
        config = self.config
        first = capacity if first is None else first
        first_chunk = FirstChunk(first, first if kept is None else kept)
        room = self.sequence_sharding.local_slots(first_chunk, capacity)
        if self.uses_dynamic_rope(capacity):  # any number of positions may be fed in a first step
            room = max(room, self.sequence_sharding.max_local_slots(capacity))
        heads, width = self.kv_heads, config.key_width
        latent = config.mla.kv_lora_rank if config.mla else 0
        return KVCache(config.layers, heads, capacity, width, self.dtype, room, latent)

    def cache_bytes(self, capacity: int, first_chunk: FirstChunk | None = None) -> int:
        """At least as many bytes as the cache of a sequence of up to `capacity` positions takes on
        any rank of the replica: of one that `first_chunk` so, or, unless that is given, of one that
        takes over nothing, however it is fed."""
        config = self.config
        max_rank_positions = (
            None
            if first_chunk is None
            else self.sequence_sharding.max_rank_positions(first_chunk, capacity)
        )
        number = config.layers * config.kv_cache_dim * self.dtype.itemsize
        return max(
            sequence_sharding.max_local_slots(capacity, max_rank_positions) * kv_heads * number
            for sequence_sharding, kv_heads in zip(
                self._sequence_shardings, self._kv_heads, strict=True
            )
        )

    def forward(self, step: Step, hidden_state_hook: HiddenStateHook | None = None) -> np.ndarray:
        """The logits of this rank's block of the vocabulary after each of its tokens that `step`
        wants: (M, v)."""
        eps, stream, mesh = self.config.norm_eps, self.stream, self.mesh
        rope = self.rope(step)
        x_nD = stream.embed(step.ids_N, self.embedding_vD, self.vocab_start, mesh)
        for number, layer in enumerate(self.layers):
            if hidden_state_hook:
                hidden_state_hook(number, x_nD)
            h_nD = rms_norm(x_nD, layer.attention_norm, eps)
            x_nD = x_nD + stream.attention(h_nD, layer.attention, number, step, rope, mesh)
            h_nD = rms_norm(x_nD, layer.ffn_norm, eps)
            if isinstance(layer.ffn, expert.MoELayer):
                x_nD = x_nD + expert.feed_forward(h_nD, layer.ffn, stream, step, mesh)
            else:
                x_nD = x_nD + stream.feed_forward(h_nD, layer.ffn, step, mesh)
        if hidden_state_hook:
            hidden_state_hook(len(self.layers), rms_norm(x_nD, self.norm, eps))
        x_MD = rms_norm(stream.select_logits_rows(x_nD, step, mesh), self.norm, eps)
        return tensor.logits(x_MD, self.head_vD)

    def gather_sequence(self, x_nD: np.ndarray, step: Step) -> np.ndarray:
        """The residual stream of all the step's tokens, in the order of the sequences, from each
        rank's: (W, D)."""
        return context.gather_sequence(
            self.stream.whole(x_nD, step, self.mesh), step.global_index, self.mesh
        )

    def uses_dynamic_rope(self, length: int) -> bool:
        """Whether a sequence of `length` positions has other rotary frequencies than a shorter
        one, so that what the cache holds of its past does not fit any more."""
        rope = self.config.rope
        return rope.kind == "dynamic" and length > rope.original_positions

    def rope(self, step: Step) -> tuple[np.ndarray, np.ndarray]:
        """Rotary cosines, (N, 1, 1, J), and sines, (N, 1, 2, J), of the step's tokens, as
        `mpishard.arithmetic.rotary.rotate` takes them."""
        angles_NJ = step.positions_N[:, np.newaxis] * self._inv_freq_J
        for segment in step.segments:
            if self.uses_dynamic_rope(segment.num_known):
                inv_freq_J = _dynamic_inverse_frequencies(self.config, segment.num_known)
                angles_NJ[segment.token_slice] = (
                    step.positions_N[segment.token_slice, np.newaxis] * inv_freq_J
                )
        angles_N11J = angles_NJ[:, np.newaxis, np.newaxis]
        sin_N11J = np.sin(angles_N11J) * self._attention_scaling
        return (
            (np.cos(angles_N11J) * self._attention_scaling).astype(self.dtype),
            np.concatenate([-sin_N11J, sin_N11J], axis=2, dtype=self.dtype, casting="same_kind"),
        )


def sequence_sharding_of(
    config: ModelConfig, layout: Layout, cp_rank: int, tp_rank: int
) -> SequenceSharding:
    """How sequences and caches are divided over the ranks of a replica, as one of them sees it."""
    shared = layout.flash_decoding
    ranks = (
        kv_replica_ranks(config, layout.tp, tp_rank)[1] if shared else range(tp_rank, tp_rank + 1)
    )
    held = [query_heads_of(config, layout.tp, kv_replica_rank) for kv_replica_rank in ranks]
    return SequenceSharding(
        cp=layout.cp,
        cp_rank=cp_rank,
        order=layout.cp_order,
        heads=tuple(heads.stop - heads.start for heads in held),
        kv_replica_rank=tp_rank - ranks.start,
        interleave_size=layout.cp_kv_cache_interleave_size,
    )


def _kv_heads(config: ModelConfig, layout: Layout, tp_rank: int) -> int:
    """The number of key/value heads that a rank holds."""
    held = kv_heads_of(config, layout.tp, tp_rank)
    return held.stop - held.start


def inverse_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """A model's rotary angles per position, (J,), and the factor on cosines and sines."""
    rope = config.rope
    inv_freq_J = rotary.inverse_frequencies(config.rotary_dim, rope.theta)
    if rope.kind == "linear":
        return inv_freq_J / rope.factor, 1.0
    if rope.kind == "llama3":
        low, high = rope.low_freq_factor, rope.high_freq_factor
        original_max_position = rope.original_positions
        return rotary.llama3_frequencies(
            inv_freq_J, rope.factor, low, high, original_max_position
        ), 1.0
    if rope.kind == "yarn":
        amplitude = rope.attention_factor
        if amplitude is None:
            amplitude = rotary.yarn_attention_factor(rope.factor, rope.mscale, rope.mscale_all_dim)
        fast, slow, original_max_position = rope.beta_fast, rope.beta_slow, rope.original_positions
        return (
            rotary.yarn_frequencies(
                inv_freq_J,
                rope.theta,
                rope.factor,
                fast,
                slow,
                original_max_position,
                rope.truncate,
            ),
            amplitude,
        )
    return inv_freq_J, 1.0


def _dynamic_inverse_frequencies(config: ModelConfig, length: int) -> np.ndarray:
    rope, width = config.rope, config.rotary_dim
    theta = rotary.dynamic_theta(rope.theta, rope.factor, length, rope.original_positions, width)
    return rotary.inverse_frequencies(width, theta)


Fields = dict[str, np.ndarray]


def _by_field(
    config: ModelConfig, weights: dict[str, np.ndarray]
) -> tuple[Fields, list[dict[int | None, Fields]]]:
    """The weights by the partition table's field names: the model's own, and each layer's, those of
    each expert apart. Of the experts there are those that this rank has."""
    own: Fields = {}
    layers: list[dict[int | None, Fields]] = [{None: {}} for _ in range(config.layers)]
    for weight in weight_specs(config):
        if weight.name in weights:
            place = own
            if weight.layer is not None:
                place = layers[weight.layer].setdefault(weight.expert, {})
            place[weight.field] = weights[weight.name]
    return own, layers


def _layer(
    config: ModelConfig,
    number: int,
    fields: dict[int | None, Fields],
    attend: Attend,
    mesh: Mesh,
    qk_norm_all_heads: QKNormAllHeads | None,
) -> Layer:
    w = fields[None]
    ffn: tensor.FeedForward | expert.MoELayer
    if config.moe and config.moe.layers[number]:
        experts = {place: own for place, own in fields.items() if place is not None}
        ffn = _moe_layer(config, config.moe, number, w, experts, mesh)
    else:
        ffn = _feed_forward(w, glu(config.activation))
    return Layer(
        attention_norm=w["attention_norm"],
        attention=(
            _latent_attention(config, config.mla, number, w, attend)
            if config.mla
            else _attention(config, number, w, attend, qk_norm_all_heads)
        ),
        ffn_norm=w["ffn_norm"],
        ffn=ffn,
    )


def _attention(
    config: ModelConfig,
    number: int,
    w: Fields,
    attend: Attend,
    qk_norm_all_heads: QKNormAllHeads | None,
) -> Attention:
    return Attention(
        q=w["q"],
        k=w["k"],
        v=w["v"],
        o=w["o"],
        q_bias=w.get("q_bias"),
        k_bias=w.get("k_bias"),
        v_bias=w.get("v_bias"),
        o_bias=w.get("o_bias"),
        q_norm=w.get("q_norm"),
        k_norm=w.get("k_norm"),
        qk_norm_all_heads=qk_norm_all_heads,
        sinks=w.get("sinks"),
        head_dim=config.head_dim,
        norm_eps=config.norm_eps,
        window=config.windows[number],
        attend=attend,
    )


def _latent_attention(
    config: ModelConfig, mla: MLAConfig, number: int, w: Fields, attend: Attend
) -> MLA:
    rope, scale = config.rope, config.head_dim**-0.5
    if rope.kind == "yarn":
        scale *= rotary.yarn_softmax_scale(rope.factor, rope.mscale_all_dim)
    return MLA(
        q=w["q"] if mla.q_lora_rank is None else w["q_b"],
        q_latent=w.get("q_a"),
        q_latent_bias=w.get("q_a_bias"),
        q_latent_norm=w.get("q_a_norm"),
        latent=w["kv_a"],
        latent_bias=w.get("kv_a_bias"),
        latent_norm=w["kv_a_norm"],
        up=w["kv_b"],
        o=w["o"],
        o_bias=w.get("o_bias"),
        key_width=mla.qk_nope_head_dim,
        rotary_dim=mla.qk_rope_head_dim,
        value_width=mla.v_head_dim,
        interleaved=mla.interleaved,
        scale=scale,
        norm_eps=mla.norm_eps,
        window=config.windows[number],
        attend=attend,
    )


def _qk_norm_all_heads(config: ModelConfig, mesh: Mesh) -> QKNormAllHeads:
    K, (_, ranks) = config.head_dim, kv_replica_ranks(config, mesh.tp.size, mesh.tp.rank)
    return QKNormAllHeads(config.heads * K, config.kv_heads * K, len(ranks))


def _feed_forward(w: Fields, act_and_mul: GLU) -> tensor.FeedForward:
    return tensor.FeedForward(
        gate=w["gate"],
        up=w["up"],
        down=w["down"],
        gate_bias=w.get("gate_bias"),
        up_bias=w.get("up_bias"),
        down_bias=w.get("down_bias"),
        act_and_mul=act_and_mul,
    )


def _moe_layer(
    config: ModelConfig,
    moe: MoEConfig,
    number: int,
    w: Fields,
    experts: dict[int, Fields],
    mesh: Mesh,
) -> expert.MoELayer:
    dense = glu(config.activation)
    tokens_per_expert = dense
    if moe.alpha is not None and moe.limit is not None:
        tokens_per_expert = clamped_swiglu(moe.alpha, moe.limit)
    layout, sharding = mesh.layout, mesh.weight_sharding
    router_fn = Router(
        moe.top_k,
        moe.scoring,
        moe.norm_topk_prob,
        moe.routed_scaling_factor,
        moe.n_group,
        moe.topk_group,
        moe.group_score,
    )
    return expert.MoELayer(
        router=w["router"],
        router_bias=w.get("router_bias"),
        e_score_correction_bias=w.get("selection_bias"),
        experts={number: _feed_forward(own, tokens_per_expert) for number, own in experts.items()},
        shared=_feed_forward(w, dense) if moe.shared_expert_intermediate_size else None,
        shared_gate=w.get("shared_gate"),
        router_fn=router_fn,
        physical_experts=expert.PhysicalExperts.of(
            experts_by_ep_rank(moe.num_experts, sharding, number)
        ),
        capacity=ExpertCapacity(layout.expert_capacity_factor, layout.token_drop_policy)
        if layout.expert_capacity_factor
        else None,
        dispatch=expert.TOKEN_DISPATCHERS[layout.moe_token_dispatcher],
    )
