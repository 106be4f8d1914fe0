"""The decoder, written once and oblivious of the layout.

The residual stream enters and leaves each sub-layer; how the weights are divided and what is
communicated stands in `mpishard.parallel`. Model families differ only in which optional weights
they have, what their rotary embedding is and which layers have a sliding window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mpishard.arithmetic import rotary
from mpishard.arithmetic.ops import ACTIVATIONS, rms_norm
from mpishard.arithmetic.packed import KVCache, Step
from mpishard.communication.mesh import Mesh
from mpishard.description.config import ModelConfig
from mpishard.description.layout import block, kv_heads_of
from mpishard.description.partition import weight_table
from mpishard.parallel import tensor

# Called with (layer, x_ND) for the residual stream entering each layer, and with the number of
# layers for the stream after the final norm.
Observer = Callable[[int, np.ndarray], None]


@dataclass(frozen=True)
class Layer:
    """One decoder layer on this rank."""

    attention_norm: np.ndarray  # (D,)
    attention: tensor.Attention
    ffn_norm: np.ndarray  # (D,)
    ffn: tensor.FeedForward


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
        self.layers = [_layer(config, number, fields) for number, fields in enumerate(layers)]
        self.dtype = self.embedding_vD.dtype
        held = kv_heads_of(config, mesh.tp.size, mesh.tp.rank)
        self.kv_heads = held.stop - held.start
        self.first_id = block(config.vocab, mesh.tp.size, mesh.tp.rank).start
        self._angles_J, self._amplitude = frequencies(config)

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for one sequence of up to `capacity` positions."""
        config = self.config
        return KVCache(config.layers, self.kv_heads, capacity, config.head_dim, self.dtype)

    def forward(self, step: Step, observe: Observer | None = None) -> np.ndarray:
        """The logits of this rank's block of the vocabulary after each token that `step` wants:
        (M, v)."""
        eps = self.config.norm_eps
        turn = self.turn(step)
        x_ND = tensor.embed(step.ids_N, self.embedding_vD, self.first_id, self.mesh)
        for number, layer in enumerate(self.layers):
            if observe:
                observe(number, x_ND)
            h_ND = rms_norm(x_ND, layer.attention_norm, eps)
            x_ND = x_ND + tensor.attention(h_ND, layer.attention, number, step, turn, self.mesh)
            h_ND = rms_norm(x_ND, layer.ffn_norm, eps)
            x_ND = x_ND + tensor.feed_forward(h_ND, layer.ffn, self.mesh)
        if observe:
            observe(len(self.layers), rms_norm(x_ND, self.norm, eps))
        x_MD = rms_norm(x_ND[step.wanted_M], self.norm, eps)
        return tensor.logits(x_MD, self.head_vD)

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
            if self.depends_on_length(segment.cache.length):
                angles_J = _dynamic_frequencies(self.config, segment.cache.length)
                angles_NJ[segment.new] = step.positions_N[segment.new, np.newaxis] * angles_J
        angles_N11J = angles_NJ[:, np.newaxis, np.newaxis]
        sin_N11J = np.sin(angles_N11J) * self._amplitude
        return (
            (np.cos(angles_N11J) * self._amplitude).astype(self.dtype),
            np.concatenate([-sin_N11J, sin_N11J], axis=2, dtype=self.dtype, casting="same_kind"),
        )


def frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """A model's rotary angles per position, (K/2,), and the factor on cosines and sines."""
    rope = config.rope
    angles_J = rotary.frequencies(config.head_dim, rope.theta)
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
    rope, width = config.rope, config.head_dim
    theta = rotary.dynamic_theta(rope.theta, rope.factor, length, rope.original_positions, width)
    return rotary.frequencies(width, theta)


def _by_field(
    config: ModelConfig, weights: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """The weights by the partition table's field names: the model's own, and each layer's."""
    own: dict[str, np.ndarray] = {}
    layers: list[dict[str, np.ndarray]] = [{} for _ in range(config.layers)]
    for weight in weight_table(config):
        place = own if weight.layer is None else layers[weight.layer]
        place[weight.field] = weights[weight.name]
    return own, layers


def _layer(config: ModelConfig, number: int, w: dict[str, np.ndarray]) -> Layer:
    return Layer(
        attention_norm=w["attention_norm"],
        attention=tensor.Attention(
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
            head_dim=config.head_dim,
            norm_eps=config.norm_eps,
            window=config.windows[number],
        ),
        ffn_norm=w["ffn_norm"],
        ffn=tensor.FeedForward(
            gate=w["gate"],
            up=w["up"],
            down=w["down"],
            gate_bias=w.get("gate_bias"),
            up_bias=w.get("up_bias"),
            down_bias=w.get("down_bias"),
            activation=ACTIVATIONS[config.activation],
        ),
    )
