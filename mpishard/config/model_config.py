"""The configuration of a model: everything that its mathematics depends on.

`mpishard.config.reader` makes it from a Hugging Face ``config.json``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mpishard.config.quantization.scheme import Quantization
from mpishard.config.stored_names import StoredNames

# No sequence has more positions. Products of positions with sizes then fit into 64 bits.
MAX_POSITIONS = 2**31 - 1


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a layer (RoFormer, arXiv 2104.09864). A kind ignores the fields that
    it does not use.

    `original_positions` is the length that the model was trained on: for "llama3", "yarn" and
    "longrope" a field of their own, otherwise `max_position_embeddings`. "dynamic" and "longrope"
    change the frequencies of longer sequences only: "dynamic" with every position more, "longrope"
    once, from `short_factors` to `long_factors`; "ntk_alpha" is a dynamic one that is stretched by
    `factor` at all lengths. "yarn" is arXiv 2309.00071, "longrope" arXiv 2402.13753. A layer whose
    kind is "none" rotates nothing (NoPE, arXiv 2305.19466).

    A query at position p is multiplied by ``1 + query_scale_beta * ln(1 + floor((p +
    query_scale_offset) / original_positions))``, as Ministral 3 and Llama 4 have it.
    """

    # "default", "linear", "dynamic", "ntk_alpha", "llama3", "yarn", "longrope" or "none"
    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: yarn's rule, from factor and the mscales
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factors: tuple[float, ...] = ()  # by which each pair's frequency is divided
    long_factors: tuple[float, ...] = ()
    # Instead of the attention factor, in sequences up to the original length and in longer ones.
    mscales: tuple[float, float] | None = None
    query_scale_beta: float = 0.0
    query_scale_offset: int = 0

    def frequency_length(self, length: int) -> int:
        """The number of positions that the frequencies of a sequence of `length` positions depend
        on: 0 as long as they are those of a short one."""
        if self.kind not in ("dynamic", "longrope") or length <= self.original_positions:
            return 0
        return length if self.kind == "dynamic" else self.original_positions + 1


NO_ROPE = Rope("none")


@dataclass(frozen=True)
class LayerNormNames:
    """The names of the norms of a layer, which follow ``model.layers.N.``; None where the family
    has no such norm. A layer is ``x + post_norm(sub_layer(norm(x)))`` twice, or three times in a
    decoder that has an encoder."""

    attention: str | None = "input_layernorm"
    attention_post: str | None = None
    ffn: str | None = "post_attention_layernorm"
    ffn_post: str | None = None
    cross: str | None = None  # before the attention over what an encoder made


@dataclass(frozen=True)
class PerExpertNames:
    """The names of the tensors of a layer with experts, if each expert has tensors of its own, as
    in most checkpoints. A name follows ``model.layers.N.``, and ``{}`` is the expert's number."""

    router: str = "mlp.gate.weight"  # (E, D)
    gate: str = "mlp.experts.{}.gate_proj.weight"  # (F, D)
    up: str = "mlp.experts.{}.up_proj.weight"  # (F, D)
    down: str = "mlp.experts.{}.down_proj.weight"  # (D, F)


@dataclass(frozen=True)
class StackedNames:
    """The names of the tensors of a layer with experts, if one tensor holds all experts. A name
    follows ``model.layers.N.``; a bias that the family does not have is None."""

    router: str = "mlp.gate.weight"  # (E, D)
    gate_up: str = "mlp.experts.gate_up_proj"  # (E, 2 F, D): the rows of gate, then those of up
    down: str = "mlp.experts.down_proj"  # (E, D, F)
    router_bias: str | None = None  # (E,)
    gate_up_bias: str | None = None  # (E, 2 F), laid out as gate_up
    down_bias: str | None = None  # (E, D)
    e_score_correction_bias: str | None = None  # (E,); None: as in the other form
    transposed: bool = False  # gate_up is (E, D, 2 F) and down (E, F, D)
    alternating: bool = False  # the outputs of gate and up alternate


@dataclass(frozen=True)
class ExpertNames:
    """The names that a family gives to the tensors of a layer with experts. A checkpoint has the
    names of either `separate` or `stacked`; the other fields hold for both, and are None if the
    family has no such tensor. Names follow ``model.layers.N.``."""

    separate: PerExpertNames | None = PerExpertNames()
    stacked: StackedNames = StackedNames()
    e_score_correction_bias: str | None = None  # (E,), float32 whatever the other weights are
    e_score_correction_bias_is_matrix: bool = False  # it is stored as (1, E)
    shared: str | None = None  # followed by .gate_proj.weight (F, D) …, as the mlp of a dense layer
    shared_gate: str | None = None  # (1, D)


