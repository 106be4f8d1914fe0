"""A model's configuration, read from a Hugging Face ``config.json``.

Both spellings in use are read: `rope_parameters`, as transformers 5 writes it, and the older
`rope_theta` with `rope_scaling`. A field that is absent takes the default of transformers'
configuration class for that family. A field that would change the mathematics and is not
implemented is refused, and so is a field nobody here has heard of: a model computed almost as its
authors meant it gives fluent, wrong answers.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import Any, NoReturn

from mpishard.errors import UserError, brief

# More positions than any sequence has; their products with sizes stay within 64 bits.
MAX_POSITIONS = 2**31 - 1

# Far more than any model has of anything that is counted or measured, of layers, and of experts in
# all layers together. What is listed layer by layer and expert by expert, before there is any
# weight to compare it with, must not fill the memory because of a damaged number.
MOST = 2**31 - 1
MOST_LAYERS = 10_000
MOST_EXPERTS = 200_000


@dataclass(frozen=True)
class Rope:
    """The rotary embedding; fields that a kind does not use keep their default.

    `original_positions` is the length that the model was trained on: for "llama3" and "yarn" as
    the file says, otherwise `max_position_embeddings`, beyond which "dynamic" begins to act.
    """

    kind: str = "default"  # "default", "linear", "dynamic", "llama3" or "yarn"
    theta: float = 10000.0
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: by yarn's rule, from factor and the mscales
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class PerExpertNames:
    """The tensors of a mixture whose experts are stored one by one, as most checkpoints have them.
    Each name follows ``model.layers.N.``, and ``{}`` stands for the number of the expert."""

    router: str = "mlp.gate.weight"  # (E, D)
    gate: str = "mlp.experts.{}.gate_proj.weight"  # (F, D)
    up: str = "mlp.experts.{}.up_proj.weight"  # (F, D)
    down: str = "mlp.experts.{}.down_proj.weight"  # (D, F)


@dataclass(frozen=True)
class StackedNames:
    """The tensors of a mixture whose experts are stored together. Each name follows
    ``model.layers.N.``; a bias that the family does not have is None."""

    router: str = "mlp.gate.weight"  # (E, D)
    gate_up: str = "mlp.experts.gate_up_proj"  # (E, 2 F, D): the rows of gate, then those of up
    down: str = "mlp.experts.down_proj"  # (E, D, F)
    router_bias: str | None = None  # (E,)
    gate_up_bias: str | None = None  # (E, 2 F), laid out as gate_up
    down_bias: str | None = None  # (E, D)
    # Then gate_up is (E, D, 2 F), the columns of gate and up taking turns, and down (E, F, D).
    transposed: bool = False


@dataclass(frozen=True)
class ExpertNames:
    """What a family calls the tensors of a mixture, in each of the ways in which it stores them,
    of which a checkpoint uses one; the rest, None where the family has no such thing, is called
    the same in both. Names follow ``model.layers.N.``."""

    separate: PerExpertNames | None = PerExpertNames()
    stacked: StackedNames = StackedNames()
    e_score_correction_bias: str | None = None  # (E,), float32 whatever the other weights are
    shared: str | None = None  # then .gate_proj.weight (F, D), and so on, as a dense layer's mlp
    shared_gate: str | None = None  # (1, D)


@dataclass(frozen=True)
class MoEConfig:
    """The mixture of experts that takes the place of the feed-forward network in some layers.

    The router scores every expert, `top_k` of them are chosen, and their outputs are summed with
    weights: the scores of the chosen, divided by their sum if `norm_topk_prob`, times
    `routed_scaling_factor`. A softmax over the chosen alone, as gpt_oss has it, is a softmax over
    all, normalized."""

    num_experts: int  # E
    top_k: int  # A, the experts that each token goes to
    moe_intermediate_size: int  # F of one expert
    layers: tuple[bool, ...]  # whether each layer has experts; the others are dense
    scoring: str  # "softmax" over all experts, or "sigmoid" of each
    norm_topk_prob: bool
    names: ExpertNames
    routed_scaling_factor: float = 1.0
    e_score_correction_bias: bool = False  # added to the scores for choosing, not for weighting
    n_group: int = 1  # neighbouring experts form so many groups of one size …
    topk_group: int = 1  # … and only those in so many, the best, can be chosen
    group_score: str = "max"  # of a group: "max" of its scores, or the "top-2 sum"
    shared_expert_intermediate_size: int = (
        0  # F of the expert to which every token goes as well; 0: there is none
    )
    shared_gate: bool = False  # its output is multiplied by the sigmoid of a product with x
    router_bias: bool = False
    expert_bias: bool = False  # on all three projections of an expert
    # The clamped activation, (up + 1) gate sigmoid(alpha gate), where gate is cut off above limit
    # and up beyond ±limit; None: the model's activation(gate) up.
    alpha: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention, DeepSeek-V2, arXiv 2405.04434: all heads' keys and values are
    projections of one latent vector per position, beside which only one rotated key is kept.

    A query or key is `qk_nope_head_dim` elements without position and then `qk_rope_head_dim`
    rotated ones. Where yarn has an mscale_all_dim, the scores are also multiplied by the square of
    0.1 mscale_all_dim ln(factor) + 1."""

    q_lora_rank: int | None  # width of the queries' latent; None: queries are projected directly
    kv_lora_rank: int  # width of the latent that keys and values share
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int  # width of a head's value
    bias: bool  # on the projections to the latents
    interleaved: bool  # rope turns neighbours, not an element of each half
    norm_eps: float = 1e-6  # of the norms of the latents, whatever the model's is


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a decoder that its mathematics depends on."""

    family: str  # "llama", "mistral", … as model_type has it
    hidden: int  # D
    layers: int
    heads: int  # H
    kv_heads: int  # G; 1 of latent attention, whose one latent all heads share
    head_dim: int  # K, of queries and keys
    ffn: int  # F, of dense layers
    vocab: int  # V
    norm_eps: float
    activation: str  # "silu", "gelu_pytorch_tanh" or "relu"
    tied: bool  # the output head is the embedding
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over each head of q and k
    rope: Rope
    windows: tuple[int | None, ...]  # of each layer: a query sees so many keys, itself included
    max_position_embeddings: int  # positions usable with the rope's scaling
    eos_ids: tuple[int, ...]
    bos_id: int | None
    full_width_qk_norm: bool = False  # RMSNorm over all heads of q and of k together
    sinks: bool = False  # a logit per head that takes part in the softmax and has no value
    moe: MoEConfig | None = None
    mla: MLAConfig | None = None
    norm_offset: float = 0.0  # added to the weight of every RMSNorm
    post_norms: bool = False  # a norm after each sub-layer, too
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    attention_scale: float | None = None  # None: head_dim ** -0.5
    embedding_scale: float = 1.0
    raw: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def key_width(self) -> int:
        """Numbers that a cache keeps of a position's key: all of it, or of latent attention the
        latent and the part that is turned."""
        return self.mla.kv_lora_rank + self.mla.qk_rope_head_dim if self.mla else self.head_dim

    @property
    def value_width(self) -> int:
        """Numbers of a position's value; of latent attention the latent, which is in the key."""
        return self.mla.kv_lora_rank if self.mla else self.head_dim

    @property
    def kv_cache_dim(self) -> int:
        """Numbers that a cache keeps of a position in each key/value head."""
        return self.key_width if self.mla else self.key_width + self.value_width

    @property
    def rotary_dim(self) -> int:
        """Numbers of a query or key that the rotary embedding turns."""
        return self.mla.qk_rope_head_dim if self.mla else self.head_dim

    @classmethod
    def from_json(
        cls, raw: dict[str, Any], generation: dict[str, Any] | None, source: str
    ) -> ModelConfig:
        """The configuration that `raw`, the content of the ``config.json`` called `source`,
        describes; end-of-sequence ids are `generation`'s (``generation_config.json``) if it has
        any.

        Raises UserError, naming `source`, the field and its value, for a file that is
        inconsistent or asks for anything that is not implemented.
        """
        if not isinstance(raw, dict):
            raise UserError(f"{source} must hold a JSON object, not {_shown(raw)}")
        if not isinstance(generation, dict | None):
            raise UserError(f"{_beside(source)} must hold a JSON object, not {_shown(generation)}")
        fields = _Fields(raw, source)
        family = _family(fields)
        hidden = fields.integer("hidden_size")
        layers = fields.integer("num_hidden_layers")
        if layers > MOST_LAYERS:
            fields.refuse("num_hidden_layers", f"must be at most {MOST_LAYERS}")
        heads = fields.integer("num_attention_heads")
        rope_dim = _rope_dim(fields, family, hidden, heads)
        rope, max_position_embeddings = _rope(fields, family, rope_dim)
        mla = _mla(fields, family) if family.latent else None
        kv_heads = _kv_heads(fields, family, heads)
        _refuse_quantized(fields, family)
        bias = _bias(fields, family.qkv_bias_field, family.qkv_bias, family.qkv_bias_default)
        config = cls(
            family=family.name,
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=1 if mla else kv_heads,
            head_dim=mla.qk_nope_head_dim + mla.qk_rope_head_dim if mla else rope_dim,
            ffn=fields.integer("intermediate_size"),
            vocab=fields.integer("vocab_size"),
            norm_eps=fields.number("rms_norm_eps", family.norm_eps),
            activation=_activation(fields, family),
            tied=fields.flag("tie_word_embeddings", family.tied),
            qkv_bias=bias and not mla,
            o_bias=bias and family.o_bias,
            mlp_bias=_bias(fields, "mlp_bias", family.mlp_bias),
            qk_norm=family.qk_norm,
            rope=rope,
            windows=_windows(fields, family, layers),
            max_position_embeddings=max_position_embeddings,
            eos_ids=_eos_ids(fields, generation, family),
            bos_id=_bos_id(fields, generation, family),
            full_width_qk_norm=family.full_width_qk_norm,
            sinks=family.sinks,
            moe=_moe(fields, family.mixture, layers) if family.mixture else None,
            mla=mla,
            norm_offset=family.norm_offset,
            post_norms=family.post_norms,
            attn_logit_softcapping=_softcap(
                fields, "attn_logit_softcapping", family.attn_logit_softcapping
            ),
            final_logit_softcapping=_softcap(
                fields, "final_logit_softcapping", family.final_logit_softcapping
            ),
            attention_scale=_attention_scale(fields, family),
            embedding_scale=hidden**0.5 if family.scaled_embedding else 1.0,
            raw=raw,
        )
        fields.reject_unknown(family.name, family.ignored)
        return config


