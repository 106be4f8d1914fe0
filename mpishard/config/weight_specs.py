"""The one table of the weights: their names, shapes, and how they are sharded.

Each row names a tensor of the checkpoint, its whole shape and how ranks share it. The converter,
the loader, the verifier and the tests read this table. No layer of the model slices a weight.

============================  ==============  ====================================================
weights                       whole shape     a rank has
============================  ==============  ====================================================
embedding, lm_head, its bias  (V, D)          rows: a block of the vocabulary
embedding of positions        (rows, D)       rows: a block
q_proj, its bias              (H*K, D)        rows: its query heads
k_proj, v_proj, their biases  (G*K, D)        rows: its key/value heads
o_proj                        (D, H*K)        columns: its query heads
sinks                         (H,)            its query heads
q_norm, k_norm over all       (H*K,), (G*K,)  its query or key/value heads
heads together
q_norm, k_norm with a weight  (H, K), (G, K)  its query or key/value heads
for each head
gate_proj, up_proj, biases,   (F, D)          rows: a block of the feed-forward width
also of a shared expert
down_proj, the same           (D, F)          columns: a block of the feed-forward width
experts                       as gate_proj …  nothing of experts of other ranks, and a block of the
                                              width of its own
norms, routers, biases of     (D,) or (K,) …  everything; for biases of an expert's down_proj, if it
norms, o_proj and down_proj                   has the expert
============================  ==============  ====================================================

Biases of relative positions are small, and whole on every rank. Attention to an encoder's outputs
is sharded like attention.

Linear attention is sharded like attention: by value heads, as by query heads, and by the key heads
that these use, as by key/value heads.

Multi-head latent attention has projections to latents, which every rank has with their norms, and
projections from latents to heads, of which a rank has the rows of its query heads.

Sharding the outputs (rows here) is column parallelism in Megatron-LM, whose products are ``x @ A``;
sharding the inputs (columns here) is its row parallelism (Shoeybi et al. 2019, arXiv 1909.08053).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mpishard.config.layout import block, kv_heads_of, query_heads_of
from mpishard.config.layout_checks import check_expert_parallel, check_tensor_parallel
from mpishard.config.model_config import (
    LinearAttentionConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    PerExpertNames,
)
from mpishard.config.weight_sharding import WeightSharding
from mpishard.errors import UserError


def local_experts(experts: int, sharding: WeightSharding, index: int) -> slice:
    """The block of experts in shard `index`, out of this number of `experts`."""
    return block(experts, sharding.ep, sharding.ep_rank(index))


def experts_by_ep_rank(
    experts: int, sharding: WeightSharding, layer: int
) -> Sequence[Sequence[int]]:
    """The experts of a layer that each expert-parallel rank has, out of this number."""
    if sharding.placement is not None:
        return sharding.placement.layers[layer]
    return [range(experts)[block(experts, sharding.ep, rank)] for rank in range(sharding.ep)]


def check_weight_sharding(config: ModelConfig, sharding: WeightSharding) -> None:
    """Refuse a sharding that leaves a rank without a query head or an expert, or whose numbers do
    not fit each other (UserError)."""
    for flag, value in (("--tp", sharding.tp), ("--ep", sharding.ep)):
        if value < 1:
            raise UserError(f"{flag} {value} must be at least 1")
    check_tensor_parallel(config, sharding.tp)
    if config.moe is None and (sharding.ep > 1 or sharding.ranks != sharding.tp):
        raise UserError(
            f"{sharding} divides experts, but a {config.family} model with this config.json has "
            f"none: use --tp {sharding.tp} alone"
        )
    if config.moe is not None:
        check_expert_parallel(config.moe, sharding.ep)
    if sharding.ranks < 1 or sharding.ranks % sharding.tp or sharding.ranks % sharding.ep:
        raise UserError(
            f"weights cannot be cut into {sharding.ranks} parts for --tp {sharding.tp} "
            f"--ep {sharding.ep}: the number must be a multiple of both, "
            f"as {WeightSharding(sharding.tp, sharding.ep).ranks} is"
        )


@dataclass(frozen=True)
class WeightSpec:
    """One tensor of the checkpoint.

    `name` is its Hugging Face name. `field` is its name in decoder layer `layer`, or in the model
    if `layer` is None. `expert` is the number of its expert; None means a weight that every token
    meets, which is the shared expert's in a layer with experts. It is sharded along `axis` by the
    unit `split_by`; both are None for a weight that every rank has whole. A `keep_fp32` weight is
    stored in float32, whatever the dtype of the others. A weight `of_encoder` has the name that it
    would have in a model of its own, with ``model.encoder.`` for ``model.``."""

    name: str
    layer: int | None
    field: str
    shape: tuple[int, ...]
    axis: int | None = None
    # "query heads", "kv heads", "value heads" or "key heads" of linear attention, "ffn",
    # "vocabulary", "positions" or "expert ffn"
    split_by: str | None = None
    expert: int | None = None
    keep_fp32: bool = False
    of_encoder: bool = False  # `layer` is the encoder's

    def is_held(self, config: ModelConfig, sharding: WeightSharding, index: int) -> bool:
        """Whether shard `index` has a part of it. Only experts are not in every shard."""
        if self.expert is None or config.moe is None:
            return True
        if sharding.placement is not None and self.layer is not None:
            return self.expert in sharding.placement.layers[self.layer][sharding.ep_rank(index)]
        own = local_experts(config.moe.num_experts, sharding, index)
        return own.start <= self.expert < own.stop

    def slices(
        self, config: ModelConfig, sharding: WeightSharding, index: int
    ) -> tuple[slice, ...]:
        """The part in shard `index`, one slice for each axis. It must be held there."""
        whole = tuple(slice(0, length) for length in self.shape)
        if self.axis is None:
            return whole
        bounds = _bounds(config, self.split_by, self.shape[self.axis], sharding, index)
        return whole[: self.axis] + (bounds,) + whole[self.axis + 1 :]

    def shard_shape(
        self, config: ModelConfig, sharding: WeightSharding, index: int
    ) -> tuple[int, ...]:
        """The shape of the part in shard `index`. It must be held there."""
        return tuple(part.stop - part.start for part in self.slices(config, sharding, index))


def _bounds(
    config: ModelConfig, split_by: str | None, length: int, sharding: WeightSharding, index: int
) -> slice:
    tp, rank = sharding.tp, sharding.tp_rank(index)
    if split_by == "query heads":
        return _scaled(query_heads_of(config, tp, rank), length // config.heads)
    if split_by == "kv heads":
        return _scaled(kv_heads_of(config, tp, rank), length // config.kv_heads)
    if config.linear_attention and split_by in ("value heads", "key heads"):
        heads = config.linear_attention
        if split_by == "value heads":
            return _scaled(query_heads_of(heads, tp, rank), length // heads.heads)
        return _scaled(kv_heads_of(heads, tp, rank), length // heads.kv_heads)
    if split_by in ("ffn", "vocabulary", "positions"):
        return block(length, tp, rank)
    if split_by == "expert ffn":
        return block(length, sharding.etp, sharding.etp_rank(index))
    raise ValueError(f"unknown unit {split_by!r}")


def _scaled(heads: slice, width: int) -> slice:
    return slice(heads.start * width, heads.stop * width)


def specs_of_shard(config: ModelConfig, sharding: WeightSharding, index: int) -> list[WeightSpec]:
    """The weights that shard `index` has a part of, in the order of `weight_specs`."""
    return [weight for weight in weight_specs(config) if weight.is_held(config, sharding, index)]


def weight_specs(config: ModelConfig) -> list[WeightSpec]:
    """Every weight of the model, in the order of the forward pass."""
    D, V = config.hidden, config.vocab
    table = [WeightSpec("model.embed_tokens.weight", None, "embedding", (V, D), 0, "vocabulary")]
    if config.learned_positions:
        rows = (config.learned_positions, D)
        table.append(
            WeightSpec("model.embed_positions.weight", None, "positions", rows, 0, "positions")
        )
    if config.encoder is not None:
        table += [
            replace(weight, name=name_of_encoder(weight.name), of_encoder=True)
            for weight in weight_specs(config.encoder)
            if weight.field != "embedding"
        ]
    if config.embedding_norm:
        table += _norm(config, "model.embed_norm", "embedding_norm", (D,))
    if config.relative_bias:
        shape = (config.relative_bias.buckets, config.heads)
        table.append(WeightSpec("model.relative_bias.weight", None, "relative_bias", shape))
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}."
        table += [
            replace(weight, name=prefix + weight.name, layer=layer)
            for weight in _layer_weights(config, layer)
        ]
    table += _norm(config, "model.norm", "norm", (D,))
    if not config.tied:
        table.append(WeightSpec("lm_head.weight", None, "head", (V, D), 0, "vocabulary"))
    if config.head_bias:
        table.append(WeightSpec("lm_head.bias", None, "head_bias", (V,), 0, "vocabulary"))
    return table


def name_of_encoder(name: str) -> str:
    """The name that an encoder's weight has in the whole model; the embedding is shared."""
    if name == "model.embed_tokens.weight":
        return name
    return f"model.encoder.{name.removeprefix('model.')}"


