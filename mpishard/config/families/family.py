"""What distinguishes one model family from another, as data.

The defaults of `Family` and `MoEFamily` are the most common values, so that the file of a family
lists only what is particular to it. Each file gives the defaults of the family's configuration
class in transformers 5, which hold where ``config.json`` omits a field.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mpishard.config.model_config import ExpertNames
from mpishard.config.stored_names import StoredNames


@dataclass(frozen=True)
class MoEFamily:
    """How the ``config.json`` of a family describes its experts."""

    ffn: str = "moe_intermediate_size"  # the field that holds the width of an expert
    names: ExpertNames = ExpertNames()
    # Which layers are dense: "never", "by step" (decoder_sparse_step, mlp_only_layers) or
    # "the first" (first_k_dense_replace).
    dense: str = "never"
    first_dense: int = 0  # the default of first_k_dense_replace
    scoring: str = "softmax"
    normalized: bool | None = None  # None: the field norm_topk_prob decides
    normalized_default: bool = False
    # The field of the shared expert's width or, if shared_count is not 0, of the number of shared
    # experts: together they are one expert of so many times the width of a routed one.
    shared: str | None = None
    shared_count: int = 0  # the default of that number
    # How experts are chosen: "top k", "noaux_tc", or "topk_method", the field that says so.
    choice: str = "top k"
    scaling: float | None = None  # the default of routed_scaling_factor; None: no such field
    biases: bool = False  # on the router and on the experts
    clamped: bool = False  # the clamped activation of gpt_oss


@dataclass(frozen=True)
class Family:
    """What a family has that others have not. A bias of None is decided by its field."""

    architecture: str  # as `architectures` spells it
    name: str  # as `model_type` spells it
    max_position_embeddings: int
    aliases: tuple[str, ...] = ()  # other spellings of `model_type`
    kv_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden / heads
    bos_id: int | None = None
    eos_id: int | None = None
    norm_eps: float = 1e-6
    tied: bool = False

    # Attention
    qkv_bias: bool | None = None
    qkv_bias_field: str = "attention_bias"
    qkv_bias_default: bool = False
    o_bias: bool = True  # whether o_proj has a bias if q, k and v have one
    qk_norm: bool = False
    full_width_qk_norm: bool = False
    sinks: bool = False
    mla: bool = False  # then attention_bias means the projections to the latents, and o_proj

    # The sliding window is in use in these layers: "never", "everywhere", "everywhere by a switch"
    # (use_sliding_window), "from a layer" (max_window_layers), "alternating", the first layer
    # included, or "alternating before a layer".
    sliding: str = "never"
    window: int | None = 4096
    needs_window: bool = False  # a null is refused, as transformers refuses it

    # Rotary embedding
    theta: float = 10000.0
    rope: dict[str, Any] = field(default_factory=dict)  # the default of rope_scaling
    rope_interleaved_pairs: bool | None = None  # None: the field rope_interleave decides

    # Feed-forward
    mlp_bias: bool | None = False
    gated_mlp: bool = True
    activation_field: str = "hidden_act"
    activation: str = "silu"
    moe: MoEFamily | None = None

    # Norms and scales of gemma2; a cap or scalar is the default of the field of its name, and None
    # where the family has no such field.
    norm_offset: float = 0.0
    post_norms: bool = False
    scaled_embedding: bool = False  # by sqrt(hidden_size)
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    query_pre_attn_scalar: int | None = None

    stored_names: StoredNames = StoredNames()
    quantization: str | None = None  # the quant_method that its weights may have
    ignored: frozenset[str] = frozenset()  # fields that change nothing in this family