_DEFAULT_THETA = 10000.0
_DEFAULT_WINDOW = 4096
_DEFAULT_MAX_WINDOW_LAYERS = 28
_DEFAULT_Q_RANK = 1536
_DEFAULT_ALPHA = 1.702
_DEFAULT_LIMIT = 7.0


@dataclass(frozen=True)
class _Mixture:
    """How a family's file describes its mixture of experts, and what it need not say."""

    ffn: str  # the field with the width of an expert
    names: ExpertNames = ExpertNames()
    dense: str = "never"  # which layers are: "never", "by step" or "the first"
    first_dense: int = 0
    scoring: str = "softmax"
    normalized: bool | None = None  # None: for norm_topk_prob to choose
    normalized_default: bool = False
    shared: str | None = (
        None  # the field with the shared expert's width, or with how many there are
    )
    shared_count: int = 0  # default where it is how many, which make one of their widths together
    choice: str = "top k"  # or as topk_method says, "greedy" unless it does, or "noaux_tc"
    scaling: float | None = None  # the default of routed_scaling_factor; None: there is no such
    biases: bool = False  # on the router and the experts
    clamped: bool = False


@dataclass(frozen=True)
class _Family:
    """What the families differ in, and the defaults of their configuration classes in
    transformers 5. A bias of None is for the file to choose."""

    name: str
    qkv_bias: bool | None
    o_bias: bool  # whether o has a bias where q, k and v have one
    mlp_bias: bool | None
    qk_norm: bool
    # "never", "everywhere", "everywhere by a switch", "from a layer", "alternating", beginning with
    # the first layer, or "alternating before a layer".
    sliding: str
    max_position_embeddings: int
    kv_heads: int | None  # None: as many as query heads
    head_dim: int | None  # None: hidden / heads
    bos_id: int | None
    eos_id: int | None
    norm_eps: float = 1e-6
    theta: float = _DEFAULT_THETA
    rope: dict[str, Any] = field(default_factory=dict)  # as rope_scaling, where there is none
    window: int | None = _DEFAULT_WINDOW
    qkv_bias_field: str = "attention_bias"
    qkv_bias_default: bool = False
    full_width_qk_norm: bool = False
    sinks: bool = False
    latent: bool = (
        False  # attention is Mla, and attention_bias means its latents' projections and o
    )
    rope_interleaved_pairs: bool | None = (
        None  # whether rope is interleaved; None: for rope_interleave
    )
    mixture: _Mixture | None = None
    quantization: str | None = None  # the quant_method that its weights may have
    ignored: frozenset[str] = frozenset()  # fields without effect in this family alone
    tied: bool = False
    activation_field: str = "hidden_act"
    activation: str = "silu"
    norm_offset: float = 0.0
    post_norms: bool = False
    scaled_embedding: bool = False  # by sqrt(hidden_size)
    needs_window: bool = False  # transformers, too, refuses null
    # The defaults of the fields of these names; None where the family does not know the field.
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    query_pre_attn_scalar: int | None = None


