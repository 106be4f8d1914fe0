"""The one table that cuts the weights.

Each row names a tensor of the checkpoint, its whole shape and how it is divided over the
tensor-parallel ranks. The converter, the loader, the verifier and the tests all read it; no layer
of the model ever slices a weight.

============================  ==============  =========================================
weights                       whole shape     cut
============================  ==============  =========================================
embedding, lm_head            (V, D)          rows: a block of the vocabulary
q_proj, its bias              (H*K, D)        rows: this rank's query heads
k_proj, v_proj, their biases  (G*K, D)        rows: this rank's key/value heads
o_proj                        (D, H*K)        columns: this rank's query heads
gate_proj, up_proj, biases    (F, D)          rows: a block of the feed-forward width
down_proj                     (D, F)          columns: a block of the feed-forward width
norms, o_proj's and           (D,) or (K,)    whole on every rank
down_proj's biases
============================  ==============  =========================================

Cutting the outputs (rows) is column parallelism in Megatron-LM's words, which thinks of ``x @ A``,
and cutting the inputs (columns) is row parallelism (Shoeybi et al. 2019, arXiv 1909.08053).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mpishard.description.config import ModelConfig
from mpishard.description.layout import block, kv_heads_of, query_heads_of


@dataclass(frozen=True)
class Weight:
    """One tensor of the checkpoint.

    `name` is its Hugging Face name. `layer` and `field` say where the model keeps it: `field` of
    decoder layer `layer`, or of the model itself where `layer` is None. `axis` is the axis along
    which it is cut and `unit` what the cut follows; both None for a weight that every rank holds
    whole.
    """

    name: str
    layer: int | None
    field: str
    shape: tuple[int, ...]
    axis: int | None = None
    unit: str | None = None  # "query heads", "kv heads", "ffn" or "vocabulary"

    def slices(self, config: ModelConfig, tp: int, rank: int) -> tuple[slice, ...]:
        """The part that tensor-parallel rank `rank` of `tp` holds, as one slice per axis."""
        whole = tuple(slice(0, length) for length in self.shape)
        if self.axis is None:
            return whole
        cut = _bounds(config, self.unit, tp, rank)
        return whole[: self.axis] + (cut,) + whole[self.axis + 1 :]

    def shard_shape(self, config: ModelConfig, tp: int, rank: int) -> tuple[int, ...]:
        """The shape of the part that tensor-parallel rank `rank` of `tp` holds."""
        return tuple(cut.stop - cut.start for cut in self.slices(config, tp, rank))


def _bounds(config: ModelConfig, unit: str | None, tp: int, rank: int) -> slice:
    if unit == "query heads":
        return _scaled(query_heads_of(config, tp, rank), config.head_dim)
    if unit == "kv heads":
        return _scaled(kv_heads_of(config, tp, rank), config.head_dim)
    if unit == "ffn":
        return block(config.ffn, tp, rank)
    if unit == "vocabulary":
        return block(config.vocab, tp, rank)
    raise ValueError(f"unknown unit {unit!r}")


def _scaled(heads: slice, width: int) -> slice:
    return slice(heads.start * width, heads.stop * width)


def weight_table(config: ModelConfig) -> list[Weight]:
    """Every weight of the model, in the order in which the forward pass meets them."""
    D, V = config.hidden, config.vocab
    table = [Weight("model.embed_tokens.weight", None, "embedding", (V, D), 0, "vocabulary")]
    for layer in range(config.layers):
        table += _layer_weights(config, layer)
    table.append(Weight("model.norm.weight", None, "norm", (D,)))
    if not config.tied:
        table.append(Weight("lm_head.weight", None, "head", (V, D), 0, "vocabulary"))
    return table


def _layer_weights(config: ModelConfig, layer: int) -> Iterable[Weight]:
    D, F = config.hidden, config.ffn
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim

    def weight(name, field, shape, axis=None, unit=None):
        return Weight(f"model.layers.{layer}.{name}", layer, field, shape, axis, unit)

    yield weight("input_layernorm.weight", "attention_norm", (D,))
    for part, rows, unit in (("q", q, "query heads"), ("k", kv, "kv heads"), ("v", kv, "kv heads")):
        yield weight(f"self_attn.{part}_proj.weight", part, (rows, D), 0, unit)
        if config.qkv_bias:
            yield weight(f"self_attn.{part}_proj.bias", f"{part}_bias", (rows,), 0, unit)
    if config.qk_norm:
        yield weight("self_attn.q_norm.weight", "q_norm", (config.head_dim,))
        yield weight("self_attn.k_norm.weight", "k_norm", (config.head_dim,))
    yield weight("self_attn.o_proj.weight", "o", (D, q), 1, "query heads")
    if config.o_bias:
        yield weight("self_attn.o_proj.bias", "o_bias", (D,))
    yield weight("post_attention_layernorm.weight", "ffn_norm", (D,))
    for part in ("gate", "up"):
        yield weight(f"mlp.{part}_proj.weight", part, (F, D), 0, "ffn")
        if config.mlp_bias:
            yield weight(f"mlp.{part}_proj.bias", f"{part}_bias", (F,), 0, "ffn")
    yield weight("mlp.down_proj.weight", "down", (D, F), 1, "ffn")
    if config.mlp_bias:
        yield weight("mlp.down_proj.bias", "down_bias", (D,))


def uncovered(config: ModelConfig, tp: int) -> list[str]:
    """The names of weights of which some element lies on no rank: empty for a correct table.

    The slices of a weight are boxes that differ along one axis, so that covering the weight means
    covering that axis.
    """
    gaps = []
    for weight in weight_table(config):
        if weight.axis is None:
            continue
        cuts = [weight.slices(config, tp, rank)[weight.axis] for rank in range(tp)]
        reached = 0
        for cut in sorted(cuts, key=lambda cut: cut.start):
            if cut.start > reached:
                break
            reached = max(reached, cut.stop)
        if reached != weight.shape[weight.axis]:
            gaps.append(weight.name)
    return gaps
