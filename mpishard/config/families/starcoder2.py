"""StarCoder2 (arXiv 2402.19173): Mistral's attention, with LayerNorm and a plain feed-forward
network."""

from __future__ import annotations

from mpishard.config.families.family import Family
from mpishard.config.stored_names import StoredNames

STARCODER2 = Family(
    architecture="Starcoder2ForCausalLM",
    name="starcoder2",
    spellings={"rms_norm_eps": ("norm_epsilon",)},
    max_position_embeddings=4096,
    kv_heads=2,
    bos_id=50256,
    eos_id=50256,
    norm_eps=1e-5,
    tied=True,
    qkv_bias_field="use_bias",
    qkv_bias_default=True,
    sliding="everywhere",
    window=None,
    mlp_bias=None,
    mlp_bias_field="use_bias",
    mlp_bias_default=True,
    gated_mlp=False,
    activation="gelu_pytorch_tanh",
    layer_norm=True,
    norm_bias=True,
    stored_names=StoredNames(
        modules={"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"},
    ),
    ignored=frozenset({"embedding_dropout", "residual_dropout"}),
    fixed={"mlp_type": "default"},
)