_FAMILIES = {
    "LlamaForCausalLM": _Family(
        name="llama",
        qkv_bias=None,
        o_bias=True,
        mlp_bias=None,
        qk_norm=False,
        sliding="never",
        max_position_embeddings=2048,
        kv_heads=None,
        head_dim=None,
        bos_id=1,
        eos_id=2,
    ),
    "MistralForCausalLM": _Family(
        name="mistral",
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding="everywhere",
        max_position_embeddings=131072,
        kv_heads=8,
        head_dim=None,
        bos_id=1,
        eos_id=2,
    ),
    "Qwen2ForCausalLM": _Family(
        name="qwen2",
        qkv_bias=True,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding="from a layer",
        max_position_embeddings=32768,
        kv_heads=32,
        head_dim=None,
        bos_id=None,
        eos_id=None,
    ),
    "Qwen3ForCausalLM": _Family(
        name="qwen3",
        qkv_bias=None,
        o_bias=True,
        mlp_bias=False,
        qk_norm=True,
        sliding="from a layer",
        max_position_embeddings=32768,
        kv_heads=32,
        head_dim=128,
        bos_id=None,
        eos_id=None,
    ),
    "Gemma2ForCausalLM": _Family(
        name="gemma2",
        qkv_bias=None,
        o_bias=True,
        mlp_bias=False,
        qk_norm=False,
        sliding="alternating",
        max_position_embeddings=8192,
        kv_heads=4,
        head_dim=256,
        bos_id=2,
        eos_id=1,
        tied=True,
        activation_field="hidden_activation",
        activation="gelu_pytorch_tanh",
        norm_offset=1.0,
        post_norms=True,
        scaled_embedding=True,
        needs_window=True,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        query_pre_attn_scalar=256,
        # transformers, too, computes the same whatever hidden_act says.
        ignored=frozenset({"hidden_act", "cache_implementation"}),
    ),
    "MixtralForCausalLM": _Family(
        name="mixtral",
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding="everywhere",
        max_position_embeddings=131072,
        kv_heads=8,
        head_dim=None,
        bos_id=1,
        eos_id=2,
        norm_eps=1e-5,
        theta=1e6,
        window=None,
        mixture=_Mixture(
            ffn="intermediate_size",
            normalized=True,
            names=ExpertNames(
                separate=PerExpertNames(
                    router="block_sparse_moe.gate.weight",
                    gate="block_sparse_moe.experts.{}.w1.weight",
                    up="block_sparse_moe.experts.{}.w3.weight",
                    down="block_sparse_moe.experts.{}.w2.weight",
                )
            ),
        ),
    ),
    "Qwen2MoeForCausalLM": _Family(
        name="qwen2_moe",
        qkv_bias=None,
        qkv_bias_field="qkv_bias",
        qkv_bias_default=True,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding="alternating before a layer",
        max_position_embeddings=32768,
        kv_heads=16,
        head_dim=None,
        bos_id=None,
        eos_id=None,
        mixture=_Mixture(
            ffn="moe_intermediate_size",
            dense="by step",
            shared="shared_expert_intermediate_size",
            names=ExpertNames(
                shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate.weight"
            ),
        ),
    ),
    "Qwen3MoeForCausalLM": _Family(
        name="qwen3_moe",
        qkv_bias=None,
        o_bias=True,
        mlp_bias=False,
        qk_norm=True,
        sliding="everywhere by a switch",
        max_position_embeddings=32768,
        kv_heads=4,
        head_dim=None,
        bos_id=None,
        eos_id=None,
        mixture=_Mixture(ffn="moe_intermediate_size", dense="by step"),
    ),
    "OlmoeForCausalLM": _Family(
        name="olmoe",
        qkv_bias=None,
        o_bias=True,
        mlp_bias=False,
        qk_norm=False,
        full_width_qk_norm=True,
        sliding="never",
        max_position_embeddings=4096,
        kv_heads=None,
        head_dim=None,
        bos_id=None,
        eos_id=50279,
        norm_eps=1e-5,
        mixture=_Mixture(ffn="intermediate_size"),
    ),
    "GptOssForCausalLM": _Family(
        name="gpt_oss",
        qkv_bias=None,
        qkv_bias_default=True,
        o_bias=True,
        mlp_bias=False,
        qk_norm=False,
        sinks=True,
        sliding="alternating",
        max_position_embeddings=131072,
        kv_heads=8,
        head_dim=64,
        bos_id=None,
        eos_id=None,
        norm_eps=1e-5,
        theta=150000.0,
        rope={
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
        window=128,
        mixture=_Mixture(
            ffn="intermediate_size",
            normalized=True,
            biases=True,
            clamped=True,
            names=ExpertNames(
                separate=None,
                stacked=StackedNames(
                    router="mlp.router.weight",
                    router_bias="mlp.router.bias",
                    gate_up_bias="mlp.experts.gate_up_proj_bias",
                    down_bias="mlp.experts.down_proj_bias",
                    transposed=True,
                ),
            ),
        ),
        quantization="mxfp4",
        ignored=frozenset({"initial_context_length"}),
    ),
    "DeepseekV2ForCausalLM": _Family(
        name="deepseek_v2",
        qkv_bias=None,
        o_bias=True,
        mlp_bias=None,
        qk_norm=False,
        sliding="never",
        max_position_embeddings=2048,
        kv_heads=None,
        head_dim=None,
        bos_id=1,
        eos_id=2,
        latent=True,
        rope_interleaved_pairs=True,
        mixture=_Mixture(
            ffn="moe_intermediate_size",
            dense="the first",
            normalized=False,
            choice="topk_method",
            scaling=1.0,
            shared="n_shared_experts",
            shared_count=2,
            names=ExpertNames(shared="mlp.shared_experts"),
        ),
        # transformers, too, computes the same whatever norm_topk_prob says, and has this code.
        ignored=frozenset({"norm_topk_prob", "auto_map"}),
    ),
    "DeepseekV3ForCausalLM": _Family(
        name="deepseek_v3",
        qkv_bias=None,
        o_bias=True,
        mlp_bias=False,
        qk_norm=False,
        sliding="never",
        max_position_embeddings=4096,
        kv_heads=None,
        head_dim=None,
        bos_id=0,
        eos_id=1,
        latent=True,
        mixture=_Mixture(
            ffn="moe_intermediate_size",
            dense="the first",
            first_dense=3,
            scoring="sigmoid",
            normalized_default=True,
            choice="noaux_tc",
            scaling=2.5,
            shared="n_shared_experts",
            shared_count=1,
            names=ExpertNames(
                e_score_correction_bias="mlp.gate.e_score_correction_bias",
                shared="mlp.shared_experts",
            ),
        ),
        # The layers that predict several tokens come after the last, and are left out.
        ignored=frozenset({"num_nextn_predict_layers", "num_mtp_layers", "auto_map"}),
    ),
}

# Where use_sliding_window must switch the window on, and where layer_types may place it.
_SWITCHED = ("from a layer", "alternating before a layer", "everywhere by a switch")
_BY_LAYER = ("from a layer", "alternating before a layer", "alternating")

# The spellings of one number.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_TOP_K = ("num_experts_per_tok", "experts_per_token")

# The names of transformers' table of activations, with those that mean the same function.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu_new": "gelu_pytorch_tanh",
    "relu": "relu",
}

_ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")

# What a field asks for, and the one value, beside null, with which it asks for nothing.
UNSUPPORTED_FIELDS: dict[str, tuple[str, object]] = {
    "quantization_config": ("quantized weights", None),
    "auto_map": ("code of its own", {}),
    "per_layer_config": ("layers that differ from each other", {}),
    "pruned_heads": ("pruned heads", {}),
    "is_encoder_decoder": ("an encoder", False),
    "add_cross_attention": ("cross-attention", False),
    "is_causal": ("attention to later tokens", True),
    "use_bidirectional_attention": ("attention to later tokens", False),
    "activation": ("another feed-forward network", "swiglu"),
    "alibi": ("ALiBi position biases", False),
    "partial_rotary_factor": ("a rotation of part of each head", 1),
    "rope_interleaved": ("a rotation of interleaved pairs", False),
    "mrope_section": ("multimodal rope", None),
    "use_mrope": ("multimodal rope", False),
    "attention_chunk_size": ("chunked attention", None),
    "dual_chunk_attention_config": ("dual chunk attention", None),
    "attn_logit_softcapping": ("soft-capped attention scores", None),
    "final_logit_softcapping": ("soft-capped logits", None),
    "logits_soft_cap": ("soft-capped logits", None),
    "attention_multiplier": ("another scale of the attention scores", None),
    "query_pre_attn_scalar": ("another scale of the attention scores", None),
    "embedding_multiplier": ("scaled embeddings", 1),
    "residual_multiplier": ("scaled residuals", 1),
    "logits_scaling": ("scaled logits", 1),
    "logit_scale": ("scaled logits", 1),
    "clip_qkv": ("clipped queries, keys and values", None),
    "qk_layernorm": ("norms of queries and keys", False),
    "use_qk_norm": ("norms of queries and keys", False),
    "num_experts": ("a mixture of experts", 0),
    "num_experts_per_tok": ("a mixture of experts", 0),
    "num_local_experts": ("a mixture of experts", 0),
    "n_routed_experts": ("a mixture of experts", 0),
    "moe_intermediate_size": ("a mixture of experts", 0),
    "num_nextn_predict_layers": ("layers that predict several tokens", 0),
}

