"""The oracle: a whole decoder on one process, recomputed from scratch for every token.

No cache, no MPI, no packing, nothing shared with the arithmetic that the ranks run: everything
else is compared with this, and this is compared with the numbers of Hugging Face transformers.
It is written to be believed, so each head is attended to on its own and no step is fused.

S sequence positions, D model width, K head width, J = K / 2 pairs of a head, F feed-forward width,
V vocabulary. Weights are stored (outputs, inputs), as in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from mpishard.description.config import ModelConfig, Rope


class Reference:
    """A model made of `config` and `weights`, a mapping of Hugging Face tensor names to arrays of
    any floating type; `dtype`, float64 or float32, is what everything is computed in."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, np.ndarray],
        dtype: type[np.floating] = np.float64,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.weights = {name: np.asarray(weights[name]).astype(dtype) for name in weights}

    def forward(self, ids_S: Sequence[int]) -> tuple[np.ndarray, list[np.ndarray]]:
        """The logits (S, V) at every position, and the residual stream (S, D) as it enters each
        layer, followed by what the final norm makes of it."""
        embedding_VD = self.weights["model.embed_tokens.weight"]
        x_SD = embedding_VD[np.asarray(ids_S)]
        entering = []
        for layer in range(self.config.layers):
            entering.append(x_SD)
            name = f"model.layers.{layer}"
            normed_SD = self.norm(x_SD, f"{name}.input_layernorm")
            x_SD = x_SD + self.attention(normed_SD, f"{name}.self_attn", self.config.windows[layer])
            normed_SD = self.norm(x_SD, f"{name}.post_attention_layernorm")
            x_SD = x_SD + self.feed_forward(normed_SD, f"{name}.mlp")
        x_SD = self.norm(x_SD, "model.norm")
        head_VD = embedding_VD if self.config.tied else self.weights["lm_head.weight"]
        return x_SD @ head_VD.T, [*entering, x_SD]

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The `count` tokens that follow `ids` when the likeliest is taken each time, the lowest
        id among equals. End-of-sequence ids do not end it."""
        sequence = list(ids)
        for _ in range(count):
            logits_SV, _ = self.forward(sequence)
            sequence.append(int(np.argmax(logits_SV[-1])))  # argmax takes the first of equals
        return sequence[len(ids) :]

    def attention(self, x_SD: np.ndarray, name: str, window: int | None) -> np.ndarray:
        """Causal attention of the layer called `name`, over the last `window` positions or all."""
        c = self.config
        q_SHK = self.linear(x_SD, f"{name}.q_proj", c.qkv_bias).reshape(-1, c.heads, c.head_dim)
        k_SGK = self.linear(x_SD, f"{name}.k_proj", c.qkv_bias).reshape(-1, c.kv_heads, c.head_dim)
        v_SGK = self.linear(x_SD, f"{name}.v_proj", c.qkv_bias).reshape(-1, c.kv_heads, c.head_dim)
        if c.qk_norm:
            q_SHK = self.norm(q_SHK, f"{name}.q_norm")
            k_SGK = self.norm(k_SGK, f"{name}.k_norm")

        S = len(x_SD)
        cos_SJ, sin_SJ = rotation(c.rope, c.head_dim, S)
        hidden_SS = ~visible(S, window)
        out_SHK = np.empty_like(q_SHK)
        for h in range(c.heads):
            g = h // (c.heads // c.kv_heads)  # neighbouring query heads share a key/value head
            q_SK = rotate(q_SHK[:, h], cos_SJ, sin_SJ)
            k_SK = rotate(k_SGK[:, g], cos_SJ, sin_SJ)
            scores_SS = q_SK @ k_SK.T / math.sqrt(c.head_dim)
            scores_SS[hidden_SS] = -np.inf
            out_SHK[:, h] = softmax(scores_SS) @ v_SGK[:, g]
        return self.linear(out_SHK.reshape(S, -1), f"{name}.o_proj", c.o_bias)

    def feed_forward(self, x_SD: np.ndarray, name: str) -> np.ndarray:
        """The gated feed-forward network of the layer called `name`."""
        bias = self.config.mlp_bias
        gate_SF = ACTIVATIONS[self.config.activation](self.linear(x_SD, f"{name}.gate_proj", bias))
        up_SF = self.linear(x_SD, f"{name}.up_proj", bias)
        return self.linear(gate_SF * up_SF, f"{name}.down_proj", bias)

    def linear(self, x: np.ndarray, name: str, bias: bool) -> np.ndarray:
        """The projection called `name` of the last axis of `x`."""
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if bias else y

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        """RMSNorm over the last axis, Zhang and Sennrich 2019, arXiv 1910.07467."""
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + self.config.norm_eps) * self.weights[f"{name}.weight"]


def softmax(scores: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def visible(length: int, window: int | None) -> np.ndarray:
    """Whether query i sees key j, as (i, j): no key after it, and of those up to itself the last
    `window`."""
    back = np.arange(length)[:, None] - np.arange(length)  # how far key j lies before query i
    return (back >= 0) & (back < (length if window is None else window))


def silu(x: np.ndarray) -> np.ndarray:
    """x times the logistic function of x."""
    with np.errstate(over="ignore"):  # exp(-x) = inf is right: the quotient is 0
        return x / (1 + np.exp(-x))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """The tanh form of GELU, Hendrycks and Gimpel 2016, arXiv 1606.08415."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def relu(x: np.ndarray) -> np.ndarray:
    """x where it is positive, else 0."""
    return np.maximum(x, 0)


