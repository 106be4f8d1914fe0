"""The decoder, written once and oblivious of the layout.

The residual stream enters and leaves each sub-layer; how it and the weights are sharded and what is
communicated stands in `mpishard.parallel`, in the form that the layout chose. A layer is
``x + post_norm(sub_layer(norm(x)))`` twice or, with a parallel residual, ``x + attention(norm(x)) +
feed_forward(norm(x))``.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from mpishard.arithmetic.linear import Linear
from mpishard.arithmetic.ops import softcap
from mpishard.communication.collectives import MAX, all_reduce
from mpishard.communication.mesh import Mesh
from mpishard.config.layout import Layout, block, kv_heads_of, kv_replica_ranks, query_heads_of
from mpishard.config.model_config import ModelConfig
from mpishard.layers import (
    Layer,
    make_embedding,
    make_layer,
    model_norm,
    weights_by_field,
    weights_of_encoder,
)
from mpishard.parallel import context, expert, sequence, tensor
from mpishard.parallel.attention import select_attention
from mpishard.parallel.cross_attention import CrossAttention, remember, select_cross_attention
from mpishard.parallel.expert import MoELayer
from mpishard.parallel.linear_attention import GatedDeltaNet, select_linear_attention
from mpishard.parallel.qkv import Rope
from mpishard.parallel.tensor import ParallelLayer
from mpishard.rope import RotaryEmbedding
from mpishard.sequences.kv_cache import KVCache
from mpishard.sequences.recurrent_state import NO_STATES, StateShape
from mpishard.sequences.sharding import FirstChunk, SequenceSharding
from mpishard.sequences.step import Step, pack

# Called with (layer, x_nD) for this rank's tokens of the residual stream entering each layer, and
# with the number of layers for the stream after the final norm.
HiddenStateHook = Callable[[int, np.ndarray], None]


class ResidualStream(NamedTuple):
    """What is done with a residual stream, in one of two forms: every tp rank has all tokens of its
    cp rank, or a block of them."""

    embed: Callable[..., np.ndarray]
    attention: Callable[..., np.ndarray]
    cross_attention: Callable[..., np.ndarray]
    linear_attention: Callable[..., np.ndarray]
    feed_forward: Callable[..., np.ndarray]
    parallel_layer: Callable[..., np.ndarray]
    moe: Callable[..., np.ndarray]
    select_logits_rows: Callable[..., np.ndarray]
    all_tokens: Callable[..., np.ndarray]


RESIDUAL_STREAMS = {
    "whole": ResidualStream(
        tensor.embed,
        tensor.attention,
        tensor.cross_attention,
        tensor.linear_attention,
        tensor.feed_forward,
        tensor.parallel_layer,
        expert.feed_forward,
        tensor.select_logits_rows,
        tensor.all_tokens,
    ),
    "sequence-parallel": ResidualStream(
        sequence.embed,
        sequence.attention,
        sequence.cross_attention,
        sequence.linear_attention,
        sequence.feed_forward,
        sequence.parallel_layer,
        expert.sequence_feed_forward,
        sequence.select_logits_rows,
        sequence.all_tokens,
    ),
}


class Decoder:
    """A model's layers on this rank of a mesh.

    `weights` are this rank's shards by Hugging Face name, all of one floating-point type, in which
    everything is computed. A pipeline stage is a decoder with some of the `layers`: its `entry`
    makes the residual stream of a step, and its `exit` takes the stream after the last of them. An
    encoder is a decoder, too, whose exit keeps what the layers of the other make of its outputs.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, np.ndarray],
        mesh: Mesh,
        layers: range | None = None,
        entry: Entry | None = None,
        exit: Exit | None = None,
    ) -> None:
        self.config, self.mesh = config, mesh
        self.layer_numbers = range(config.layers) if layers is None else layers
        self.entry, self.exit = entry or embed_tokens, exit or final_logits
        own, fields = weights_by_field(config, weights)
        self.dtype = next(iter(weights.values())).dtype
        self.embedding = make_embedding(config, own, mesh)
        self.embedding_norm = model_norm(config, own, "embedding_norm")
        self.norm = model_norm(config, own, "norm")
        head_vD = own.get("head", own.get("embedding"))  # tied: the embedding is the head
        self.head = None if head_vD is None else Linear(head_vD, own.get("head_bias"))
        self.vocab_start = block(config.vocab, mesh.tp.size, mesh.tp.rank).start
        self.layers = [make_layer(config, n, fields[n], mesh) for n in self.layer_numbers]
        sharded = mesh.layout.sequence_parallel
        self.stream = RESIDUAL_STREAMS["sequence-parallel" if sharded else "whole"]
        self.attend = select_attention(mesh.layout, keeps=config.causal)
        self.attend_memory = select_cross_attention(mesh.layout)
        self.recur = select_linear_attention(mesh.layout)
        self.rope = RotaryEmbedding(config, self.layer_numbers, self.dtype)
        linear = [config.is_linear(number) for number in self.layer_numbers]
        # Where a layer's keys and values, or its states, are among those of its kind.
        self.cache_places = [linear[:place].count(one) for place, one in enumerate(linear)]
        self._attention_layers = linear.count(False)
        self._state_shapes = [
            state_shape_of(config, linear.count(True), mesh.layout.tp, rank)
            for rank in range(mesh.tp.size)
        ]
        # Of this rank and of those beside it, by which all know the fullest cache.
        self._sequence_shardings = [
            sequence_sharding_of(config, mesh.layout, mesh.cp.rank, rank)
            for rank in range(mesh.tp.size)
        ]
        self._kv_heads = [_kv_heads(config, mesh.layout, rank) for rank in range(mesh.tp.size)]
        self.sequence_sharding = self._sequence_shardings[mesh.tp.rank]
        self.kv_heads = self._kv_heads[mesh.tp.rank]
        self.encoder: Decoder | None = None
        if config.encoder is not None:
            theirs = weights_of_encoder(config.encoder, weights)
            own_layers = [layer for layer in self.layers if isinstance(layer, Layer)]
            cross = [layer.cross_attention for layer in own_layers if layer.cross_attention]
            self.encoder = Decoder(config.encoder, theirs, mesh, exit=Remember(cross))

    def forward(self, step: Step, hidden_state_hook: HiddenStateHook | None = None) -> Any:
        """The logits of this rank's block of the vocabulary after each of its tokens that `step`
        wants, (M, v), or what `exit` makes of the residual stream."""
        if self.encoder is not None:
            self._encode(step)
        stream, mesh, ropes = self.stream, self.mesh, self.rope(step)
        x_nD = self.entry(self, step)
        for index, layer in enumerate(self.layers):
            if hidden_state_hook:
                hidden_state_hook(self.layer_numbers[index], x_nD)
            if isinstance(layer, ParallelLayer):
                own = index, step, ropes[index], self.attend, mesh
                x_nD = x_nD + stream.parallel_layer(layer.norm(x_nD), layer, *own)
                continue
            h_nD = layer.attention_norm(x_nD)
            # No name keeps what a sub-layer made alive in the next.
            x_nD = x_nD + layer.attention_post_norm(
                self._attention(h_nD, index, step, ropes[index])
            )
            if layer.cross_attention is not None:
                h_nD = layer.cross_norm(x_nD)
                x_nD = x_nD + stream.cross_attention(
                    h_nD, layer.cross_attention, index, step, self.attend_memory, mesh
                )
            h_nD = layer.ffn_norm(x_nD)
            feed_forward = stream.moe if isinstance(layer.ffn, MoELayer) else stream.feed_forward
            x_nD = x_nD + layer.ffn_post_norm(feed_forward(h_nD, layer.ffn, step, mesh))
        if hidden_state_hook:
            hidden_state_hook(self.layer_numbers.stop, self.norm(x_nD))
        return self.exit(self, x_nD, step)

    def _encode(self, step: Step) -> None:
        """Let the encoder read the inputs of the sequences that begin. Replicas that share experts
        all do so if one has to."""
        assert self.encoder is not None
        layout, waiting = self.mesh.layout, step.encoding is not None
        if layout.replicas_per_ep_group > 1:
            waiting = bool(all_reduce(np.array(waiting, np.int64), self.mesh.moe, MAX))
        if waiting:
            self.encoder.forward(step.encoding or pack([], self.sequence_sharding))

    def _attention(self, h_nD: np.ndarray, index: int, step: Step, rope: Rope) -> np.ndarray:
        w, cached, mesh = self.layers[index].attention, self.cache_places[index], self.mesh
        if isinstance(w, GatedDeltaNet):
            return self.stream.linear_attention(h_nD, w, cached, step, self.recur, mesh)
        return self.stream.attention(h_nD, w, cached, step, rope, self.attend, mesh)

    def gather_sequence(self, x_nD: np.ndarray, step: Step) -> np.ndarray:
        """The residual stream of all the step's tokens, in the order of the sequences, from each
        rank's: (W, D)."""
        x_ND = self.stream.all_tokens(x_nD, step, self.mesh)
        return context.gather_sequence(x_ND, step.global_index, self.mesh)

    def map_moe_layers(self, change: Callable[[int, MoELayer], MoELayer]) -> Decoder:
        """This model, with what `change` makes of each MoE layer and its number in its place."""
        changed = copy(self)
        changed.layers = [
            replace(layer, ffn=change(number, layer.ffn))
            if isinstance(layer.ffn, MoELayer)
            else layer
            for number, layer in zip(self.layer_numbers, self.layers, strict=True)
        ]
        return changed

    def uses_dynamic_rope(self, length: int) -> bool:
        """Whether a sequence of `length` positions has other rotary frequencies than a shorter
        one, so that what its cache holds does not fit any more."""
        return any(self.rope_lengths(length))

    def rope_lengths(self, length: int) -> tuple[int, ...]:
        """What the rotary frequencies of a sequence of `length` positions depend on."""
        return self.rope.frequency_lengths(length)

    def allocate_cache(
        self,
        capacity: int,
        first: int | None = None,
        inherited: int | None = None,
        encoder_length: int = 0,
    ) -> KVCache:
        """An empty cache for one sequence of up to `capacity` positions, with a memory of an input
        of `encoder_length` tokens for a decoder beside an encoder.

        Its first chunk has `first` tokens, all unless given. A sequence that reuses the first
        `inherited` positions of another one has that one's first chunk: see `FirstChunk`.
        """
        config = self.config
        first = capacity if first is None else first
        first_chunk = FirstChunk(first, first if inherited is None else inherited)
        slots = self.sequence_sharding.local_slots(first_chunk, capacity)
        if self.uses_dynamic_rope(capacity):  # it is computed anew in chunks of any length
            slots = max(slots, self.sequence_sharding.max_local_slots(capacity))
        latent = config.mla.kv_lora_rank if config.mla else 0
        sizes = self._attention_layers, self.kv_heads, capacity, config.key_width
        states = self._state_shapes[self.mesh.tp.rank]
        memory = self._allocate_memory(encoder_length) if config.encoder else None
        limited = limited_experts(config)
        return KVCache(*sizes, self.dtype, slots, latent, states, memory, limited)

    def _allocate_memory(self, length: int) -> KVCache:
        """An empty memory of an input of `length` tokens."""
        config = self.config
        assert config.encoder is not None
        slots = self.sequence_sharding.local_slots(FirstChunk(length, length), length)
        sizes = config.layers, self.kv_heads, length, config.key_width
        limited = limited_experts(config.encoder)
        return KVCache(*sizes, self.dtype, slots, limited_experts=limited)

    def cache_bytes(
        self, capacity: int, first_chunk: FirstChunk | None = None, encoder_length: int = 0
    ) -> int:
        """Upper bound on the bytes that the cache of a sequence of up to `capacity` positions takes
        on any rank of the replica, with the memory of an input of `encoder_length` tokens.
        Without `first_chunk`, any first chunk and no reused prefix are assumed."""
        config, most = self.config, None
        if first_chunk is not None:
            most = self.sequence_sharding.max_rank_positions(first_chunk, capacity)
        position = self._attention_layers * config.kv_cache_dim * self.dtype.itemsize
        ranks = zip(self._sequence_shardings, self._kv_heads, self._state_shapes, strict=True)
        return max(
            (sharding.max_local_slots(capacity, most) + sharding.max_local_slots(encoder_length))
            * kv_heads
            * position
            + states.numbers * self.dtype.itemsize
            for sharding, kv_heads, states in ranks
        )