# Fields seen in checkpoints of these families that do not change the logits: bookkeeping and
# switches between equal kernels, training, classifiers, defaults for generation. pretraining_tp is
# among them, because it only splits the matrix products of old versions of transformers.
IGNORED_FIELDS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _experts_implementation_internal _flash_attn_2_enabled _name_or_path attn_implementation
    chunk_size_feed_forward cross_attention_hidden_size dtype ep_size experts_implementation
    is_decoder is_llama_config max_sequence_length model_max_length name_or_path padding_side
    pretraining_tp return_dict seq_length tie_encoder_decoder tie_last_hidden_states
    tokenizer_class tokenizer_model_max_length torch_dtype torchscript transformers.js_config
    transformers_version unsloth_fixed unsloth_optimized unsloth_version use_bfloat16 use_cache
    use_flash_attention use_flash_attn use_sdpa

    attention_dropout attention_probs_dropout_prob attn_dropout attn_pdrop aux_loss_alpha
    classifier_dropout classifier_dropout_prob embd_pdrop gradient_checkpointing hidden_dropout
    hidden_dropout_prob initializer_range neftune_noise_alpha output_router_logits resid_dropout
    resid_pdrop router_aux_loss_coef router_jitter_noise seq_aux tf_legacy_loss

    finetuning_task id2label label2id num_labels output_attentions output_hidden_states prefix
    problem_type task_specific_params

    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty length_penalty max_length
    max_new_tokens min_length min_p no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_scores remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
    """.split()
)


class _Fields:
    """The fields of one JSON object, asked for by name and type; a null reads as if the field had
    no value. Keeps the names that were asked for, so that the others can be refused."""

    def __init__(self, values: dict[str, Any], source: str, within: str = "") -> None:
        self.values = values
        self.source = source
        self.within = within
        self.asked: set[str] = set()

    def get(self, name: str, absent: Any = None) -> Any:
        """The value as it stands in the file, `absent` if it has no such field."""
        self.asked.add(name)
        return self.values.get(name, absent)

    def refuse(self, name: str, problem: str) -> NoReturn:
        """Raise UserError: the field `name` has the `problem`."""
        value = f" = {_shown(self.values[name])}" if name in self.values else ""
        raise UserError(f"{self.source}: {self.within}{brief(name)}{value} {problem}")

    def optional_integer(self, name: str, absent: int | None = None) -> int | None:
        """A positive whole number, None for null, `absent` if there is no such field."""
        value = self.get(name, absent)
        if value is not None and (type(value) is not int or value < 1):
            self.refuse(name, "must be a positive whole number")
        if value is not None and value > MOST:
            self.refuse(name, f"must be at most {MOST}")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive whole number, which must be there if it has no default."""
        value = self.optional_integer(name)
        if value is None:
            value = default
        if value is None:
            self.refuse(name, "is missing: it must be a positive whole number")
        return value

    def whole(self, name: str, default: int) -> int:
        """A whole number that is not negative."""
        value = self.get(name)
        if value is None:
            value = default
        if type(value) is not int or not 0 <= value <= MOST:
            self.refuse(name, "must be a whole number that is not negative")
        return value

    def agreed(self, *names: str) -> int:
        """A positive whole number that goes by each of `names` and stands under at least one."""
        values = {name: self.optional_integer(name) for name in names}
        given = [name for name in names if values[name] is not None]
        if not given:
            self.refuse(names[0], "is missing: it must be a positive whole number")
        for name in given[1:]:
            if values[name] != values[given[0]]:
                self.refuse(name, f"contradicts {given[0]} = {values[given[0]]}")
        return self.integer(given[0])

    def only(self, name: str, *allowed: Any) -> None:
        """Raise UserError unless the field has a value of `allowed`, or none."""
        verb = "is" if len(allowed) == 1 else "are"
        if self.get(name) not in (None, *allowed):
            self.refuse(name, f"is not implemented: {' and '.join(map(_shown, allowed))} {verb}")

    def optional_number(self, name: str) -> float | None:
        """A finite number that is not negative, or None."""
        value = self.get(name)
        if value is None:
            return None
        if type(value) not in (int, float) or not 0 <= value <= sys.float_info.max:
            self.refuse(name, "must be a number that is not negative")
        return float(value)

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number, which must be there if it has no default."""
        value = self.optional_number(name)
        if value is None:
            value = default
        if value is None:
            self.refuse(name, "is missing: it must be a positive number")
        if value == 0:
            self.refuse(name, "must be a positive number")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name)
        if value is not None and type(value) is not bool:
            self.refuse(name, "must be true or false")
        return default if value is None else value

    def text(self, name: str, default: str) -> str:
        """A string."""
        value = self.get(name)
        if value is not None and type(value) is not str:
            self.refuse(name, "must be a string")
        return default if value is None else value

    def section(self, name: str) -> _Fields | None:
        """The fields of the object called `name`, or None if it is empty or not there."""
        value = self.get(name)
        if value is not None and type(value) is not dict:
            self.refuse(name, "must be an object")
        return _Fields(value, self.source, within=f"{name}.") if value else None

    def reject_unknown(self, reader: str, ignored: frozenset[str] = frozenset()) -> None:
        """Raise UserError for a field that was not asked for, is not `ignored` and may change the
        mathematics of `reader`, a family or kind of rope."""
        for name, value in self.values.items():
            if name in self.asked | ignored | IGNORED_FIELDS or name.endswith("_token_id"):
                continue
            remedy = "remove it from the file if it does not change the mathematics"
            if value is not None and name not in UNSUPPORTED_FIELDS:
                self.refuse(name, f"is not a field that is known for {reader}: {remedy}")
            if value is not None and value != UNSUPPORTED_FIELDS[name][1]:
                self.refuse(
                    name, f"asks for {UNSUPPORTED_FIELDS[name][0]}, not implemented: {remedy}"
                )


def _shown(value: object) -> str:
    """`value` as JSON, shortened to what fits into a sentence."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return brief(text, 60)