def _layer_weights(config: ModelConfig, layer: int) -> Iterator[WeightSpec]:
    """The weights of a layer, with their names within it."""
    D, names = config.hidden, config.norms
    yield from _norm(config, names.attention, "attention_norm", (D,))
    if config.linear_attention and config.linear_attention.layers[layer]:
        yield from _linear_attention(D, config.linear_attention)
    else:
        yield from _mla(config, config.mla) if config.mla else _attention(config)
    yield from _norm(config, names.attention_post, "attention_post_norm", (D,))
    if config.encoder is not None:
        yield from _norm(config, names.cross, "cross_norm", (D,))
        yield from _cross_attention(config)
    yield from _norm(config, names.ffn, "ffn_norm", (D,))
    yield from _norm(config, names.ffn_post, "ffn_post_norm", (D,))
    if config.moe and config.moe.layers[layer]:
        yield from _moe(config, config.moe)
    else:
        yield from _feed_forward("mlp", D, config.ffn, config.mlp_bias, config.gated_mlp)


def _norm(
    config: ModelConfig, name: str | None, field: str, shape: tuple[int, ...]
) -> Iterator[WeightSpec]:
    """The norm called `name`, if the family has it."""
    if name is not None and config.norm_weight:
        yield _weight(f"{name}.weight", field, shape)
    if name is not None and config.norm_bias:
        yield _weight(f"{name}.bias", f"{field}_bias", shape)


