"""The network, dense or with experts, under the names of its checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the model, under the names of config.json."""

    vocab_size: int = 4000
    hidden_size: int = 256
    intermediate_size: int = 640
    num_hidden_layers: int = 5
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0


@dataclass(frozen=True)
class MixtureShape(Shape):
    """Sizes of a model whose feed-forward layers are experts of `intermediate_size` each."""

    intermediate_size: int = 160
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.01


class RMSNorm(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden_size))
        self.eps = shape.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on the halves of each head, the Llama way."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        query_width = shape.num_attention_heads * shape.head_dim
        key_width = shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (self.heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        group = self.shape.num_attention_heads // self.shape.num_key_value_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.shape.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Expert(nn.Module):
    def __init__(self, shape: MixtureShape) -> None:
        super().__init__()
        self.w1 = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.w2 = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)
        self.w3 = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Mixture(nn.Module):
    """Experts of which each token takes the most probable few; every choice is served.

    After a call, `balance` holds the load-balancing loss of Switch Transformers (1 when all
    experts are used alike), and `load` [experts] has grown by the rows each expert was given.
    """

    def __init__(self, shape: MixtureShape) -> None:
        super().__init__()
        self.top_k = shape.num_experts_per_tok
        self.gate = nn.Linear(shape.hidden_size, shape.num_local_experts, bias=False)
        self.experts = nn.ModuleList(Expert(shape) for _ in range(shape.num_local_experts))
        self.register_buffer(
            "load", torch.zeros(shape.num_local_experts, dtype=torch.long), persistent=False
        )
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weights, chosen = self.route(rows)
        order = chosen.flatten().argsort(stable=True)  # the rows of one expert side by side
        token = order // self.top_k
        counts = chosen.flatten().bincount(minlength=len(self.experts))
        self.load += counts
        parts = rows.index_select(0, token).split(counts.tolist())
        results = [expert(part) for expert, part in zip(self.experts, parts, strict=True)]
        weighted = torch.cat(results) * weights.flatten().index_select(0, order)[:, None]
        return torch.zeros_like(rows).index_add(0, token, weighted).view_as(x)

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids [rows, top_k] of the chosen experts; always in float32, as Mixtral."""
        with torch.autocast("cpu", enabled=False):
            shares = torch.softmax(self.gate(rows.float()), -1)
        weights, chosen = shares.topk(self.top_k)
        used = chosen.flatten().bincount(minlength=len(self.experts)) / chosen.numel()
        self.balance = len(self.experts) * (used * shares.mean(0)).sum()
        return weights / weights.sum(-1, keepdim=True), chosen


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape)
        if isinstance(shape, MixtureShape):
            self.block_sparse_moe = Mixture(shape)
        else:
            self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        feed_forward = self.block_sparse_moe if "block_sparse_moe" in self._modules else self.mlp
        return x + feed_forward(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Llama or Mixtral: parameters carry the checkpoint's names, less the prefix ``model.``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape)
        half = torch.arange(0, shape.head_dim, 2) / shape.head_dim
        angles = torch.outer(torch.arange(shape.max_position_embeddings), shape.rope_theta**-half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.initialise()

    def initialise(self) -> None:
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight")):
                nn.init.zeros_(weight)  # every layer starts as the identity
            elif "embed" in name:
                nn.init.normal_(weight, std=0.02)
            elif weight.ndim == 2:
                nn.init.normal_(weight, std=0.5 * weight.shape[1] ** -0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x, length = self.embed_tokens(ids), ids.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:length], self.sin[:length])
        return F.linear(self.norm(x), self.embed_tokens.weight)

    def loss(self, batch: Tensor, reduction: str = "mean") -> Tensor:
        logits = self(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction=reduction)

    def mixtures(self) -> list[Mixture]:
        return [module for module in self.modules() if isinstance(module, Mixture)]

    def balance_loss(self) -> Tensor | float:
        """The load-balancing losses of the last call, weighted and summed over the layers."""
        if not isinstance(self.shape, MixtureShape):
            return 0.0
        losses = torch.stack([mixture.balance for mixture in self.mixtures()])
        return self.shape.router_aux_loss_coef * losses.sum()

    def take_load(self) -> list[list[int]]:
        """Rows each expert of each layer was given since this was last asked; none if dense."""
        loads = [mixture.load.tolist() for mixture in self.mixtures()]
        for mixture in self.mixtures():
            mixture.load.zero_()
        return loads


@torch.no_grad()
def upcycle(model: Decoder, directory: Path) -> None:
    """Start a mixture from a trained dense model: sparse upcycling, arXiv 2212.05055.

    What both have is copied. An expert is narrower than the dense layer, so each is dealt some of
    its neurons, as from a shuffled pack of cards, and another such pack when one is used up. The
    weights of a token's experts sum to 1; `top_k` makes up for that.
    """
    weights = load_file(directory / "model.safetensors")
    dense = {name.removeprefix("model."): weight.float() for name, weight in weights.items()}
    model.load_state_dict(dense, strict=False)
    for number, mixture in enumerate(model.mixtures()):
        names = (f"layers.{number}.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
        gate, up, down = (dense[name] for name in names)
        width = model.shape.intermediate_size
        packs = math.ceil(len(mixture.experts) * width / len(gate))
        deals = torch.cat([torch.randperm(len(gate)) for _ in range(packs)]).split(width)
        for expert, neurons in zip(mixture.experts, deals, strict=False):
            expert.w1.weight.copy_(gate[neurons])
            expert.w3.weight.copy_(up[neurons])
            expert.w2.weight.copy_(mixture.top_k * down[:, neurons])