def _family(fields: _Fields) -> _Family:
    names = fields.get("architectures")
    if names not in [[name] for name in _FAMILIES]:
        fields.refuse("architectures", f"must be a list of one of {', '.join(_FAMILIES)}")
    family = _FAMILIES[names[0]]
    if fields.text("model_type", family.name) != family.name:
        fields.refuse("model_type", f'must be "{family.name}", as architectures is {names[0]}')
    return family


def _refuse_quantized(fields: _Fields, family: _Family) -> None:
    """Raise UserError for quantized weights, but for those that the family is published with."""
    if family.quantization is None:
        return  # then the field is refused with the others
    section = fields.section("quantization_config")
    if section and section.text("quant_method", "") != family.quantization:
        fields.refuse("quantization_config", f"is not implemented: {family.quantization} is")


def _rope_dim(fields: _Fields, family: _Family, hidden: int, heads: int) -> int:
    """How many elements of a head are rotated: all but for latent attention."""
    if family.latent:
        rope_dim = fields.integer("qk_rope_head_dim")
        if fields.optional_integer("head_dim", absent=rope_dim) not in (None, rope_dim):
            fields.refuse("head_dim", f"contradicts qk_rope_head_dim = {rope_dim}")
        if rope_dim % 2:
            fields.refuse("qk_rope_head_dim", f"must be even for rope's pairs, not {rope_dim}")
        return rope_dim
    head_dim = fields.optional_integer("head_dim", absent=family.head_dim)
    if head_dim is None:
        if hidden % heads:
            fields.refuse(
                "hidden_size",
                f"must be a multiple of num_attention_heads = {heads}, or head_dim must be given",
            )
        head_dim = hidden // heads
    if head_dim % 2:
        fields.refuse("head_dim", f"must be even for rope to pair its halves, not {head_dim}")
    if family.full_width_qk_norm and head_dim * heads != hidden:
        fields.refuse("head_dim", f"contradicts {family.name}, whose heads fill hidden_size")
    return head_dim


def _kv_heads(fields: _Fields, family: _Family, heads: int) -> int:
    kv_heads = fields.optional_integer("num_key_value_heads", absent=family.kv_heads)
    if kv_heads is None:
        return heads
    if heads % kv_heads:
        default = "" if "num_key_value_heads" in fields.values else f", {family.name}'s default"
        fields.refuse(
            "num_attention_heads",
            f"must be a multiple of num_key_value_heads = {kv_heads}{default}",
        )
    if family.latent and kv_heads != heads:
        fields.refuse("num_key_value_heads", f"must be num_attention_heads = {heads}")
    return kv_heads


def _mla(fields: _Fields, family: _Family) -> MLAConfig:
    qk_nope_head_dim, rope_dim = (
        fields.integer("qk_nope_head_dim"),
        fields.integer("qk_rope_head_dim"),
    )
    fields.only("qk_head_dim", qk_nope_head_dim + rope_dim)
    interleaved = family.rope_interleaved_pairs
    if interleaved is None:
        interleaved = fields.flag("rope_interleave", True)
    return MLAConfig(
        q_lora_rank=fields.optional_integer("q_lora_rank", absent=_DEFAULT_Q_RANK),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_nope_head_dim=qk_nope_head_dim,
        qk_rope_head_dim=rope_dim,
        v_head_dim=fields.integer("v_head_dim"),
        bias=fields.flag("attention_bias", False),
        interleaved=interleaved,
    )


def _moe(fields: _Fields, mixture: _Mixture, layers: int) -> MoEConfig:
    experts = fields.agreed(*_EXPERTS)
    if experts * layers > MOST_EXPERTS:
        name = next(name for name in _EXPERTS if fields.values.get(name) is not None)
        fields.refuse(name, f"must be at most {MOST_EXPERTS} in all {layers} layers together")
    top_k = fields.agreed(*_TOP_K)
    ffn = fields.integer(mixture.ffn)
    normalized = mixture.normalized
    if normalized is None:
        normalized = fields.flag("norm_topk_prob", mixture.normalized_default)
    groups, topk_group = _groups(fields, mixture, experts)
    if top_k > experts // groups * topk_group:
        within = f" in {topk_group} of {groups} groups" if groups > 1 else ""
        fields.refuse(
            _TOP_K[0], f"must be at most the {experts // groups * topk_group} experts{within}"
        )
    fields.only("scoring_func", mixture.scoring)
    return MoEConfig(
        num_experts=experts,
        top_k=top_k,
        moe_intermediate_size=ffn,
        layers=_sparse_layers(fields, mixture, layers),
        scoring=mixture.scoring,
        norm_topk_prob=normalized,
        names=mixture.names,
        routed_scaling_factor=fields.number("routed_scaling_factor", mixture.scaling)
        if mixture.scaling
        else 1.0,
        e_score_correction_bias=mixture.names.e_score_correction_bias is not None,
        n_group=groups,
        topk_group=topk_group,
        group_score="top-2 sum" if mixture.choice == "noaux_tc" else "max",
        shared_expert_intermediate_size=_shared_ffn(fields, mixture, ffn),
        shared_gate=mixture.names.shared_gate is not None,
        router_bias=mixture.biases,
        expert_bias=mixture.biases,
        alpha=fields.number("swiglu_alpha", _DEFAULT_ALPHA) if mixture.clamped else None,
        limit=fields.number("swiglu_limit", _DEFAULT_LIMIT) if mixture.clamped else None,
    )


