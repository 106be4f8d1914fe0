"""The oracle: a whole decoder on one process, recomputed from scratch for every token.

No cache, no MPI, no packing, nothing shared with the arithmetic that the ranks run: everything
else is compared with this, and this is compared with the numbers of Hugging Face transformers.
It is written to be believed, so each head is attended to on its own and no step is fused.

S sequence positions, D model width, K head width, J = K / 2 pairs of a head, F feed-forward width,
V vocabulary, E experts, A experts that a token goes to. Weights are stored (outputs, inputs), as in
the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mpishard.config.model_config import ModelConfig, MoEConfig, Rope


class Routing(NamedTuple):
    """Where a mixture of experts sends each token."""

    experts_SA: np.ndarray  # ascending
    weights_SA: np.ndarray
    # By how much the scores would have to change for another choice: the least distance between the
    # last that was chosen and the first that was not, of experts and of groups of them.
    margin_S: np.ndarray


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
        self.encoder: Reference | None = None
        if config.encoder is not None:
            shared, within = "model.embed_tokens.weight", "model.encoder."
            own = {
                name.replace(within, "model."): weights[name]
                for name in weights
                if name == shared or name.startswith(within)
            }
            self.encoder = Reference(config.encoder, own, dtype)

    def forward(
        self, ids_S: Sequence[int], encoder_ids_T: Sequence[int] = ()
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """The logits (S, V) at every position, and the residual stream (S, D) as it enters each
        layer, followed by what the final norm makes of it. An encoder reads `encoder_ids_T`."""
        memory_TD = self.encoder.forward(encoder_ids_T)[1][-1] if self.encoder else None
        embedding_VD = self.weights["model.embed_tokens.weight"]
        x_SD = embedding_VD[np.asarray(ids_S)] * self.dtype(self.config.embedding_scale)
        if self.config.learned_positions:
            rows_S = self.config.position_offset + np.arange(len(x_SD))
            x_SD = x_SD + self.weights["model.embed_positions.weight"][rows_S]
        if self.config.embedding_norm:
            x_SD = self.norm(x_SD, "model.embed_norm")
        entering = []
        for layer in range(self.config.layers):
            entering.append(x_SD)
            x_SD, normed_SD = self.attended(x_SD, layer, memory_TD)
            if self.is_moe_layer(layer):
                y_SD = self.moe(normed_SD, f"model.layers.{layer}")
            else:
                y_SD = self.feed_forward(normed_SD, f"model.layers.{layer}.mlp")
            y_SD = self.layer_norm(y_SD, layer, self.config.norms.ffn_post)
            x_SD = x_SD + self.dtype(self.config.residual_scale) * y_SD
        x_SD = self.norm(x_SD, "model.norm")
        head_VD = embedding_VD if self.config.tied else self.weights["lm_head.weight"]
        logits_SV = x_SD @ head_VD.T
        if self.config.head_bias:
            logits_SV = logits_SV + self.weights["lm_head.bias"]
        logits_SV = self.dtype(self.config.logits_scale) * logits_SV
        logits_SV = softcapped(logits_SV, self.config.final_logit_softcapping)
        return logits_SV, [*entering, x_SD]

    def routings(
        self, ids_S: Sequence[int], encoder_ids_T: Sequence[int] = ()
    ) -> dict[int, Routing]:
        """Where each layer that is a mixture of experts sends the tokens, whether or not their
        experts have room for them."""
        _, hidden = self.forward(ids_S, encoder_ids_T)
        memory_TD = self.encoder.forward(encoder_ids_T)[1][-1] if self.encoder else None
        found = {}
        for layer in filter(self.is_moe_layer, range(self.config.layers)):
            _, normed_SD = self.attended(hidden[layer], layer, memory_TD)
            found[layer] = self.route(normed_SD, f"model.layers.{layer}")
        return found

    def greedy(self, ids: Sequence[int], count: int, encoder_ids: Sequence[int] = ()) -> list[int]:
        """The `count` tokens that follow `ids` when the likeliest is taken each time, the lowest
        id among equals. End-of-sequence ids do not end it."""
        sequence = list(ids)
        for _ in range(count):
            logits_SV, _ = self.forward(sequence, encoder_ids)
            sequence.append(int(np.argmax(logits_SV[-1])))  # argmax takes the first of equals
        return sequence[len(ids) :]

    def is_moe_layer(self, layer: int) -> bool:
        """Whether `layer` has experts."""
        return self.config.moe is not None and self.config.moe.layers[layer]

    def attended(
        self, x_SD: np.ndarray, layer: int, memory_TD: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The residual stream after the attention of `layer`, which it entered as `x_SD`, and what
        the norm before the feed-forward network makes of it; with a parallel residual, of the
        stream that attention reads, too. Beside an encoder, also after attention over its outputs
        `memory_TD`."""
        norms = self.config.norms
        attention = self.latent_attention if self.config.mla else self.attention
        normed_SD = self.layer_norm(x_SD, layer, norms.attention)
        if self.config.is_linear(layer):
            y_SD = self.linear_attention(normed_SD, f"model.layers.{layer}.linear_attn")
        else:
            y_SD = attention(normed_SD, layer)
        y_SD = self.layer_norm(y_SD, layer, norms.attention_post)
        after_SD = x_SD + self.dtype(self.config.residual_scale) * y_SD
        if memory_TD is not None:
            normed_SD = self.layer_norm(after_SD, layer, norms.cross)
            after_SD = after_SD + self.cross_attention(normed_SD, memory_TD, layer)
        if not self.config.parallel_residual:
            return after_SD, self.layer_norm(after_SD, layer, norms.ffn)
        if norms.ffn is None:
            return after_SD, normed_SD
        return after_SD, self.layer_norm(x_SD, layer, norms.ffn)

    def attention(self, x_SD: np.ndarray, layer: int) -> np.ndarray:
        """Causal attention of a layer, over the positions in its window or all."""
        c, name = self.config, f"model.layers.{layer}.self_attn"
        q_SX = self.linear(x_SD, f"{name}.q_proj", c.qkv_bias)  # X: all heads
        k_SX = self.linear(x_SD, f"{name}.k_proj", c.qkv_bias)
        v_SX = self.linear(x_SD, f"{name}.v_proj", c.qkv_bias)
        if c.clip_qkv is not None:
            q_SX, k_SX, v_SX = (np.clip(x, -c.clip_qkv, c.clip_qkv) for x in (q_SX, k_SX, v_SX))
        q_norm, k_norm = f"{name}.q_norm", f"{name}.k_norm"
        if c.full_width_qk_norm:
            q_SX, k_SX = self.norm(q_SX, q_norm), self.norm(k_SX, k_norm)
        q_SHK = q_SX.reshape(-1, c.heads, c.head_dim)
        k_SGK = k_SX.reshape(-1, c.kv_heads, c.head_dim)
        v_SGK = v_SX.reshape(-1, c.kv_heads, c.head_dim)
        if c.per_head_norm or (c.qk_norm and not c.qk_norm_after_rope):
            q_SHK, k_SGK = self.norm(q_SHK, q_norm), self.norm(k_SGK, k_norm)
        q_SHK, k_SGK = self.positioned(q_SHK, layer), self.positioned(k_SGK, layer)
        if c.qk_norm and c.qk_norm_after_rope:
            q_SHK, k_SGK = self.norm(q_SHK, q_norm), self.norm(k_SGK, k_norm)
        if c.qk_l2_norm and c.ropes[layer].kind != "none":
            q_SHK, k_SGK = (
                x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + c.norm_eps)
                for x in (q_SHK, k_SGK)
            )

        S = len(x_SD)
        query_scale_S1 = query_scale(c.ropes[layer], S)[:, None].astype(self.dtype)
        hidden_SS = ~visible(S, c.windows[layer], c.chunks[layer])
        if not c.causal:
            hidden_SS[:] = False
        if c.relative_bias:
            table_BH = self.weights["model.relative_bias.weight"]
            bias_SSH = table_BH[relative_buckets(c, S)]
        out_SHK = np.empty_like(q_SHK)
        for h in range(c.heads):
            g = h // (c.heads // c.kv_heads)  # neighbouring query heads share a key/value head
            q_SK, k_SK = q_SHK[:, h] * query_scale_S1, k_SGK[:, g]
            scale = 1 / math.sqrt(c.head_dim) if c.attention_scale is None else c.attention_scale
            if c.inverse_layer_scale:
                scale = scale / (layer + 1)
            scores_SS = softcapped(q_SK @ k_SK.T * scale, c.attn_logit_softcapping)
            if c.alibi:
                scores_SS = scores_SS + alibi_biases(c, h, S)
            if c.relative_bias:
                scores_SS = scores_SS + bias_SSH[:, :, h]
            scores_SS[hidden_SS] = -np.inf
            if c.sinks:
                # A key that every query sees, with this score and a value of zero.
                sink_S1 = np.full((S, 1), self.weights[f"{name}.sinks"][h])
                weights_SS = softmax(np.concatenate([scores_SS, sink_S1], axis=1))[:, :-1]
            else:
                weights_SS = softmax(scores_SS)
            out_SHK[:, h] = weights_SS @ v_SGK[:, g]
        out_SX = out_SHK.reshape(S, -1)
        if c.output_gate:
            out_SX = out_SX * sigmoid(self.linear(x_SD, f"{name}.gate_proj", c.qkv_bias))
        return self.linear(out_SX, f"{name}.o_proj", c.o_bias)

    def cross_attention(self, x_SD: np.ndarray, memory_TD: np.ndarray, layer: int) -> np.ndarray:
        """Attention of a layer to all that the encoder made of its tokens, wherever they stand."""
        c, name = self.config, f"model.layers.{layer}.cross_attn"
        q_SHK = self.linear(x_SD, f"{name}.q_proj", False).reshape(-1, c.heads, c.head_dim)
        k_TGK, v_TGK = (
            self.linear(memory_TD, f"{name}.{part}_proj", False).reshape(-1, c.kv_heads, c.head_dim)
            for part in "kv"
        )
        scale = 1 / math.sqrt(c.head_dim) if c.attention_scale is None else c.attention_scale
        out_SHK = np.empty_like(q_SHK)
        for h in range(c.heads):
            g = h // (c.heads // c.kv_heads)
            out_SHK[:, h] = softmax(q_SHK[:, h] @ k_TGK[:, g].T * scale) @ v_TGK[:, g]
        return self.linear(out_SHK.reshape(len(x_SD), -1), f"{name}.o_proj", False)

    def linear_attention(self, x_SD: np.ndarray, name: str) -> np.ndarray:
        """The gated delta net called `name`, token by token: Yang et al. 2024, arXiv 2412.06464."""
        c = self.config.linear_attention
        assert c is not None
        S, K, Y = len(x_SD), c.key_width, c.value_width
        q_SX, k_SX, v_SX = (self.convolved(x_SD, name, part) for part in ("q", "k", "v"))
        rate_SH = sigmoid(self.linear(x_SD, f"{name}.b_proj", False))
        step_SH = softplus(
            self.linear(x_SD, f"{name}.a_proj", False) + self.weights[f"{name}.dt_bias"]
        )
        decay_SH = np.exp(-np.exp(self.weights[f"{name}.A_log"]) * step_SH)
        out_SHY = np.zeros((S, c.heads, Y), x_SD.dtype)
        for h in range(c.heads):
            g = h // (c.heads // c.kv_heads)  # neighbouring value heads share a key head
            q_SK = unit(q_SX[:, g * K : (g + 1) * K]) / math.sqrt(K)
            k_SK = unit(k_SX[:, g * K : (g + 1) * K])
            state_KY = np.zeros((K, Y), x_SD.dtype)
            for t in range(S):
                state_KY = state_KY * decay_SH[t, h]
                v_Y = v_SX[t, h * Y : (h + 1) * Y]
                state_KY = state_KY + np.outer(k_SK[t], rate_SH[t, h] * (v_Y - k_SK[t] @ state_KY))
                out_SHY[t, h] = q_SK[t] @ state_KY
        mean_square = np.mean(out_SHY**2, axis=-1, keepdims=True)
        out_SHY = out_SHY / np.sqrt(mean_square + self.config.norm_eps)
        out_SX = (out_SHY * self.weights[f"{name}.norm.weight"]).reshape(S, -1)
        gated_SX = out_SX * silu(self.linear(x_SD, f"{name}.z_proj", False))
        return self.linear(gated_SX, f"{name}.out_proj", False)

    def convolved(self, x_SD: np.ndarray, name: str, part: str) -> np.ndarray:
        """The queries "q", keys or values of all heads, each channel convolved over the positions
        up to its own: (S, X)."""
        taps_XT = self.weights[f"{name}.{part}_conv1d.weight"][:, 0]
        y_SX = self.linear(x_SD, f"{name}.{part}_proj", False)
        out_SX = np.zeros_like(y_SX)
        for t in range(len(y_SX)):
            for back in range(min(t + 1, taps_XT.shape[1])):
                out_SX[t] += y_SX[t - back] * taps_XT[:, -1 - back]
        return silu(out_SX)

    def positioned(self, x_SHK: np.ndarray, layer: int) -> np.ndarray:
        """Queries or keys of a layer, turned by their positions: of each head the elements that
        rope rotates, which are the first, or none."""
        c = self.config
        if c.ropes[layer].kind == "none":
            return x_SHK
        cos_SJ, sin_SJ = rotation(c.ropes[layer], c.rotary_dim, len(x_SHK))
        turn = rotate_neighbours if c.rope_interleaved else rotate
        turned_SHK = x_SHK.copy()
        for h in range(x_SHK.shape[1]):
            turned_SHK[:, h, : c.rotary_dim] = turn(x_SHK[:, h, : c.rotary_dim], cos_SJ, sin_SJ)
        return turned_SHK

    def latent_attention(self, x_SD: np.ndarray, layer: int) -> np.ndarray:
        """Multi-head latent attention of a layer, with every key and value written out: section 2.1
        of DeepSeek-V2, arXiv 2405.04434."""
        c, name, rope = self.config, f"model.layers.{layer}.self_attn", self.config.ropes[layer]
        mla = c.mla
        assert mla is not None
        S = len(x_SD)
        if mla.q_lora_rank is None:
            q_SX = self.linear(x_SD, f"{name}.q_proj", False)  # X: all heads
        else:
            latent_SX = self.linear(x_SD, f"{name}.q_a_proj", mla.bias)
            normed_SX = self.norm(latent_SX, f"{name}.q_a_layernorm", mla.norm_eps)
            q_SX = self.linear(normed_SX, f"{name}.q_b_proj", False)
        q_SHK = q_SX.reshape(S, c.heads, mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        # One latent per position, from which the keys' parts without position and the values of all
        # heads are made, and one key that carries the position for all of them.
        latent_SX = self.linear(x_SD, f"{name}.kv_a_proj_with_mqa", mla.bias)
        latent_SX, shared_key_SK = np.split(latent_SX, [mla.kv_lora_rank], axis=1)
        normed_SX = self.norm(latent_SX, f"{name}.kv_a_layernorm", mla.norm_eps)
        kv_SX = self.linear(normed_SX, f"{name}.kv_b_proj", False)
        kv_SHX = kv_SX.reshape(S, c.heads, mla.qk_nope_head_dim + mla.v_head_dim)

        cos_SJ, sin_SJ = rotation(rope, mla.qk_rope_head_dim, S)
        turn = rotate_neighbours if mla.interleaved else rotate
        shared_key_SK = turn(shared_key_SK, cos_SJ, sin_SJ)
        scale = latent_score_factor(rope) / math.sqrt(mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        hidden_SS = ~visible(S, c.windows[layer], c.chunks[layer])
        out_SHK = np.empty((S, c.heads, mla.v_head_dim), x_SD.dtype)
        for h in range(c.heads):
            nope_SK, rope_SK = np.split(q_SHK[:, h], [mla.qk_nope_head_dim], axis=1)
            q_SK = np.concatenate([nope_SK, turn(rope_SK, cos_SJ, sin_SJ)], axis=1)
            nope_SK, v_SK = np.split(kv_SHX[:, h], [mla.qk_nope_head_dim], axis=1)
            k_SK = np.concatenate([nope_SK, shared_key_SK], axis=1)
            scores_SS = q_SK @ k_SK.T * scale
            scores_SS[hidden_SS] = -np.inf
            out_SHK[:, h] = softmax(scores_SS) @ v_SK
        return self.linear(out_SHK.reshape(S, -1), f"{name}.o_proj", c.o_bias)

    def moe(self, x_SD: np.ndarray, name: str) -> np.ndarray:
        """The mixture of experts of the layer called `name`: each token's experts in ascending
        order, and then the one that every token goes to."""
        moe = self.config.moe
        assert moe is not None
        routing = self.route(x_SD, name)
        y_SD = np.zeros_like(x_SD)
        taken = [0] * moe.num_experts  # the tokens that each expert was given so far
        for token in range(len(x_SD)):
            chosen = zip(routing.experts_SA[token], routing.weights_SA[token], strict=True)
            for expert, weight in chosen:
                taken[expert] += 1
                if moe.capacity is not None and taken[expert] > moe.capacity:
                    continue
                if moe.scale_inputs:
                    y_SD[token] += self.expert(weight * x_SD[token], name, expert)
                else:
                    y_SD[token] += weight * self.expert(x_SD[token], name, expert)
        if moe.shared_expert_intermediate_size:
            shared_SD = self.feed_forward(x_SD, f"{name}.{moe.names.shared}")
            if moe.shared_gate:
                gate_DX = self.weights[f"{name}.{moe.names.shared_gate}"].T  # (D, 1)
                shared_SD = sigmoid(x_SD @ gate_DX) * shared_SD
            y_SD = y_SD + shared_SD
        return y_SD

    def route(self, x_SD: np.ndarray, name: str) -> Routing:
        """The experts and weights of each token in the layer called `name`."""
        moe = self.config.moe
        assert moe is not None
        separate, stacked = moe.names.separate, moe.names.stacked
        router = f"{name}.{stacked.router}"
        if router not in self.weights and separate is not None:
            router = f"{name}.{separate.router}"
        logits_SE = x_SD @ self.weights[router].T
        if moe.router_bias:
            logits_SE = logits_SE + self.weights[f"{name}.{stacked.router_bias}"]
        if moe.scoring == "sparsemixer":
            return sparse_mixer(logits_SE, moe.jitter)
        scores_SE = {"softmax": softmax, "sigmoid": sigmoid}[moe.scoring](logits_SE)
        chosen_by_SE = scores_SE
        if moe.e_score_correction_bias:
            bias = f"{name}.{moe.names.e_score_correction_bias}"
            if bias not in self.weights:
                bias = f"{name}.{stacked.e_score_correction_bias}"
            chosen_by_SE = scores_SE + self.weights[bias]
        experts_SA, margin_S = choose(chosen_by_SE, moe)
        weights_SA = np.take_along_axis(scores_SE, experts_SA, axis=1)
        if moe.norm_topk_prob:
            sum_S1 = weights_SA.sum(axis=1, keepdims=True)
            weights_SA = weights_SA / np.maximum(sum_S1, moe.norm_min)
        return Routing(experts_SA, weights_SA * moe.routed_scaling_factor, margin_S)

    def expert(self, x_D: np.ndarray, name: str, number: int) -> np.ndarray:
        """What one expert of the layer called `name` makes of one token."""
        moe = self.config.moe
        assert moe is not None
        if not self.config.gated_mlp:
            assert moe.names.separate is not None
            up_FD = self.weights[f"{name}.{moe.names.separate.up}".format(number)]
            down_DF = self.weights[f"{name}.{moe.names.separate.down}".format(number)]
            return down_DF @ ACTIVATIONS[self.config.activation](up_FD @ x_D)
        gate_FD, up_FD, down_DF = self.expert_weights(name, number)
        gate_F, up_F = gate_FD @ x_D, up_FD @ x_D
        stacked = moe.names.stacked
        if moe.expert_bias:
            gate_up_X = self.weights[f"{name}.{stacked.gate_up_bias}"][number]  # (2 F,)
            gate_F, up_F = gate_F + gate_up_X[::2], up_F + gate_up_X[1::2]
        if moe.alpha is not None and moe.limit is not None:
            gate_F, up_F = np.minimum(gate_F, moe.limit), np.clip(up_F, -moe.limit, moe.limit)
            hidden_F = (up_F + 1) * gate_F * sigmoid(moe.alpha * gate_F)
        else:
            hidden_F = ACTIVATIONS[self.config.activation](gate_F) * up_F
        out_D = down_DF @ hidden_F
        if moe.expert_bias:
            out_D = out_D + self.weights[f"{name}.{stacked.down_bias}"][number]
        return out_D

    def expert_weights(self, name: str, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gate (F, D), up (F, D) and down (D, F) of one expert, however they are stored."""
        assert self.config.moe is not None
        separate, stacked = self.config.moe.names.separate, self.config.moe.names.stacked
        if f"{name}.{stacked.gate_up}" in self.weights:
            gate_up = self.weights[f"{name}.{stacked.gate_up}"][number]
            down = self.weights[f"{name}.{stacked.down}"][number]
            if stacked.transposed:
                gate_up, down = gate_up.T, down.T
            halves = (gate_up[::2], gate_up[1::2]) if stacked.alternating else np.split(gate_up, 2)
            return halves[0], halves[1], down
        assert separate is not None
        parts = (separate.gate, separate.up, separate.down)
        gate_FD, up_FD, down_DF = (self.weights[f"{name}.{part}".format(number)] for part in parts)
        return gate_FD, up_FD, down_DF

    def feed_forward(self, x_SD: np.ndarray, name: str) -> np.ndarray:
        """The feed-forward network called `name`, gated or not."""
        bias, activation = self.config.mlp_bias, ACTIVATIONS[self.config.activation]
        up_SF = self.linear(x_SD, f"{name}.up_proj", bias)
        if not self.config.gated_mlp:
            return self.linear(activation(up_SF), f"{name}.down_proj", bias)
        gate_SF = activation(self.linear(x_SD, f"{name}.gate_proj", bias))
        return self.linear(gate_SF * up_SF, f"{name}.down_proj", bias)

    def linear(self, x: np.ndarray, name: str, bias: bool) -> np.ndarray:
        """The projection called `name` of the last axis of `x`."""
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if bias else y

    def layer_norm(self, x_SD: np.ndarray, layer: int, name: str | None) -> np.ndarray:
        """`x_SD` after the norm `name` of a layer, if the family has it."""
        return x_SD if name is None else self.norm(x_SD, f"model.layers.{layer}.{name}")

    def norm(self, x: np.ndarray, name: str, eps: float | None = None) -> np.ndarray:
        """RMSNorm over the last axis, Zhang and Sennrich 2019, arXiv 1910.07467, or LayerNorm, Ba
        et al. 2016, arXiv 1607.06450; `eps` is the model's unless given."""
        eps = self.config.norm_eps if eps is None else eps
        if self.config.layer_norm:
            x = x - np.mean(x, axis=-1, keepdims=True)
        x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
        if self.config.norm_weight:
            x = x * (self.weights[f"{name}.weight"] + self.dtype(self.config.norm_offset))
        # Norms of each head have no bias, whatever the other norms have.
        return x + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else x


def choose(scores_SE: np.ndarray, moe: MoEConfig) -> tuple[np.ndarray, np.ndarray]:
    """The experts (S, A) of each token, ascending, and the margin (S,) of the choice: the best
    `moe.topk_group` groups, and in them the best `moe.top_k` experts, the lower number among
    equals."""
    S = len(scores_SE)
    margin_S = np.full(S, np.inf)
    if moe.topk_group < moe.n_group:
        members = scores_SE.reshape(S, moe.n_group, -1)
        best = np.sort(members, axis=2)
        group_scores = best[:, :, -1] if moe.group_score == "max" else best[:, :, -2:].sum(axis=2)
        kept, margin_S = top(group_scores, moe.topk_group)
        excluded = np.ones((S, moe.n_group), bool)
        np.put_along_axis(excluded, kept, False, axis=1)
        scores_SE = np.where(excluded[:, :, None], -np.inf, members).reshape(S, -1)
    experts_SA, margin_of_experts_S = top(scores_SE, moe.top_k)
    return experts_SA, np.minimum(margin_S, margin_of_experts_S)


def sparse_mixer(logits_SE: np.ndarray, jitter: float) -> Routing:
    """Two experts for each token, as SparseMixer chooses them outside of training (arXiv
    2409.12136): the best, and the best of the others. The weight of each is its softmax among those
    that come near to it: the best expert takes no part in the second weight."""
    experts, weights, margins = [], [], []
    for logits_E in logits_SE:
        left_E, chosen, margin = logits_E.copy(), {}, np.inf
        for _ in range(2):
            best = int(np.argmax(left_E))
            distance_E = left_E[best] - logits_E
            relative_E = distance_E / np.maximum(np.abs(logits_E), left_E[best])
            near_E = np.where(relative_E > 2 * jitter, -np.inf, left_E)
            chosen[best] = softmax(near_E)[best]
            others_E = np.delete(left_E, best)
            apart_E = np.abs(relative_E - 2 * jitter)
            margin = min(margin, left_E[best] - others_E.max(), apart_E.min())
            left_E[best] = -np.inf
        experts.append(sorted(chosen))
        weights.append([chosen[expert] for expert in sorted(chosen)])
        margins.append(margin)
    return Routing(np.array(experts), np.array(weights, logits_SE.dtype), np.array(margins))


def top(scores: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The columns of the `count` greatest scores of each row, ascending, and by how much the least
    of them exceeds the greatest of the others."""
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=1)
    others = np.full(len(scores), -np.inf) if count == scores.shape[1] else ranked[:, count]
    return np.sort(order[:, :count], axis=1), ranked[:, count - 1] - others


def softcapped(x: np.ndarray, cap: float | None) -> np.ndarray:
    """`x` bent so that it stays within -`cap` to `cap`, if there is one."""
    return x if cap is None else cap * np.tanh(x / cap)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def visible(length: int, window: int | None, chunk: int | None = None) -> np.ndarray:
    """Whether query i sees key j, as (i, j): no key after it, and of those up to itself the last
    `window`, or those in its own `chunk`."""
    back = np.arange(length)[:, None] - np.arange(length)  # how far key j lies before query i
    seen = (back >= 0) & (back < (length if window is None else window))
    if chunk is not None:
        number = np.arange(length) // chunk
        seen &= number[:, None] == number
    return seen


def alibi_biases(config: ModelConfig, head: int, length: int) -> np.ndarray:
    """What is added to the scores of a head, the same for every query: its slope times the
    position of the key, (S,). Softmax sees only differences, so that this is a falling with the
    distance: Press et al. 2021, arXiv 2108.12409."""
    power = 2 ** math.floor(math.log2(config.heads))
    if head < power:
        slope = 2 ** (-8 * (head + 1) / power)
    else:  # the heads beyond a power of two have those between
        slope = 2 ** (-4 * (2 * (head - power) + 1) / power)
    position_S = np.arange(length)
    if config.alibi == "in bfloat16":
        product_S = bfloat16(bfloat16(np.array(slope)) * bfloat16(position_S))
        return product_S.astype(np.float64) / math.sqrt(config.head_dim)
    return slope * position_S


def relative_buckets(config: ModelConfig, length: int) -> np.ndarray:
    """The bucket (S, S) of the distance between query i and key j: Raffel et al. 2020, arXiv
    1910.10683. Small distances have one each, larger ones share them by their logarithm, and of
    attention to both sides the later keys have the second half."""
    bias = config.relative_bias
    assert bias is not None
    count = bias.buckets if config.causal else bias.buckets // 2
    single = count // 2
    bucket_SS = np.zeros((length, length), int)
    for i in range(length):
        for j in range(length):
            distance = abs(i - j) if i >= j or not config.causal else 0
            bucket = distance
            if distance >= single:
                # transformers' numbers of 32 bits, which decide where a bound is a whole number
                log, most = np.float32(distance) / np.float32(single), bias.max_distance / single
                part = np.log(log) / np.float32(math.log(most)) * np.float32(count - single)
                bucket = min(count - 1, single + int(part))
            bucket_SS[i, j] = bucket + (count if j > i and not config.causal else 0)
    return bucket_SS


def bfloat16(x: np.ndarray) -> np.ndarray:
    """`x` with its 24 significant bits rounded to 8, halves to even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """The logistic function."""
    with np.errstate(over="ignore"):  # exp(-x) = inf is right: the quotient is 0
        return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    """x times the logistic function of x."""
    with np.errstate(over="ignore"):  # exp(-x) = inf is right: the quotient is 0
        return x / (1 + np.exp(-x))


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + exp(x))."""
    return np.logaddexp(0, x)


def unit(x: np.ndarray) -> np.ndarray:
    """`x` at length 1 along its last axis, as the gated delta rule takes queries and keys."""
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """The tanh form of GELU, Hendrycks and Gimpel 2016, arXiv 1606.08415."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu(x: np.ndarray) -> np.ndarray:
    """x times the probability that a standard normal variable is below x: the same paper."""
    erf = np.frompyfunc(math.erf, 1, 1)
    return 0.5 * x * (1 + np.asarray(erf(x / math.sqrt(2)), x.dtype))


def relu(x: np.ndarray) -> np.ndarray:
    """x where it is positive, else 0."""
    return np.maximum(x, 0)


def relu2(x: np.ndarray) -> np.ndarray:
    """The square of x where it is positive, else 0."""
    return relu(x) ** 2


ACTIVATIONS = {
    "silu": silu,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu": gelu,
    "relu": relu,
    "relu2": relu2,
}


def rotate(x_SK: np.ndarray, cos_SJ: np.ndarray, sin_SJ: np.ndarray) -> np.ndarray:
    """Each pair of a head, which is element j of its first and of its second half, turned by the
    angle of its position: Su et al. 2021, arXiv 2104.09864."""
    a_SJ, b_SJ = np.split(x_SK, 2, axis=-1)
    turned = np.concatenate([a_SJ * cos_SJ - b_SJ * sin_SJ, b_SJ * cos_SJ + a_SJ * sin_SJ], axis=-1)
    return turned.astype(x_SK.dtype)


def rotate_neighbours(x_SK: np.ndarray, cos_SJ: np.ndarray, sin_SJ: np.ndarray) -> np.ndarray:
    """As `rotate`, where pair j is elements 2 j and 2 j + 1."""
    a_SJ, b_SJ = x_SK[:, ::2], x_SK[:, 1::2]
    turned_SJ2 = np.stack([a_SJ * cos_SJ - b_SJ * sin_SJ, b_SJ * cos_SJ + a_SJ * sin_SJ], axis=-1)
    return turned_SJ2.reshape(x_SK.shape).astype(x_SK.dtype)


def rotation(rope: Rope, head_dim: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine (S, J), in float64, by which the heads of a sequence of `length` positions
    are turned. With yarn and longrope both are also scaled by an attention factor."""
    frequency_J = frequencies(rope, head_dim, length)
    angle_SJ = np.arange(length)[:, None] * frequency_J
    factor = {"yarn": yarn_attention_factor, "longrope": longrope_attention_factor}
    scale = factor[rope.kind](rope) if rope.kind in factor else 1.0
    if rope.mscales is not None:
        scale = rope.mscales[1 if length > rope.original_positions else 0]
    return scale * np.cos(angle_SJ), scale * np.sin(angle_SJ)


def query_scale(rope: Rope, length: int) -> np.ndarray:
    """What each query of a sequence is multiplied with, (S,): it grows with how many times the
    trained length lies before it."""
    if not rope.query_scale_beta:
        return np.ones(length)
    lengths_before_S = (np.arange(length) + rope.query_scale_offset) // rope.original_positions
    return 1 + rope.query_scale_beta * np.log1p(lengths_before_S)


def frequencies(rope: Rope, head_dim: int, length: int) -> np.ndarray:
    """Radians per position (J,) of each pair, for a sequence of `length` positions; only "dynamic"
    and "longrope" depend on the length."""
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
    if rope.kind == "ntk_alpha":
        return (rope.theta * rope.factor ** (head_dim / (head_dim - 2))) ** -exponent_J
    if rope.kind == "llama3":
        # Turns within the trained length: few are slowed down, many left alone, some in between.
        turns_J = rope.original_positions * plain_J / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        if low == high:
            return np.where(turns_J > high, plain_J, plain_J / rope.factor)
        kept_J = np.clip((turns_J - low) / (high - low), 0, 1)
        return kept_J * plain_J + (1 - kept_J) * plain_J / rope.factor
    if rope.kind == "yarn":
        kept_J = 1 - yarn_ramp(rope, head_dim)
        return kept_J * plain_J + (1 - kept_J) * plain_J / rope.factor
    if rope.kind == "longrope":
        is_long = length > rope.original_positions
        return plain_J / np.array(rope.long_factors if is_long else rope.short_factors)
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
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_growth(rope, rope.mscale) / yarn_growth(rope, rope.mscale_all_dim)
    return yarn_growth(rope, 1.0)


def longrope_attention_factor(rope: Rope) -> float:
    """The same for longrope: as the configuration says, or section 3.3 of Ding et al. 2024, arXiv
    2402.13753."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_positions))


def latent_score_factor(rope: Rope) -> float:
    """What the scores of latent attention are multiplied by beside the usual scale: once for the
    queries and once for the keys, of which rope, and so yarn's factor, reaches only a part."""
    if rope.kind == "yarn" and rope.mscale_all_dim:
        return yarn_growth(rope, rope.mscale_all_dim) ** 2
    return 1.0


def yarn_growth(rope: Rope, mscale: float) -> float:
    """How much sharper attention becomes by stretching, in yarn's rule with weight `mscale`."""
    return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