def _weight(
    name: str | None,
    field: str,
    shape: tuple[int, ...],
    axis: int | None = None,
    split_by: str | None = None,
    expert: int | None = None,
) -> WeightSpec:
    assert name is not None, f"a family whose layers have {field} has a name for it"
    return WeightSpec(name, None, field, shape, axis, split_by, expert)


def _attention(config: ModelConfig) -> Iterator[WeightSpec]:
    D, K = config.hidden, config.head_dim
    q, kv = config.heads * K, config.kv_heads * K
    for part, rows, split_by in (
        ("q", q, "query heads"),
        ("k", kv, "kv heads"),
        ("v", kv, "kv heads"),
    ):
        yield _weight(f"self_attn.{part}_proj.weight", part, (rows, D), 0, split_by)
        if config.qkv_bias:
            yield _weight(f"self_attn.{part}_proj.bias", f"{part}_bias", (rows,), 0, split_by)
    if config.output_gate:
        yield _weight("self_attn.gate_proj.weight", "o_gate", (q, D), 0, "query heads")
        if config.qkv_bias:
            yield _weight("self_attn.gate_proj.bias", "o_gate_bias", (q,), 0, "query heads")
    if config.qk_norm:
        yield from _norm(config, "self_attn.q_norm", "q_norm", (K,))
        yield from _norm(config, "self_attn.k_norm", "k_norm", (K,))
    if config.per_head_norm:
        heads, kv_heads = config.heads, config.kv_heads
        yield _weight("self_attn.q_norm.weight", "q_norm", (heads, K), 0, "query heads")
        yield _weight("self_attn.k_norm.weight", "k_norm", (kv_heads, K), 0, "kv heads")
    if config.full_width_qk_norm:
        yield _weight("self_attn.q_norm.weight", "q_norm", (q,), 0, "query heads")
        yield _weight("self_attn.k_norm.weight", "k_norm", (kv,), 0, "kv heads")
    if config.sinks:
        yield _weight("self_attn.sinks", "sinks", (config.heads,), 0, "query heads")
    yield from _output(config, q)