def embed_tokens(model: Decoder, step: Step) -> np.ndarray:
    """The residual stream as it enters the first layer: (n, D)."""
    x_nD = model.stream.embed(model.embedding, step, model.mesh)
    if model.config.embedding_scale != 1:
        x_nD *= x_nD.dtype.type(model.config.embedding_scale)
    return model.embedding_norm(x_nD)


def final_logits(model: Decoder, x_nD: np.ndarray, step: Step) -> np.ndarray:
    """The logits of this rank's block of the vocabulary, from the residual stream after the last
    layer: (M, v)."""
    assert model.head is not None, "a stage without the head has an exit of its own"
    x_MD = model.norm(model.stream.select_logits_rows(x_nD, step, model.mesh))
    logits_Mv = tensor.logits(x_MD, model.head)
    if model.config.logits_scale != 1:
        logits_Mv *= logits_Mv.dtype.type(model.config.logits_scale)
    if model.config.final_logit_softcapping is not None:
        softcap(logits_Mv, model.config.final_logit_softcapping)
    return logits_Mv


class Remember:
    """The exit of an encoder: the keys and values of the decoder's layers go to the memories of the
    step's sequences."""

    def __init__(self, layers: list[CrossAttention]) -> None:
        self.layers = layers

    def __call__(self, model: Decoder, x_nD: np.ndarray, step: Step) -> None:
        x_ND = model.stream.all_tokens(model.norm(x_nD), step, model.mesh)
        remember(x_ND, self.layers, step)


