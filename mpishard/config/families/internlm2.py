"""InternLM2 (arXiv 2403.17297): llama, with q, k and v in one tensor by key/value head."""

from __future__ import annotations

from mpishard.config.families.family import Family
from mpishard.config.stored_names import StoredNames

INTERNLM2 = Family(
    architecture="InternLM2ForCausalLM",
    name="internlm2",
    max_position_embeddings=2048,
    bos_id=1,
    eos_id=2,
    qkv_bias_field="bias",
    qkv_bias_default=True,
    stored_names=StoredNames(
        modules={
            "model.embed_tokens": "tok_embeddings",
            "input_layernorm": "attention_norm",
            "post_attention_layernorm": "ffn_norm",
            "self_attn.o_proj": "attention.wo",
            "mlp.gate_proj": "feed_forward.w1",
            "mlp.up_proj": "feed_forward.w3",
            "mlp.down_proj": "feed_forward.w2",
        },
        head="output",
        qkv="attention.wqkv",
        qkv_by_kv_head=True,
    ),
    ignored=frozenset({"auto_map"}),
)
