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
from mpishard.arithmetic.ops import Gate, clamped, gated, rms_norm
from mpishard.arithmetic.packed import Began, Division, KVCache, Step
from mpishard.arithmetic.routing import Capacity, Router
from mpishard.communication.mesh import Mesh
from mpishard.description.config import Mla, ModelConfig, Moe
from mpishard.description.layout import (
    Layout,
    block,
    kv_heads_of,
    query_heads_of,
    sharers_of,
)
from mpishard.description.partition import experts_of_groups, weight_table
from mpishard.parallel import context, expert, sequence, tensor
from mpishard.parallel.attention import attention_of
from mpishard.parallel.heads import Attend, Attention, LatentAttention, WholeNorm

# Called with (layer, x_nD) for this rank's tokens of the residual stream entering each layer, and
# with the number of layers for the stream after the final norm.
Observer = Callable[[int, np.ndarray], None]


@dataclass(frozen=True)
class Layer:
    """One decoder layer on this rank."""

    attention_norm: np.ndarray  # (D,)
    attention: Attention | LatentAttention
    ffn_norm: np.ndarray  # (D,)
    ffn: tensor.FeedForward | expert.Mixture


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
        attend = attention_of(mesh.layout)
        whole_norm = _whole_norm(config, mesh) if config.qk_norm_whole else None
        self.layers = [
            _layer(config, number, w, attend, mesh, whole_norm) for number, w in enumerate(layers)
        ]
        # Of this rank and of those beside it, by which all know the fullest cache.
        self._divisions = [
            division_of(config, mesh.layout, mesh.cp.rank, rank) for rank in range(mesh.tp.size)
        ]
        self._kv_heads = [_kv_heads(config, mesh.layout, rank) for rank in range(mesh.tp.size)]
        self.division = self._divisions[mesh.tp.rank]
        self.dtype = self.embedding_vD.dtype
        self.kv_heads = self._kv_heads[mesh.tp.rank]
        self.first_id = block(config.vocab, mesh.tp.size, mesh.tp.rank).start
        self._angles_J, self._amplitude = frequencies(config)

    def with_mixtures(self, change: Callable[[int, expert.Mixture], expert.Mixture]) -> Decoder:
        """This model, with what `change` makes of each layer's number and mixture in its place."""
        changed = copy(self)
        changed.layers = [
            replace(layer, ffn=change(number, layer.ffn))
            if isinstance(layer.ffn, expert.Mixture)
            else layer
            for number, layer in enumerate(self.layers)
        ]
        return changed

    def new_cache(
        self, capacity: int, first: int | None = None, kept: int | None = None
    ) -> KVCache:
        """An empty cache for one sequence of up to `capacity` positions, of which `first` (all
        unless given) are fed in its first step; or, with `kept`, for one that `began` so by taking
        over what another's cache holds: see `Began`."""
        config = self.config
        first = capacity if first is None else first
        began = Began(first, first if kept is None else kept)
        room = self.division.room(began, capacity)
        if self.depends_on_length(capacity):  # any number of positions may be fed in a first step
            room = max(room, self.division.most_room(capacity))
        heads, width = self.kv_heads, config.key_width
        latent = config.mla.kv_rank if config.mla else 0
        return KVCache(config.layers, heads, capacity, width, self.dtype, room, latent)

    def cache_bytes(self, capacity: int, began: Began | None = None) -> int:
        """At least as many bytes as the cache of a sequence of up to `capacity` positions takes on
        any rank of the replica: of one that `began` so, or, unless that is given, of one that takes
        over nothing, however it is fed."""
        config = self.config
        fullest = None if began is None else self.division.fullest(began, capacity)
        number = config.layers * config.kept_width * self.dtype.itemsize
        return max(
            division.most_room(capacity, fullest) * kv_heads * number
            for division, kv_heads in zip(self._divisions, self._kv_heads, strict=True)
        )

    def forward(self, step: Step, observe: Observer | None = None) -> np.ndarray:
        """The logits of this rank's block of the vocabulary after each of its tokens that `step`
        wants: (M, v)."""
        eps, stream, mesh = self.config.norm_eps, self.stream, self.mesh
        turn = self.turn(step)
        x_nD = stream.embed(step.ids_N, self.embedding_vD, self.first_id, mesh)
        for number, layer in enumerate(self.layers):
            if observe:
                observe(number, x_nD)
            h_nD = rms_norm(x_nD, layer.attention_norm, eps)
            x_nD = x_nD + stream.attention(h_nD, layer.attention, number, step, turn, mesh)
            h_nD = rms_norm(x_nD, layer.ffn_norm, eps)
            if isinstance(layer.ffn, expert.Mixture):
                x_nD = x_nD + expert.feed_forward(h_nD, layer.ffn, stream, step, mesh)
            else:
                x_nD = x_nD + stream.feed_forward(h_nD, layer.ffn, step, mesh)
        if observe:
            observe(len(self.layers), rms_norm(x_nD, self.norm, eps))
        x_MD = rms_norm(stream.pick(x_nD, step, mesh), self.norm, eps)
        return tensor.logits(x_MD, self.head_vD)

    def whole(self, x_nD: np.ndarray, step: Step) -> np.ndarray:
        """The residual stream of all the step's tokens, in the order of the sequences, from each
        rank's: (W, D)."""
        return context.whole(self.stream.whole(x_nD, step, self.mesh), step.places, self.mesh)

    def depends_on_length(self, length: int) -> bool:
        """Whether a sequence of `length` positions has other rotary frequencies than a shorter
        one, so that what the cache holds of its past does not fit any more."""
        rope = self.config.rope
        return rope.kind == "dynamic" and length > rope.original_positions

    def turn(self, step: Step) -> tuple[np.ndarray, np.ndarray]:
        """Rotary cosines, (N, 1, 1, J), and sines, (N, 1, 2, J), of the step's tokens, as
        `mpishard.arithmetic.rotary.rotate` takes them."""
        angles_NJ = step.positions_N[:, np.newaxis] * self._angles_J
        for segment in step.segments:
            if self.depends_on_length(segment.known):
                angles_J = _dynamic_frequencies(self.config, segment.known)
                angles_NJ[segment.new] = step.positions_N[segment.new, np.newaxis] * angles_J
        angles_N11J = angles_NJ[:, np.newaxis, np.newaxis]
        sin_N11J = np.sin(angles_N11J) * self._amplitude
        return (
            (np.cos(angles_N11J) * self._amplitude).astype(self.dtype),
            np.concatenate([-sin_N11J, sin_N11J], axis=2, dtype=self.dtype, casting="same_kind"),
        )