def _sparse_layers(fields: _Fields, mixture: _Mixture, layers: int) -> tuple[bool, ...]:
    """Whether each layer is a mixture."""
    if mixture.dense == "the first":
        fields.only("moe_layer_freq", 1)
        first = fields.whole("first_k_dense_replace", mixture.first_dense)
        return tuple(layer >= first for layer in range(layers))
    if mixture.dense == "by step":
        step = fields.integer("decoder_sparse_step", 1)
        dense = fields.get("mlp_only_layers") or []
        if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
            fields.refuse("mlp_only_layers", "must be a list of the numbers of layers")
        return tuple((n + 1) % step == 0 and n not in dense for n in range(layers))
    return (True,) * layers


def _groups(fields: _Fields, mixture: _Mixture, experts: int) -> tuple[int, int]:
    """How many groups the experts form, and in how many of them experts can be chosen."""
    if mixture.choice == "topk_method":
        fields.only("topk_method", "greedy", "group_limited_greedy")
        fields.asked |= {"n_group", "topk_group"}
        if fields.text("topk_method", "greedy") == "greedy":
            return 1, 1
        groups, kept = fields.integer("n_group"), fields.integer("topk_group")
    elif mixture.choice == "noaux_tc":
        fields.only("topk_method", "noaux_tc")
        groups, kept = fields.integer("n_group", 8), fields.integer("topk_group", 4)
    else:
        return 1, 1
    if experts % groups:
        fields.refuse("n_group", f"must divide the {experts} experts")
    if kept > groups:
        fields.refuse("topk_group", f"must be at most n_group = {groups}")
    if mixture.choice == "noaux_tc" and experts // groups < 2:
        fields.refuse("n_group", f"must leave two of the {experts} experts to a group")
    return groups, kept


def _shared_ffn(fields: _Fields, mixture: _Mixture, ffn: int) -> int:
    """The width of the expert that every token goes to, 0 where there is none."""
    if mixture.shared is None:
        return 0
    if not mixture.shared_count:
        return fields.integer(mixture.shared)
    return ffn * (fields.optional_integer(mixture.shared, absent=mixture.shared_count) or 0)


def _activation(fields: _Fields, family: _Family) -> str:
    field = family.activation_field
    name = fields.text(field, family.activation)
    if name not in _ACTIVATIONS:
        fields.refuse(field, f"is not implemented: {', '.join(_ACTIVATIONS)} are")
    if family.mixture and family.mixture.clamped and _ACTIVATIONS[name] != "silu":
        fields.refuse("hidden_act", f'contradicts {family.name}, where it is always "silu"')
    return _ACTIVATIONS[name]


def _softcap(fields: _Fields, name: str, default: float | None) -> float | None:
    """The cap of scores or logits: the family's default if there is no such field, none for null.
    Families without caps refuse the field with the others."""
    if default is None:
        return None
    if name not in fields.values:
        return default
    return fields.number(name) if fields.get(name) is not None else None


def _attention_scale(fields: _Fields, family: _Family) -> float | None:
    """What scores are multiplied with, None for the usual ``head_dim ** -0.5``."""
    if family.query_pre_attn_scalar is None:
        return None
    return fields.integer("query_pre_attn_scalar", family.query_pre_attn_scalar) ** -0.5


def _bias(fields: _Fields, name: str, always: bool | None, default: bool = False) -> bool:
    """Whether projections have a bias: as the field says or, where the family `always` has it one
    way, so; a field that contradicts that is refused."""
    bias = fields.flag(name, default if always is None else always)
    if always is not None and bias != always:
        fields.refuse(name, f"contradicts the family, where it is always {_shown(always)}")
    return bias


