"""Picture of a rank's memory against the length of the context, for some layouts of one model."""

from __future__ import annotations

import math

from svg import Picture

from mpishard.config.layout import Layout, kv_heads_of, weight_sharding_of
from mpishard.config.reader import read_model_config
from mpishard.config.weight_specs import specs_of_shard
from mpishard.model import sequence_sharding_of

LLAMA_3_8B = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"},
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    **{"max_position_embeddings": 8192, "rms_norm_eps": 1e-5},
    **{"bos_token_id": 128000, "eos_token_id": 128001},
}
ITEMSIZE = 4  # float32
LAYOUTS = (
    (Layout(), "one rank", ""),
    (Layout(cp=16), "--cp 16", "c2"),
    (Layout(tp=16), "--tp 16", "c0"),
    (Layout(tp=16, flash_decoding=True), "--tp 16 --flash-decoding", "c1"),
    (Layout(tp=4, cp=4), "--tp 4 --cp 4", "c3"),
)
POWERS, GIB = range(10, 23), range(0, 11)  # of two, on the axes
LEFT, RIGHT, TOP, BOTTOM, LABEL = 72, 660, 96, 520, 40


def memory_vs_context() -> Picture:
    """Weights and cache, in closed form."""
    picture = Picture(
        *(900, 590, "Memory of a rank against the length of the context, Llama 3 8B on 16 ranks"),
        "Weights and KV cache of one sequence. Tensor parallelism divides both, until every rank "
        "has one key/value head; flash decoding and context parallelism also divide the positions. "
        "Context parallelism alone keeps all weights on every rank.",
    )
    facts = "Llama 3 8B in float32 on 16 ranks; both axes are logarithmic"
    picture.text(20, 26, "Memory of a rank: weights and KV cache of one sequence", "heading")
    picture.text(20, 49, facts, "small soft")
    for power in GIB:
        picture.path([(LEFT, _y(2**power)), (RIGHT, _y(2**power))], "grid")
        picture.text(LEFT - 8, _y(2**power) + 5, 2**power, "small soft", "end")
    for power in POWERS[::2]:
        short = f"{2**power >> 20} Mi" if power >= 20 else f"{2**power >> 10} Ki"
        picture.path([(_x(power), TOP), (_x(power), BOTTOM)], "grid")
        picture.text(_x(power), BOTTOM + 20, short, "small soft", "middle")
    picture.text(LEFT - 8, TOP - 16, "GiB", "small", "end")
    picture.text((LEFT + RIGHT) / 2, BOTTOM + 46, "context length, tokens", "small", "middle")
    ends = []
    for layout, name, style in LAYOUTS:
        gib = [_bytes(layout, 2**power) / 2**30 for power in POWERS]
        points = list(zip(map(_x, POWERS), map(_y, gib), strict=True))
        picture.path(points, f"curve {style}")
        ends.append((points[-1][1], name, style, f"{gib[0]:.1f} to {gib[-1]:,.1f} GiB"))
    below = math.inf
    for y, name, style, figures in sorted(ends, reverse=True):
        below = min(y, below - LABEL)  # no label on another
        picture.path([(RIGHT + 12, below), (RIGHT + 32, below)], f"curve {style}")
        picture.text(RIGHT + 40, below + 4, name, "small strong")
        picture.text(RIGHT + 40, below + 20, figures, "small soft")
    return picture


def _bytes(layout: Layout, length: int) -> int:
    """Bytes that rank 0 of `layout` holds with one sequence of `length`."""
    config = read_model_config(LLAMA_3_8B, None, "config.json")
    shards = weight_sharding_of(config, layout)
    sharding = sequence_sharding_of(config, layout, 0, 0)
    specs = specs_of_shard(config, shards, 0)
    weights = sum(math.prod(spec.shard_shape(config, shards, 0)) for spec in specs)
    heads, tokens = kv_heads_of(config, layout.tp, 0), sharding.tokens(0, length)[0]
    cache = config.layers * (heads.stop - heads.start) * config.kv_cache_dim
    return ITEMSIZE * (weights + cache * len(tokens[sharding.cached_here(tokens)]))


def _x(power: float) -> float:
    return LEFT + (power - POWERS[0]) / (POWERS[-1] - POWERS[0]) * (RIGHT - LEFT)


def _y(gib: float) -> float:
    return BOTTOM - (math.log2(gib) - GIB[0]) / (GIB[-1] - GIB[0]) * (BOTTOM - TOP)