def division_of(config: ModelConfig, layout: Layout, cp_rank: int, tp_rank: int) -> Division:
    """How sequences and caches are divided over the ranks of a replica, as one of them sees it."""
    shared = layout.flash_decoding
    ranks = sharers_of(config, layout.tp, tp_rank)[1] if shared else range(tp_rank, tp_rank + 1)
    held = [query_heads_of(config, layout.tp, sharer) for sharer in ranks]
    return Division(
        cp=layout.cp,
        cp_rank=cp_rank,
        order=layout.order,
        heads=tuple(heads.stop - heads.start for heads in held),
        sharer=tp_rank - ranks.start,
        interleave=layout.interleave,
    )


def _kv_heads(config: ModelConfig, layout: Layout, tp_rank: int) -> int:
    """The number of key/value heads that a rank holds."""
    held = kv_heads_of(config, layout.tp, tp_rank)
    return held.stop - held.start


def frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """A model's rotary angles per position, (J,), and the factor on cosines and sines."""
    rope = config.rope
    angles_J = rotary.frequencies(config.turned_width, rope.theta)
    if rope.kind == "linear":
        return angles_J / rope.factor, 1.0
    if rope.kind == "llama3":
        low, high = rope.low_freq_factor, rope.high_freq_factor
        trained = rope.original_positions
        return rotary.llama3_frequencies(angles_J, rope.factor, low, high, trained), 1.0
    if rope.kind == "yarn":
        amplitude = rope.attention_factor
        if amplitude is None:
            amplitude = rotary.yarn_attention_factor(rope.factor, rope.mscale, rope.mscale_all_dim)
        fast, slow, trained = rope.beta_fast, rope.beta_slow, rope.original_positions
        return (
            rotary.yarn_frequencies(
                angles_J, rope.theta, rope.factor, fast, slow, trained, rope.truncate
            ),
            amplitude,
        )
    return angles_J, 1.0


def _dynamic_frequencies(config: ModelConfig, length: int) -> np.ndarray:
    rope, width = config.rope, config.turned_width
    theta = rotary.dynamic_theta(rope.theta, rope.factor, length, rope.original_positions, width)
    return rotary.frequencies(width, theta)


