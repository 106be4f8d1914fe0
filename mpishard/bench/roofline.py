"""What a step asks of a rank, counted: arithmetic alone.

A step reads every weight of its rank once and multiplies it with every token, and so takes at least
as long as the slower of the two needs. Attention comes on top: the products of queries with the
keys that they see and of probabilities with values, and in generation the bytes of keys and values
that the step reads. What context parallelism, a divided cache or tensor parallelism leave to other
ranks is counted there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mpishard.arithmetic.attention import first_visible
from mpishard.config.model_config import ModelConfig
from mpishard.config.weight_sharding import WeightSharding
from mpishard.config.weight_specs import WeightSpec, specs_of_shard
from mpishard.model import Decoder


@dataclass(frozen=True)
class StepCost:
    """What a step asks of a rank: flops of the products with weights and of attention's, bytes of
    weights and of keys and values to be read."""

    product_flops: int
    attention_flops: int
    weight_bytes: int
    cache_bytes: int

    def seconds(self, bandwidth: float, rate: float) -> float:
        """What the step takes at least, attention left out."""
        return max(self.weight_bytes / bandwidth, self.product_flops / rate)

    def seconds_with_attention(self, bandwidth: float, rate: float) -> float:
        """What the step takes at least."""
        read = self.weight_bytes + self.cache_bytes
        return max(read / bandwidth, (self.product_flops + self.attention_flops) / rate)


def prefill_cost(model: Decoder, batch: int, tokens: int) -> StepCost:
    """What the step that feeds `batch` prompts of `tokens` tokens asks of this rank: its own tokens
    meet its weights, and its query heads the keys of all ranks."""
    config, division = model.config, model.sequence_sharding
    own_S = division.tokens(0, tokens)[division.cp_rank]
    wanted = int(np.count_nonzero(own_S == tokens - 1))
    seen = batch * visible_keys(config, own_S, np.arange(tokens))
    routed = routed_tokens(model, batch * tokens)
    return StepCost(
        product_flops=product_flops(*shard_of(model), batch * len(own_S), batch * wanted, routed),
        attention_flops=_flops_per_key(config, division.heads[division.kv_replica_rank]) * seen,
        weight_bytes=read_bytes(*shard_of(model), model.dtype.itemsize, routed),
        cache_bytes=0,
    )


def decode_cost(model: Decoder, batch: int, start: int, stop: int) -> StepCost:
    """What the mean of the steps that feed `batch` sequences one token each, at positions `start`
    to `stop` - 1 after a prompt, asks of this rank: the query heads of all ranks that divide a
    cache with it meet the keys that it keeps.

    Of context-parallel ranks one has the tokens of a step and the others wait, so each is counted
    as if it were its turn.
    """
    config, division = model.config, model.sequence_sharding
    own = [division.tokens(*part)[division.cp_rank] for part in ((0, start), (start, stop))]
    kept_T = np.concatenate([positions[division.cached_here(positions)] for positions in own])
    seen = batch * visible_keys(config, np.arange(start, stop), kept_T) // (stop - start)
    routed = routed_tokens(model, batch)
    key_and_value = model.kv_heads * config.kv_cache_dim * model.dtype.itemsize
    return StepCost(
        product_flops=product_flops(*shard_of(model), batch, batch, routed),
        attention_flops=_flops_per_key(config, sum(division.heads)) * seen,
        weight_bytes=read_bytes(*shard_of(model), model.dtype.itemsize, routed),
        cache_bytes=key_and_value * seen,
    )


def weight_bytes(config: ModelConfig, sharding: WeightSharding, index: int, itemsize: int) -> int:
    """Bytes of all weights of a rank, which has set `index` of those that `sharding` makes."""
    held = specs_of_shard(config, sharding, index)
    return itemsize * sum(math.prod(weight.shard_shape(config, sharding, index)) for weight in held)


def read_bytes(
    config: ModelConfig, sharding: WeightSharding, index: int, itemsize: int, tokens: int = 1
) -> int:
    """Bytes of the weights of a rank that a step reads: all but the embedding, of which it reads a
    few rows, unless the embedding is also the head; of an MoE layer, the experts that `tokens`
    tokens choose if all choices are equally likely."""
    read = 0.0
    for weight in specs_of_shard(config, sharding, index):
        if weight.field != "embedding" or config.tied:
            chosen = 1.0
            if config.moe and weight.expert is not None:
                share = tokens / _copies(sharding, weight)
                chosen -= (1 - config.moe.top_k / config.moe.num_experts) ** share
            read += chosen * math.prod(weight.shard_shape(config, sharding, index))
    return int(itemsize * read)


def product_flops(
    config: ModelConfig,
    sharding: WeightSharding,
    index: int,
    tokens: int,
    wanted: int,
    routed: int = 0,
) -> int:
    """Floating-point operations of a rank's products with weights in a step of `tokens` tokens,
    `wanted` of which go through the head, and of experts that divide `routed` tokens evenly."""
    head = "embedding" if config.tied else "head"
    flops = 0.0
    for weight in specs_of_shard(config, sharding, index):
        shape = weight.shard_shape(config, sharding, index)
        if config.moe and weight.expert is not None:
            share = config.moe.top_k / config.moe.num_experts / _copies(sharding, weight)
            flops += 2 * routed * share * math.prod(shape)
        elif weight.layer is not None and len(shape) == 2:
            flops += 2 * tokens * math.prod(shape)
        elif weight.field == head:
            flops += 2 * wanted * math.prod(shape)
    return int(flops)


def _copies(sharding: WeightSharding, weight: WeightSpec) -> int:
    """How many ranks share the tokens of an expert's weight."""
    assert weight.layer is not None and weight.expert is not None
    return sharding.replicas(weight.layer, weight.expert)


def visible_keys(config: ModelConfig, queries_S: np.ndarray, keys_T: np.ndarray) -> int:
    """The pairs of a query at one of the positions `queries_S` and a key at one of `keys_T`, both
    ascending, in which the query sees the key: those of all layers together."""
    earlier_S = np.searchsorted(keys_T, queries_S, side="right")
    pairs = 0
    for layer in range(config.layers):
        if config.is_linear(layer):
            continue
        first_S = first_visible(queries_S, config.windows[layer], config.chunks[layer])
        pairs += int((earlier_S - np.searchsorted(keys_T, first_S)).sum())
    return pairs


def shard_of(model: Decoder) -> tuple[ModelConfig, WeightSharding, int]:
    """What the counts of a rank's weights depend on."""
    return model.config, model.mesh.weight_sharding, model.mesh.shard_index


def routed_tokens(model: Decoder, tokens: int) -> int:
    """The tokens that the ranks which divide the experts have, where each replica has `tokens`."""
    return model.mesh.layout.replicas_per_ep_group * tokens


def _flops_per_key(config: ModelConfig, heads: int) -> int:
    """Of a query's product with a key and of the probability's with the value, in `heads` heads."""
    return 2 * heads * (config.key_width + config.value_width)