def _windows(fields: _Fields, family: _Family, layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer, None where it sees everything."""
    window = _window(fields, family)
    bound = _DEFAULT_MAX_WINDOW_LAYERS
    if family.sliding in _SWITCHED:
        bound = fields.whole("max_window_layers", bound)
    slides = {
        "from a layer": lambda layer: layer >= bound,
        "alternating": lambda layer: layer % 2 == 0,
        "alternating before a layer": lambda layer: layer % 2 == 0 and layer < bound,
    }.get(family.sliding, lambda layer: True)
    windows = tuple(window if slides(layer) else None for layer in range(layers))
    types = fields.get("layer_types")
    if types is None:
        return windows

    meaning = {"full_attention": None, "sliding_attention": window}
    if not isinstance(types, list) or not all(kind in meaning for kind in map(str, types)):
        fields.refuse("layer_types", f"must be a list of {' and '.join(meaning)}")
    if len(types) != layers:
        fields.refuse("layer_types", f"must have one entry for each of the {layers} layers")
    if "sliding_attention" in types and window is None:
        fields.refuse("layer_types", "has sliding_attention, but no sliding window is in use")
    by_type = tuple(meaning[kind] for kind in types)
    if family.sliding not in _BY_LAYER and by_type != windows:
        fields.refuse("layer_types", f"contradicts {family.name}, whose layers are all alike")
    return by_type


def _window(fields: _Fields, family: _Family) -> int | None:
    """The one width that the layers with a sliding window share, or None."""
    switched = family.sliding in _SWITCHED
    if switched and not fields.flag("use_sliding_window", False):
        fields.asked.add("sliding_window")
        return None
    window = None
    if family.sliding != "never":
        window = fields.optional_integer("sliding_window", absent=family.window)
    if window is None and family.needs_window:
        fields.refuse("sliding_window", "must be a positive whole number")
    if switched:
        return window
    # The others have no switch; where it stands, it must say what happens anyway.
    if fields.flag("use_sliding_window", window is not None) != (window is not None):
        fields.refuse("use_sliding_window", f"contradicts {family.name} with a window of {window}")
    if fields.values.get("use_sliding_window") is False:
        fields.asked |= {"sliding_window", "max_window_layers"}
    return window


def _rope(fields: _Fields, family: _Family, head_dim: int) -> tuple[Rope, int]:
    """The rotary embedding, and how many positions are usable with it."""
    positions = fields.integer("max_position_embeddings", family.max_position_embeddings)
    theta = fields.optional_number("rope_theta")
    original = fields.optional_integer("original_max_position_embeddings")
    sections = [fields.section("rope_scaling"), fields.section("rope_parameters")]
    given = [section for section in sections if section is not None]
    ropes = [
        _read_rope(section, theta, family.theta, positions, original)
        for section in given or [_Fields(family.rope, fields.source)]
    ]
    rope = ropes[0]
    if rope != ropes[-1]:
        fields.refuse("rope_scaling", "contradicts rope_parameters: keep the right one")
    if rope.theta <= 1:
        raise UserError(f"{fields.source}: rope_theta = {rope.theta:g} must be above 1")
    if rope.kind == "dynamic" and head_dim == 2:
        fields.refuse("head_dim", "must be at least 4 for dynamic rope, not 2")
    stretched = float(positions)
    if rope.kind in ("linear", "dynamic"):
        stretched = positions * rope.factor
    if rope.kind == "yarn":
        stretched = max(stretched, rope.original_positions * rope.factor)
    if stretched > MAX_POSITIONS:
        raise UserError(
            f"{fields.source}: factor = {rope.factor:g} of the rope makes {stretched:g} positions, "
            f"of which there can be at most {MAX_POSITIONS}"
        )
    return rope, int(stretched)


def _read_rope(
    section: _Fields,
    outer_theta: float | None,
    default_theta: float,
    positions: int,
    outer_original: int | None,
) -> Rope:
    """The rope that one object, rope_scaling or rope_parameters, describes. `outer_theta` and
    `outer_original` stand beside the object, the latter overruling what stands inside, as in
    transformers."""
    kind = section.text("rope_type", section.text("type", "default"))
    if kind not in _ROPE_KINDS:
        name = "rope_type" if section.values.get("rope_type") else "type"
        section.refuse(name, f"is not implemented: {', '.join(_ROPE_KINDS)} are")
    theta = section.optional_number("rope_theta")
    if theta is None:
        theta = default_theta if outer_theta is None else outer_theta
    elif outer_theta is not None and theta != outer_theta:
        section.refuse("rope_theta", f"contradicts rope_theta = {outer_theta:g} outside")
    inner_original = section.optional_integer("original_max_position_embeddings")
    original = outer_original or inner_original or positions
    section.asked.add("finetuned")  # a remark of the first yarn checkpoints

    if kind == "default":
        rope = Rope(kind, theta, original_positions=positions)
    elif kind in ("linear", "dynamic"):
        rope = Rope(kind, theta, section.number("factor"), original_positions=positions)
    elif kind == "llama3":
        rope = Rope(
            kind,
            theta,
            section.number("factor"),
            original,
            low_freq_factor=section.number("low_freq_factor"),
            high_freq_factor=section.number("high_freq_factor"),
        )
        if rope.high_freq_factor <= rope.low_freq_factor:
            section.refuse(
                "high_freq_factor", f"must be above low_freq_factor = {rope.low_freq_factor:g}"
            )
    else:  # yarn, where transformers, too, takes a zero for no value
        stretched = positions / original if original != positions else None
        rope = Rope(
            kind,
            theta,
            section.number("factor", stretched),
            original,
            beta_fast=section.optional_number("beta_fast") or 32.0,
            beta_slow=section.optional_number("beta_slow") or 1.0,
            attention_factor=section.optional_number("attention_factor"),
            mscale=section.optional_number("mscale") or None,
            mscale_all_dim=section.optional_number("mscale_all_dim") or None,
            truncate=section.flag("truncate", True),
        )
    if rope.factor < 1:
        section.refuse("factor", f"must be at least 1, not {rope.factor:g}")
    section.reject_unknown(f"rope type {kind}")
    return rope


def _eos_ids(
    fields: _Fields, generation: dict[str, Any] | None, family: _Family
) -> tuple[int, ...]:
    ids, source = _special(fields, generation, "eos_token_id", family.eos_id)
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(token) is int for token in ids):
        raise UserError(f"{source}: eos_token_id = {_shown(ids)} must be token ids")
    return tuple(ids)


def _bos_id(fields: _Fields, generation: dict[str, Any] | None, family: _Family) -> int | None:
    token, source = _special(fields, generation, "bos_token_id", family.bos_id)
    if token is not None and type(token) is not int:
        raise UserError(f"{source}: bos_token_id = {_shown(token)} must be a token id")
    return token


def _special(
    fields: _Fields, generation: dict[str, Any] | None, name: str, absent: int | None
) -> tuple[Any, str]:
    """The value of a special token's field, and the file that it is from."""
    if generation and generation.get(name) is not None:
        return generation[name], _beside(fields.source)
    return fields.get(name, absent), fields.source


def _beside(source: str) -> str:
    return f"generation_config.json beside {source}"