ACTIVATIONS = {"silu": silu, "gelu_pytorch_tanh": gelu_tanh, "relu": relu}


def rotate(x_SK: np.ndarray, cos_SJ: np.ndarray, sin_SJ: np.ndarray) -> np.ndarray:
    """Each pair of a head, which is element j of its first and of its second half, turned by the
    angle of its position: Su et al. 2021, arXiv 2104.09864."""
    a_SJ, b_SJ = np.split(x_SK, 2, axis=-1)
    turned = np.concatenate([a_SJ * cos_SJ - b_SJ * sin_SJ, b_SJ * cos_SJ + a_SJ * sin_SJ], axis=-1)
    return turned.astype(x_SK.dtype)


def rotation(rope: Rope, head_dim: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine (S, J), in float64, by which the heads of a sequence of `length` positions
    are turned. With yarn both are also scaled by its attention factor."""
    frequency_J = frequencies(rope, head_dim, length)
    angle_SJ = np.arange(length)[:, None] * frequency_J
    scale = yarn_attention_factor(rope) if rope.kind == "yarn" else 1.0
    return scale * np.cos(angle_SJ), scale * np.sin(angle_SJ)


def frequencies(rope: Rope, head_dim: int, length: int) -> np.ndarray:
    """Radians per position (J,) of each pair, for a sequence of `length` positions; only "dynamic"
    depends on the length."""
    exponent_J = np.arange(0, head_dim, 2) / head_dim
    plain_J = rope.theta**-exponent_J
    if rope.kind == "default":
        return plain_J
    if rope.kind == "linear":
        return plain_J / rope.factor
    if rope.kind == "dynamic":
        # The base grows with the sequence once it is longer than the model was trained for.
        excess = max(length / rope.original_positions, 1.0) - 1.0
        growth = (1.0 + rope.factor * excess) ** (head_dim / (head_dim - 2))
        return (rope.theta * growth) ** -exponent_J
    if rope.kind == "llama3":
        # Turns within the trained length: few are slowed down, many left alone, some in between.
        turns_J = rope.original_positions * plain_J / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        kept_J = np.clip((turns_J - low) / (high - low), 0, 1)
        return kept_J * plain_J + (1 - kept_J) * plain_J / rope.factor
    if rope.kind == "yarn":
        kept_J = 1 - yarn_ramp(rope, head_dim)
        return kept_J * plain_J + (1 - kept_J) * plain_J / rope.factor
    raise ValueError(f"unknown rope {rope.kind!r}")


def yarn_ramp(rope: Rope, head_dim: int) -> np.ndarray:
    """From 0 for pairs whose frequency is kept to 1 for those interpolated, (J,): section 3.2 of
    Peng et al. 2023, arXiv 2309.00071."""

    def pair_of(turns: float) -> float:
        """The (fractional) pair that makes so many turns within the trained length."""
        wavelength = rope.original_positions / turns
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rope.theta))

    start, end = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        start, end = math.floor(start), math.ceil(end)
    start, end = max(start, 0), min(end, head_dim - 1)
    if start == end:
        end += 0.001
    return np.clip((np.arange(head_dim // 2) - start) / (end - start), 0, 1)


def yarn_attention_factor(rope: Rope) -> float:
    """What cosine and sine are multiplied by, so that attention stays as sharp as it was trained:
    as the configuration says, or section 3.4 of the same paper."""

    def grown(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return grown(rope.mscale) / grown(rope.mscale_all_dim)
    return grown(1.0)
