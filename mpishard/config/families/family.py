"""What distinguishes one model family from another, as data.

The defaults of `Family` and `MoEFamily` are the llama decoder and the most common values, so that
the file of a family lists only what is particular to it. Each file gives the defaults of the
family's configuration class in transformers 5, which hold where ``config.json`` omits a field.
``docs/families.md`` is a table of all families, made from this data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mpishard.config.fields import Fields
from mpishard.config.model_config import ExpertNames, LayerNormNames
from mpishard.config.stored_names import StoredNames


@dataclass(frozen=True)
class MoEFamily:
    """How the ``config.json`` of a family describes its experts."""

    ffn: str = "moe_intermediate_size"  # the field that holds the width of an expert
    names: ExpertNames = ExpertNames()
    # Which layers are dense: "never", "by step" (decoder_sparse_step, mlp_only_layers), "the first"
    # (first_k_dense_replace), those that are not "interleaved" (interleave_moe_layer_step or
    # moe_layers), those "outside of a range" (moe_layer_start_index, _end_index and _interval), or
    # those "between sparse steps" (encoder_sparse_step and decoder_sparse_step).
    dense: str = "never"
    top_k: int | None = None  # always so many experts; None: a field says how many
    capacity: bool = False  # the field expert_capacity limits the tokens of a sequence
    first_dense: int = 0  # the default of first_k_dense_replace
    scoring: str = "softmax"  # or "sigmoid" or "sparsemixer"
    scale_inputs: bool = False  # the weights multiply the inputs of experts
    normalized: bool | None = None  # None: the field norm_topk_prob decides
    normalized_default: bool = False
    # The default of moe_norm_min, the least sum that weights are divided by; None: no such field.
    normalized_by_at_least: float | None = None
    # The field of the shared expert's width or, if shared_count is not 0, of the number of shared
    # experts: together they are one expert of so many times the width of a routed one.
    shared: str | None = None
    shared_count: int = 0  # the default of that number
    shared_default: int | None = None  # the default of that width; None: it is required
    # How experts are chosen: "top k", "noaux_tc", or "topk_method", the field that says so.
    choice: str = "top k"
    groups: tuple[int, int] = (8, 4)  # the defaults of n_group and topk_group
    scaling: float | None = None  # the default of routed_scaling_factor; None: no such field
    biases: bool = False  # on the router and on the experts
    clamped: bool = False  # the clamped activation of gpt_oss


@dataclass(frozen=True)
class Family:
    """What a family has that others have not. A bias of None is decided by its field.

    A layer is ``x + post_norm(sub_layer(norm(x)))`` twice, first with attention and then with a
    feed-forward network."""

    # How config.json names the family and its fields
    architecture: str  # as `architectures` spells it
    name: str  # as `model_type` spells it
    max_position_embeddings: int
    aliases: tuple[str, ...] = ()  # other spellings of `model_type`
    architecture_aliases: tuple[str, ...] = ()  # and of `architectures`
    # How the family spells fields that others have as well, the first one in transformers.
    spellings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # The family as the fields of one configuration have it, where they choose among forms.
    variant: Callable[[Fields], Family] | None = None
    forms: str = ""  # what `variant` decides, in words

    # Defaults of sizes, ids and of the epsilon
    kv_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden / heads
    heads_fill_hidden: bool = False  # head_dim must be hidden / heads
    bos_id: int | None = None
    eos_id: int | tuple[int, ...] | None = None
    norm_eps: float = 1e-6
    tied: bool = False

    # Attention: the projections
    qkv_bias: bool | None = None
    qkv_bias_field: str = "attention_bias"
    qkv_bias_default: bool = False
    o_bias: bool = True  # whether o_proj has a bias if q, k and v have one
    o_bias_field: str | None = None  # a field that decides it alone, with o_bias as its default
    clip_qkv: float | None = None  # the values at which q, k and v are cut off
    output_gate: bool = False  # what heads give is multiplied by the sigmoid of a projection
    mla: bool = False  # then attention_bias means the projections to the latents, and o_proj
    # An encoder of num_layers layers beside the decoder of num_decoder_layers.
    encoder: bool = False
    linear_attention: bool = False  # the layers that layer_types says are gated delta nets

    # Attention: norms of q and k
    qk_norm: bool | None = False  # of each head; None: the field use_qk_norm decides
    qk_norm_after_rope: bool = False
    per_head_norm: bool = False  # of each head, with a weight for each head
    full_width_qk_norm: bool = False  # of all heads together
    qk_l2_norm: bool = False  # of each head, without a weight, after rope (the field use_qk_norm)

    # Attention: the scores
    attention_scale: float | None = None  # their factor; None: head_dim ** -0.5
    query_pre_attn_scalar: int | None = None  # the default of this field; None: no such field
    inverse_layer_scale: bool = False  # the factor is divided by the number of the layer, from 1
    sinks: bool = False

    # Which keys a query sees. The sliding window is in use in these layers: "never", "everywhere",
    # "everywhere by a switch" (use_sliding_window), "from a layer" (max_window_layers) with that
    # switch or "from a layer without a switch", "alternating", the first layer included,
    # "alternating before a layer", "all but every nth", the nth being the first that is left out,
    # or "without rope by a switch".
    sliding: str = "never"
    window: int | None = 4096
    window_layers: int = 28  # the default of max_window_layers
    nth: int = 0  # the n of "every nth", or the default of the field nth_field
    nth_field: str | None = None
    needs_window: bool = False  # a null is refused, as transformers refuses it
    # Layers with rope attend within chunks: the default of attention_chunk_size.
    chunk: int | None = None

    # Positions are known by "rope", by a "learned" embedding, by "alibi", or by the same with
    # biases that are rounded, "alibi in bfloat16", or by "relative" biases.
    positions: str = "rope"
    position_offset: int = 0  # the row of position 0 in the learned embedding, and rows beside it

    # Rotary embedding
    theta: float = 10000.0
    rope: dict[str, Any] = field(default_factory=dict)  # the default of rope_scaling
    rope_types: dict[str, str] = field(default_factory=dict)  # another meaning of a rope_type
    original_positions: int | None = None  # the default of original_max_position_embeddings
    # Pairs of neighbours are rotated, not of halves; None: the field rope_interleave decides.
    rope_interleaved_pairs: bool | None = False
    # The part of each head that is rotated, the default of the field of this name; None: the whole
    # head, and there is no such field.
    partial_rotary_factor: float | None = None
    rotary_dim: bool = False  # the field rotary_dim may give the rotated elements instead
    # Rotated layers: "all", "no_rope_layers" (a field, or all but every nth of the field
    # no_rope_layer_interval), or "sliding": those with a window, or all if there is no window.
    rope_layers: str = "all"
    # Layers with a window have a rotary embedding without scaling, of this theta; None: all layers
    # have the same.
    sliding_theta: float | None = None
    sliding_theta_field: str | None = None
    query_scale: bool = False  # rope_parameters has a llama_4_scaling_beta
    temperature: bool = False  # layers without rope have growing queries (attn_temperature_tuning)
    # Longrope has a short_mscale and a long_mscale, and its short factors at all lengths: so
    # transformers 5.24 computes it for this family.
    rope_mscales: bool = False
    rope_alpha: bool = False  # the dynamic rope may have a fixed alpha, by which theta grows

    # Feed-forward
    mlp_bias: bool | None = False
    mlp_bias_field: str = "mlp_bias"
    mlp_bias_default: bool = False
    gated_mlp: bool = True  # activation(gate x) * up x, not activation(up x)
    ffn_field: str = "intermediate_size"  # the width of a dense layer, and its default
    ffn: int | None = None
    ffn_multiple: int | None = None  # of hidden_size, where intermediate_size is null or absent
    activation_field: str = "hidden_act"
    activation: str = "silu"
    # Another meaning of an activation's name.
    activation_meanings: dict[str, str] = field(default_factory=dict)
    moe: MoEFamily | None = None

    # Norms and the residual stream
    norms: LayerNormNames = LayerNormNames()  # which there are, before and after sub-layers
    norm_offset: float = 0.0  # added to their weights
    layer_norm: bool = False  # LayerNorm in place of RMSNorm
    norm_weight: bool = True
    norm_bias: bool = False
    embedding_norm: bool = False  # one more, of the embeddings
    parallel_residual: bool = False  # both sub-layers of a layer start from the same x

    # Factors and soft caps
    scaled_embedding: bool = False  # by sqrt(hidden_size)
    # The fields embedding_multiplier, residual_multiplier, attention_multiplier, logits_scaling.
    multipliers: bool = False
    logit_scale: float | None = None  # the default of this field; None: no such field
    caps: dict[str, float | None] = field(default_factory=dict)  # soft caps and their defaults
    head_bias: bool = False

    # Files, and what they may say
    stored_names: StoredNames = StoredNames()
    encoder_stored_names: StoredNames = StoredNames()
    encoder_moe_names: ExpertNames = ExpertNames()
    quantization: str | None = None  # the quant_method that its weights may have
    ignored: frozenset[str] = frozenset()  # fields that change nothing in this family
    # Fields that may only say what happens anyway, of a list in all its entries.
    fixed: dict[str, Any] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)  # fields that may only repeat another one
    # Fields that may be lists with an entry for each layer, which must all be the same.
    uniform: frozenset[str] = frozenset()