@dataclass(frozen=True)
class MoEConfig:
    """The mixture of experts (MoE) that replaces the feed-forward network in some layers.

    The router scores every expert and chooses `top_k` of them. Their outputs are summed with
    weights: the scores of the chosen experts, divided by their sum if `norm_topk_prob`, times
    `routed_scaling_factor`. The softmax of gpt_oss over the chosen experts alone equals a
    normalized softmax over all."""

    num_experts: int  # E
    top_k: int  # A, experts per token
    moe_intermediate_size: int  # F of one expert
    layers: tuple[bool, ...]  # whether each layer has experts; other layers are dense
    # "softmax" over all experts, "sigmoid" of each, or "sparsemixer": of two, each by a softmax
    # over the experts whose scores lie less than twice `jitter` below its own, relatively.
    scoring: str
    norm_topk_prob: bool
    names: ExpertNames
    norm_min: float = 0.0  # the least sum that weights are divided by
    jitter: float = 0.0
    routed_scaling_factor: float = 1.0
    e_score_correction_bias: bool = False  # added to the scores for the choice, not to the weights
    n_group: int = 1  # the experts form this number of groups of consecutive experts …
    topk_group: int = 1  # … and a token chooses from this number of groups, the best
    group_score: str = "max"  # of a group: the "max" of its scores, or the "top-2 sum"
    # F of the shared expert, to which every token goes; 0: there is none.
    shared_expert_intermediate_size: int = 0
    shared_gate: bool = False  # the shared expert's output is multiplied by sigmoid(x @ gate)
    scale_inputs: bool = False  # the weights multiply the inputs of experts, not their outputs
    router_bias: bool = False
    expert_bias: bool = False  # on all three projections of an expert
    # The clamped activation (up + 1) gate sigmoid(alpha gate), with gate clamped to at most limit
    # and up to ±limit; None: the model's activation(gate) up.
    alpha: float | None = None
    limit: float | None = None
    # Of the tokens of a sequence the first so many that choose an expert are given to it, and later
    # ones to none (Switch Transformers, arXiv 2101.03961); None: all are.
    capacity: int | None = None


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434). The keys and values of all heads
    are projections of one latent vector per position. The cache holds this latent and one rotated
    key, which all heads share.

    A query or key has `qk_nope_head_dim` elements without position, followed by
    `qk_rope_head_dim` rotated elements. If yarn has an mscale_all_dim, the scores are also
    multiplied by the square of 0.1 mscale_all_dim ln(factor) + 1."""

    q_lora_rank: int | None  # width of the latent of the queries; None: a direct projection
    kv_lora_rank: int  # width of the latent of keys and values
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int  # width of a head's value
    bias: bool  # on the projections to the latents
    interleaved: bool  # rope rotates pairs of neighbours, not pairs of the two halves
    norm_eps: float = 1e-6  # of the norms of the latents, independent of the model's


@dataclass(frozen=True)
class LinearAttentionConfig:
    """The layers whose attention is a gated delta net (arXiv 2412.06464). In place of keys and
    values they keep one matrix of `key_width` x `value_width` numbers for each value head.

    The heads are divided over ranks as those of attention are: value heads as query heads, and the
    key heads that they share, each with its queries, as key/value heads."""

    layers: tuple[bool, ...]  # whether each layer has it
    heads: int  # H, value heads
    kv_heads: int  # G, key heads
    key_width: int  # K
    value_width: int  # Y
    taps: int  # of the convolution of queries, keys and values over positions

    @property
    def channels(self) -> int:
        """The channels of the convolution, of all heads."""
        return 2 * self.kv_heads * self.key_width + self.heads * self.value_width


@dataclass(frozen=True)
class RelativeBias:
    """A learned bias of each head's scores for each of so many `buckets` of distances between query
    and key (T5, arXiv 1910.10683), which all layers share. From `max_distance` on all distances are
    in one bucket."""

    buckets: int
    max_distance: int


@dataclass(frozen=True)
class ModelConfig:
    """The configuration of a decoder, and of the encoder whose outputs it attends to, if it has
    one. `raw` is the ``config.json`` that it was read from."""

    family: str  # "llama", "mistral", …, as model_type spells it
    hidden: int  # D
    layers: int
    heads: int  # H
    kv_heads: int  # G; 1 for latent attention, where all heads share one latent
    head_dim: int  # K, of queries and keys
    ffn: int  # F, of dense layers
    vocab: int  # V
    norm_eps: float
    activation: str  # "silu", "gelu_pytorch_tanh", "gelu", "relu" or "relu2"
    tied: bool  # the output head is the embedding
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # a norm over each head of q and k
    ropes: tuple[Rope, ...]  # the rotary embedding of each layer
    # The sliding window of each layer: the number of keys that a query sees, its own included.
    windows: tuple[int | None, ...]
    # The chunks of each layer: a query sees the keys of its own chunk of so many positions.
    chunks: tuple[int | None, ...]
    max_position_embeddings: int  # positions that are usable with the scaling of the rope
    eos_ids: tuple[int, ...]
    bos_id: int | None
    full_width_qk_norm: bool = False  # RMSNorm over all heads of q and of k together
    sinks: bool = False  # each head has a logit in the softmax that has no value
    moe: MoEConfig | None = None
    mla: MLAConfig | None = None
    norms: LayerNormNames = LayerNormNames()
    norm_offset: float = 0.0  # added to the weight of every norm
    layer_norm: bool = False  # norms are LayerNorm, not RMSNorm
    norm_weight: bool = True  # norms have a weight
    norm_bias: bool = False  # norms have a bias
    embedding_norm: bool = False  # of the residual stream as it enters the first layer
    per_head_norm: bool = False  # of each head of q and k, with a weight for each head
    # Attention and feed-forward network read the same residual stream, and both are added to it.
    # Without a norm of its own the feed-forward network reads what attention reads.
    parallel_residual: bool = False
    learned_positions: int = 0  # rows of the embedding of positions; 0: there is none
    position_offset: int = 0  # the row of position 0
    # Scores fall with the distance of a key, for each head by its own slope (ALiBi, arXiv
    # 2108.12409): "exact", or "in bfloat16" as Falcon computes it; None: they do not.
    alibi: str | None = None
    relative_bias: RelativeBias | None = None
    causal: bool = True  # a token sees no later ones
    # The encoder, a stack of layers like the decoder's with the same embedding. What it makes of
    # the tokens of an input is attended to in every layer of the decoder.
    encoder: ModelConfig | None = None
    # The decoder's first token, unless others are given; None without an encoder.
    decoder_start_id: int | None = None
    clip_qkv: float | None = None  # queries, keys and values are cut off at this absolute value
    inverse_layer_scale: bool = False  # scores are divided by the number of the layer, from 1
    head_bias: bool = False
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    attention_scale: float | None = None  # None: head_dim ** -0.5
    embedding_scale: float = 1.0
    linear_attention: LinearAttentionConfig | None = None
    output_gate: bool = False  # attention's output is multiplied by sigmoid(gate x)
    residual_scale: float = 1.0  # of what a sub-layer adds to the residual stream
    logits_scale: float = 1.0
    # The norms of q and k (by head) come after the rotary embedding.
    qk_norm_after_rope: bool = False
    # Rotated elements at the beginning of each query and key; None: all of them.
    partial_rotary_dim: int | None = None
    # Each head of q and k has a root mean square of 1, after rope and in layers with rope only.
    qk_l2_norm: bool = False
    rope_interleaved: bool = False  # rope rotates pairs of neighbours, not of the two halves
    gated_mlp: bool = True  # down(activation(gate x) * up x); otherwise down(activation(up x))
    stored_names: StoredNames = StoredNames()
    quantization: Quantization | None = None  # of the weights in a checkpoint
    wrapper: str | None = None  # the multimodal architecture around it: its tensors' names differ
    ignored_fields: tuple[str, ...] = field(default=(), compare=False)  # the user answers for them
    # config.json ties the head to the embedding, but the stored one differs and is used.
    head_differs: bool = field(default=False, compare=False)
    raw: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def is_linear(self, layer: int) -> bool:
        """Whether `layer` has linear attention."""
        return self.linear_attention is not None and self.linear_attention.layers[layer]

    @property
    def text_fields(self) -> dict[str, Any]:
        """The fields of the language model in `raw`, which are within it in a multimodal file."""
        return (self.wrapper and self.raw.get("text_config")) or self.raw

    @property
    def key_width(self) -> int:
        """Elements of a cached key: the whole key, or the latent and the rotated part."""
        return self.mla.kv_lora_rank + self.mla.qk_rope_head_dim if self.mla else self.head_dim

    @property
    def value_width(self) -> int:
        """Elements of a value; for latent attention those of the latent, a part of the key."""
        return self.mla.kv_lora_rank if self.mla else self.head_dim

    @property
    def kv_cache_dim(self) -> int:
        """Elements that the cache holds for a position in each key/value head."""
        return self.key_width if self.mla else self.key_width + self.value_width

    @property
    def rotary_dim(self) -> int:
        """Rotated elements of a query or key."""
        if self.mla:
            return self.mla.qk_rope_head_dim
        return self.head_dim if self.partial_rotary_dim is None else self.partial_rotary_dim

    @property
    def rope(self) -> Rope:
        """The rotary embedding of the first layer that rotates and sees all earlier positions, or
        else of the first that rotates."""
        rotating = [
            (window is not None or chunk is not None, layer)
            for layer, (window, chunk) in enumerate(zip(self.windows, self.chunks, strict=True))
            if self.ropes[layer].kind != "none"
        ]
        return self.ropes[min(rotating)[1]] if rotating else NO_ROPE