# What makes a step's residual stream, x_nD, and what is made of it after the last layer.
Entry = Callable[[Decoder, Step], np.ndarray]
Exit = Callable[[Decoder, np.ndarray, Step], Any]


def sequence_sharding_of(
    config: ModelConfig, layout: Layout, cp_rank: int, tp_rank: int
) -> SequenceSharding:
    """How sequences and caches are sharded over the ranks of a replica, as one of them sees it."""
    ranks = range(tp_rank, tp_rank + 1)
    if layout.flash_decoding:
        _, ranks = kv_replica_ranks(config, layout.tp, tp_rank)
    held = [query_heads_of(config, layout.tp, rank) for rank in ranks]
    return SequenceSharding(
        cp=layout.cp,
        cp_rank=cp_rank,
        order=layout.cp_order,
        heads=tuple(heads.stop - heads.start for heads in held),
        kv_replica_rank=tp_rank - ranks.start,
        interleave_size=layout.cp_kv_cache_interleave_size,
    )


def state_shape_of(config: ModelConfig, layers: int, tp: int, tp_rank: int) -> StateShape:
    """The sizes of the states that a sequence has on a rank in so many `layers` of linear
    attention."""
    linear = config.linear_attention
    if linear is None:
        return NO_STATES
    h = len(range(linear.heads)[query_heads_of(linear, tp, tp_rank)])
    g = len(range(linear.kv_heads)[kv_heads_of(linear, tp, tp_rank)])
    K, Y = linear.key_width, linear.value_width
    return StateShape(layers, h, K, Y, 2 * g * K + h * Y, linear.taps)


def limited_experts(config: ModelConfig) -> tuple[int, int]:
    """In how many layers experts take so many tokens of a sequence only, and how many experts such
    a layer has."""
    if config.moe is None or config.moe.capacity is None:
        return 0, 0
    return sum(config.moe.layers), config.moe.num_experts


def _kv_heads(config: ModelConfig, layout: Layout, tp_rank: int) -> int:
    """The number of key/value heads that a rank holds."""
    held = kv_heads_of(config, layout.tp, tp_rank)
    return held.stop - held.start