def _cross_attention(config: ModelConfig) -> Iterator[WeightSpec]:
    """Attention to the encoder's outputs."""
    D, q, kv = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim
    yield _weight("cross_attn.q_proj.weight", "cross_q", (q, D), 0, "query heads")
    yield _weight("cross_attn.k_proj.weight", "cross_k", (kv, D), 0, "kv heads")
    yield _weight("cross_attn.v_proj.weight", "cross_v", (kv, D), 0, "kv heads")
    yield _weight("cross_attn.o_proj.weight", "cross_o", (D, q), 1, "query heads")


def _linear_attention(D: int, linear: LinearAttentionConfig) -> Iterator[WeightSpec]:
    keys, values = linear.kv_heads * linear.key_width, linear.heads * linear.value_width
    of_heads = ("q", keys, "key heads"), ("k", keys, "key heads"), ("v", values, "value heads")
    for part, rows, split_by in of_heads:
        yield _weight(f"linear_attn.{part}_proj.weight", part, (rows, D), 0, split_by)
        taps = (rows, 1, linear.taps)
        yield _weight(f"linear_attn.{part}_conv1d.weight", f"{part}_taps", taps, 0, split_by)
    yield _weight("linear_attn.z_proj.weight", "o_gate", (values, D), 0, "value heads")
    for name, field in (("b_proj", "rate"), ("a_proj", "decay")):
        yield _weight(f"linear_attn.{name}.weight", field, (linear.heads, D), 0, "value heads")
    for name, field in (("dt_bias", "dt_bias"), ("A_log", "log_a")):
        yield _weight(f"linear_attn.{name}", field, (linear.heads,), 0, "value heads")
    yield _weight("linear_attn.norm.weight", "o_norm", (linear.value_width,))
    yield _weight("linear_attn.out_proj.weight", "o", (D, values), 1, "value heads")


def _mla(config: ModelConfig, mla: MLAConfig) -> Iterator[WeightSpec]:
    D, q = config.hidden, config.heads * config.head_dim
    if mla.q_lora_rank is None:
        yield _weight("self_attn.q_proj.weight", "q", (q, D), 0, "query heads")
    else:
        yield from _latent("q_a_proj", "q_a", mla.q_lora_rank, D, mla.bias)
        yield _weight("self_attn.q_a_layernorm.weight", "q_a_norm", (mla.q_lora_rank,))
        yield _weight("self_attn.q_b_proj.weight", "q_b", (q, mla.q_lora_rank), 0, "query heads")
    latent = mla.kv_lora_rank + mla.qk_rope_head_dim  # one product makes the rotated key, too
    yield from _latent("kv_a_proj_with_mqa", "kv_a", latent, D, mla.bias)
    yield _weight("self_attn.kv_a_layernorm.weight", "kv_a_norm", (mla.kv_lora_rank,))
    kv = config.heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    yield _weight("self_attn.kv_b_proj.weight", "kv_b", (kv, mla.kv_lora_rank), 0, "query heads")
    yield from _output(config, config.heads * mla.v_head_dim)


def _latent(name: str, field: str, rows: int, D: int, bias: bool) -> Iterator[WeightSpec]:
    yield _weight(f"self_attn.{name}.weight", field, (rows, D))
    if bias:
        yield _weight(f"self_attn.{name}.bias", f"{field}_bias", (rows,))


