"""The configuration of a model: everything that its mathematics depends on.

`mpishard.config.reader` makes it from a Hugging Face ``config.json``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mpishard.config.stored_names import StoredNames

# No sequence has more positions. Products of positions with sizes then fit into 64 bits.
MAX_POSITIONS = 2**31 - 1


@dataclass(frozen=True)
class Rope:
    """The rotary embedding (RoFormer, arXiv 2104.09864). A kind ignores the fields that it does not
    use.

    `original_positions` is the length that the model was trained on: for "llama3" and "yarn" a
    field of their own, otherwise `max_position_embeddings`. "dynamic" changes the frequencies of
    longer sequences only. "yarn" is arXiv 2309.00071.
    """

    kind: str = "default"  # "default", "linear", "dynamic", "llama3" or "yarn"
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
    # If True, gate_up is (E, D, 2 F), with columns of gate and up alternating, and down (E, F, D).
    transposed: bool = False


@dataclass(frozen=True)
class ExpertNames:
    """The names that a family gives to the tensors of a layer with experts. A checkpoint has the
    names of either `separate` or `stacked`; the other fields hold for both, and are None if the
    family has no such tensor. Names follow ``model.layers.N.``."""

    separate: PerExpertNames | None = PerExpertNames()
    stacked: StackedNames = StackedNames()
    e_score_correction_bias: str | None = None  # (E,), float32 whatever the other weights are
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
    scoring: str  # "softmax" over all experts, or "sigmoid" of each
    norm_topk_prob: bool
    names: ExpertNames
    routed_scaling_factor: float = 1.0
    e_score_correction_bias: bool = False  # added to the scores for the choice, not to the weights
    n_group: int = 1  # the experts form this number of groups of consecutive experts …
    topk_group: int = 1  # … and a token chooses from this number of groups, the best
    group_score: str = "max"  # of a group: the "max" of its scores, or the "top-2 sum"
    # F of the shared expert, to which every token goes; 0: there is none.
    shared_expert_intermediate_size: int = 0
    shared_gate: bool = False  # the shared expert's output is multiplied by sigmoid(x @ gate)
    router_bias: bool = False
    expert_bias: bool = False  # on all three projections of an expert
    # The clamped activation (up + 1) gate sigmoid(alpha gate), with gate clamped to at most limit
    # and up to ±limit; None: the model's activation(gate) up.
    alpha: float | None = None
    limit: float | None = None


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
class ModelConfig:
    """The configuration of a decoder. `raw` is the ``config.json`` that it was read from."""

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
    qk_norm: bool  # RMSNorm over each head of q and k
    rope: Rope
    # The sliding window of each layer: the number of keys that a query sees, its own included.
    windows: tuple[int | None, ...]
    max_position_embeddings: int  # positions that are usable with the scaling of the rope
    eos_ids: tuple[int, ...]
    bos_id: int | None
    full_width_qk_norm: bool = False  # RMSNorm over all heads of q and of k together
    sinks: bool = False  # each head has a logit in the softmax that has no value
    moe: MoEConfig | None = None
    mla: MLAConfig | None = None
    norm_offset: float = 0.0  # added to the weight of every RMSNorm
    post_norms: bool = False  # each sub-layer has a norm after it, too
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    attention_scale: float | None = None  # None: head_dim ** -0.5
    embedding_scale: float = 1.0
    gated_mlp: bool = True  # down(activation(gate x) * up x); otherwise down(activation(up x))
    stored_names: StoredNames = StoredNames()
    wrapper: str | None = None  # the multimodal architecture around it: its tensors' names differ
    ignored_fields: tuple[str, ...] = field(default=(), compare=False)  # the user answers for them
    raw: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

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
        return self.mla.qk_rope_head_dim if self.mla else self.head_dim