Fields = dict[str, np.ndarray]


def _by_field(
    config: ModelConfig, weights: dict[str, np.ndarray]
) -> tuple[Fields, list[dict[int | None, Fields]]]:
    """The weights by the partition table's field names: the model's own, and each layer's, those of
    each expert apart. Of the experts there are those that this rank has."""
    own: Fields = {}
    layers: list[dict[int | None, Fields]] = [{None: {}} for _ in range(config.layers)]
    for weight in weight_table(config):
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
    whole_norm: WholeNorm | None,
) -> Layer:
    w = fields[None]
    ffn: tensor.FeedForward | expert.Mixture
    if config.moe and config.moe.layers[number]:
        experts = {place: own for place, own in fields.items() if place is not None}
        ffn = _mixture(config, config.moe, number, w, experts, mesh)
    else:
        ffn = _feed_forward(w, gated(config.activation))
    return Layer(
        attention_norm=w["attention_norm"],
        attention=(
            _latent_attention(config, config.mla, number, w, attend)
            if config.mla
            else _attention(config, number, w, attend, whole_norm)
        ),
        ffn_norm=w["ffn_norm"],
        ffn=ffn,
    )


def _attention(
    config: ModelConfig, number: int, w: Fields, attend: Attend, whole_norm: WholeNorm | None
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
        whole_norm=whole_norm,
        sinks=w.get("sinks"),
        head_dim=config.head_dim,
        norm_eps=config.norm_eps,
        window=config.windows[number],
        attend=attend,
    )


def _latent_attention(
    config: ModelConfig, mla: Mla, number: int, w: Fields, attend: Attend
) -> LatentAttention:
    rope, scale = config.rope, config.head_dim**-0.5
    if rope.kind == "yarn":
        scale *= rotary.yarn_score_factor(rope.factor, rope.mscale_all_dim)
    return LatentAttention(
        q=w["q"] if mla.q_rank is None else w["q_b"],
        q_latent=w.get("q_a"),
        q_latent_bias=w.get("q_a_bias"),
        q_latent_norm=w.get("q_a_norm"),
        latent=w["kv_a"],
        latent_bias=w.get("kv_a_bias"),
        latent_norm=w["kv_a_norm"],
        up=w["kv_b"],
        o=w["o"],
        o_bias=w.get("o_bias"),
        key_width=mla.nope_dim,
        turned_width=mla.rope_dim,
        value_width=mla.value_dim,
        interleaved=mla.interleaved,
        scale=scale,
        norm_eps=mla.norm_eps,
        window=config.windows[number],
        attend=attend,
    )


def _whole_norm(config: ModelConfig, mesh: Mesh) -> WholeNorm:
    K, (_, ranks) = config.head_dim, sharers_of(config, mesh.tp.size, mesh.tp.rank)
    return WholeNorm(config.heads * K, config.kv_heads * K, len(ranks))


def _feed_forward(w: Fields, gate_of: Gate) -> tensor.FeedForward:
    return tensor.FeedForward(
        gate=w["gate"],
        up=w["up"],
        down=w["down"],
        gate_bias=w.get("gate_bias"),
        up_bias=w.get("up_bias"),
        down_bias=w.get("down_bias"),
        gate_of=gate_of,
    )


def _mixture(
    config: ModelConfig,
    moe: Moe,
    number: int,
    w: Fields,
    experts: dict[int, Fields],
    mesh: Mesh,
) -> expert.Mixture:
    dense = gated(config.activation)
    of_experts = dense
    if moe.alpha is not None and moe.limit is not None:
        of_experts = clamped(moe.alpha, moe.limit)
    layout, cut = mesh.layout, mesh.cut
    how = Router(
        moe.top_k,
        moe.scoring,
        moe.normalized,
        moe.scaling,
        moe.groups,
        moe.kept_groups,
        moe.group_score,
    )
    return expert.Mixture(
        router=w["router"],
        router_bias=w.get("router_bias"),
        selection_bias=w.get("selection_bias"),
        experts={number: _feed_forward(own, of_experts) for number, own in experts.items()},
        shared=_feed_forward(w, dense) if moe.shared_ffn else None,
        shared_gate=w.get("shared_gate"),
        how=how,
        slots=expert.Slots.of(experts_of_groups(moe.experts, cut, number)),
        capacity=Capacity(layout.capacity, layout.drop) if layout.capacity else None,
        dispatch=expert.DISPATCHES[layout.dispatch],
    )