def _output(config: ModelConfig, columns: int) -> Iterator[WeightSpec]:
    yield _weight("self_attn.o_proj.weight", "o", (config.hidden, columns), 1, "query heads")
    if config.o_bias:
        yield _weight("self_attn.o_proj.bias", "o_bias", (config.hidden,))


def _feed_forward(
    name: str | None, D: int, F: int, bias: bool, gated: bool = True
) -> Iterator[WeightSpec]:
    """A feed-forward network: of a dense layer, or a shared expert."""
    for part in ("gate", "up") if gated else ("up",):
        yield _weight(f"{name}.{part}_proj.weight", part, (F, D), 0, "ffn")
        if bias:
            yield _weight(f"{name}.{part}_proj.bias", f"{part}_bias", (F,), 0, "ffn")
    yield _weight(f"{name}.down_proj.weight", "down", (D, F), 1, "ffn")
    if bias:
        yield _weight(f"{name}.down_proj.bias", "down_bias", (D,))


def _moe(config: ModelConfig, moe: MoEConfig) -> Iterator[WeightSpec]:
    D, E, names = config.hidden, moe.num_experts, moe.names
    yield _weight(per_expert_names(moe).router, "router", (E, D))
    if moe.router_bias:
        yield _weight(names.stacked.router_bias, "router_bias", (E,))
    if moe.e_score_correction_bias:
        # It is added to the scores for the choice of experts, which rounding could change.
        yield replace(
            _weight(names.e_score_correction_bias, "e_score_correction_bias", (E,)), keep_fp32=True
        )
    if moe.shared_expert_intermediate_size:
        yield from _feed_forward(
            names.shared, D, moe.shared_expert_intermediate_size, config.mlp_bias
        )
    if moe.shared_gate:
        yield _weight(names.shared_gate, "shared_gate", (1, D))
    for expert in range(E):
        yield from _expert(moe, D, expert, config.gated_mlp)


def _expert(moe: MoEConfig, D: int, expert: int, gated: bool) -> Iterator[WeightSpec]:
    F, names = moe.moe_intermediate_size, per_expert_names(moe)
    inputs = (("gate", names.gate), ("up", names.up)) if gated else (("up", names.up),)
    for part, name in inputs:
        name = name.format(expert)
        yield _weight(name, part, (F, D), 0, "expert ffn", expert)
        if moe.expert_bias:
            yield _weight(_bias(name), f"{part}_bias", (F,), 0, "expert ffn", expert)
    name = names.down.format(expert)
    yield _weight(name, "down", (D, F), 1, "expert ffn", expert)
    if moe.expert_bias:
        yield _weight(_bias(name), "down_bias", (D,), expert=expert)


def per_expert_names(moe: MoEConfig) -> PerExpertNames:
    """The names of the tensors of each expert in this table, also for a family that stores all
    experts in one tensor."""
    return moe.names.separate or PerExpertNames(router=moe.names.stacked.router)


def _bias(name: str) -> str:
    return f"{name.removesuffix('.weight')}.bias"


def missing_weights(config: ModelConfig, sharding: WeightSharding) -> list[str]:
    """The names of weights with an element on no rank: empty for a correct table."""
    # Whether a weight is covered does not depend on its layer, and there may be many layers.
    known: dict[WeightSpec, bool] = {}
    gaps = []
    for weight in weight_specs(config):
        kind = replace(weight, name="", layer=None)
        if kind not in known:
            known[kind] = _is_covered(weight, config, sharding)
        if not known[kind]:
            gaps.append(weight.name)
    return gaps


def _is_covered(weight: WeightSpec, config: ModelConfig, sharding: WeightSharding) -> bool:
    """Whether every element of a weight is on some rank. The parts differ along one axis only, so
    it is enough that they cover this axis."""
    boxes = [
        weight.slices(config, sharding, index)
        for index in range(sharding.ranks)
        if weight.is_held(config, sharding, index)
    ]
    if weight.axis is None:
        return boxes != []
    reached = 0
    for part in sorted((box[weight.axis] for box in boxes), key=lambda part: part.start):
        if part.start > reached:
            break
        reached = max(reached, part.stop)
    return reached == weight.shape[weight.axis]
