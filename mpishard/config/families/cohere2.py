"""Command R7B and Command A (Cohere 2024 and 2025): as Command R, but layers with a sliding window
are rotated, and the others have no positions."""

from __future__ import annotations

from mpishard.config.families.family import Family
from mpishard.config.model_config import LayerNormNames

COHERE2 = Family(
    architecture="Cohere2ForCausalLM",
    name="cohere2",
    spellings={"rms_norm_eps": ("layer_norm_eps",)},
    max_position_embeddings=8192,
    bos_id=5,
    eos_id=255001,
    norm_eps=1e-5,
    tied=True,
    sliding="all but every nth",
    nth=4,
    nth_field="sliding_window_pattern",
    needs_window=True,
    rope_interleaved_pairs=True,
    rope_layers="sliding",
    layer_norm=True,
    norms=LayerNormNames(ffn=None),
    parallel_residual=True,
    logit_scale=0.0625,
    # How its caches are kept, and the order of the layers once more.
    ignored=frozenset({"cache_implementation", "layer_switch", "order_of_interleaved_layers"}),
    fixed={
        "position_embedding_type": "rope_gptj",
        "rotary_pct": 1.0,
        "use_embedding_sharing": True,
        "use_gated_activation": True,
        "use_parallel_block": True,
        "use_parallel_embedding": True,
        "use_qk_norm": False,
    },
)
