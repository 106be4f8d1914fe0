"""Reads a Hugging Face ``config.json`` into a `ModelConfig`.

Both spellings of the rotary embedding are read: `rope_parameters`, as transformers 5 writes it, and
the older `rope_theta` with `rope_scaling`. An absent field has the default of transformers'
configuration class for the family (`mpishard.config.families`).

A field that changes the mathematics in a way that is not implemented is refused, and so is an
unknown field: a model that is computed almost right writes fluent, wrong text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from mpishard.config.families.family import Family
from mpishard.config.fields import Answered, Fields, as_json
from mpishard.config.find_family import find_family
from mpishard.config.model_config import NO_ROPE, MLAConfig, ModelConfig
from mpishard.config.quantization.read import read_quantization
from mpishard.config.read_encoder import with_encoder
from mpishard.config.read_linear_attention import read_linear_attention
from mpishard.config.read_moe import read_moe
from mpishard.config.read_rope import read_ropes
from mpishard.config.read_windows import read_chunks, read_windows
from mpishard.errors import UserError

# No model has so many layers. A damaged number must not fill the memory with lists of layers before
# there is any weight to compare it with.
MOST_LAYERS = 10_000

_DEFAULT_Q_LORA_RANK = 1536

# Names in transformers' table of activations, and the name of the same function here.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}


def read_model_config(
    raw: dict[str, Any],
    generation: dict[str, Any] | None,
    source: str,
    ignore_config: Iterable[str] = (),
    quantization: dict[str, Any] | None = None,
) -> ModelConfig:
    """The configuration in `raw`, the content of the ``config.json`` that errors call `source`.

    `generation` is the content of ``generation_config.json``, or None; its end-of-sequence and
    beginning-of-sequence ids take precedence. The user answers for the fields of `ignore_config`,
    which are in the file, but which nothing implements. `quantization` is the content of
    ``hf_quant_config.json``, or None; it holds if `raw` has no `quantization_config`.

    Raises UserError, with `source`, the field and its value, if the file is inconsistent or needs
    something that is not implemented.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{source} must hold a JSON object, not {as_json(raw)}")
    if not isinstance(generation, dict | None):
        raise UserError(f"{_beside(source)} must hold a JSON object, not {as_json(generation)}")
    answered = Answered(ignore_config)
    family, fields, wrapper = find_family(Fields(raw, source, answered=answered))
    fields = fields.respelled(family.spellings, family.name)
    family = family.variant(fields) if family.variant else family
    for name in family.uniform:
        fields.unlist(name)
    hidden = fields.integer("hidden_size")
    layers = fields.integer("num_hidden_layers")
    if layers > MOST_LAYERS:
        fields.refuse("num_hidden_layers", f"must be at most {MOST_LAYERS}")
    heads = fields.integer("num_attention_heads")
    rope_dim = _rope_dim(fields, family, hidden, heads)
    linear = read_linear_attention(fields, layers) if family.linear_attention else None
    windows = (None,) * layers if linear else read_windows(fields, family, layers)
    if family.positions == "rope":
        ropes, max_position_embeddings, rotary_dim = read_ropes(fields, family, rope_dim, windows)
    else:
        ropes, rotary_dim = (NO_ROPE,) * layers, rope_dim
        max_position_embeddings = fields.integer(
            "max_position_embeddings", family.max_position_embeddings
        )
    mla = _mla(fields, family) if family.mla else None
    kv_heads = _kv_heads(fields, family, heads)
    bias = _bias(fields, family.qkv_bias_field, family.qkv_bias, family.qkv_bias_default)
    quantized = read_quantization(fields, quantization, family.quantization)
    if quantized and wrapper:
        quantized = replace(quantized, within=True)
    config = ModelConfig(
        family=family.name,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=1 if mla else kv_heads,
        head_dim=mla.qk_nope_head_dim + mla.qk_rope_head_dim if mla else rope_dim,
        ffn=_ffn(fields, family, hidden),
        vocab=fields.integer("vocab_size"),
        norm_eps=fields.number("rms_norm_eps", family.norm_eps),
        activation=_activation(fields, family),
        tied=fields.flag("tie_word_embeddings", family.tied),
        qkv_bias=bias and not mla,
        o_bias=_o_bias(fields, family, bias),
        mlp_bias=_bias(fields, family.mlp_bias_field, family.mlp_bias, family.mlp_bias_default),
        qk_norm=_qk_norm(fields, family),
        ropes=ropes,
        windows=windows,
        chunks=read_chunks(fields, family, layers),
        max_position_embeddings=max_position_embeddings,
        eos_ids=_eos_ids(fields, generation, family),
        bos_id=_bos_id(fields, generation, family),
        full_width_qk_norm=family.full_width_qk_norm,
        sinks=family.sinks,
        moe=read_moe(fields, family.moe, layers) if family.moe else None,
        mla=mla,
        norms=family.norms,
        norm_offset=family.norm_offset,
        layer_norm=family.layer_norm,
        norm_weight=family.norm_weight,
        norm_bias=family.norm_bias,
        embedding_norm=family.embedding_norm,
        per_head_norm=family.per_head_norm,
        parallel_residual=family.parallel_residual,
        learned_positions=(
            max_position_embeddings + family.position_offset if family.positions == "learned" else 0
        ),
        position_offset=family.position_offset,
        alibi={"alibi": "exact", "alibi in bfloat16": "in bfloat16"}.get(family.positions),
        clip_qkv=family.clip_qkv,
        inverse_layer_scale=family.inverse_layer_scale,
        head_bias=family.head_bias,
        attn_logit_softcapping=_softcap(fields, family, "attn_logit_softcapping"),
        final_logit_softcapping=_softcap(fields, family, "final_logit_softcapping"),
        attention_scale=_attention_scale(fields, family),
        linear_attention=linear,
        output_gate=family.output_gate,
        embedding_scale=(hidden**0.5 if family.scaled_embedding else 1.0)
        * _multiplier(fields, family, "embedding_multiplier"),
        residual_scale=_multiplier(fields, family, "residual_multiplier"),
        logits_scale=_logits_scale(fields, family),
        qk_l2_norm=family.qk_l2_norm and fields.flag("use_qk_norm", True),
        qk_norm_after_rope=family.qk_norm_after_rope or family.qk_l2_norm,
        partial_rotary_dim=None if rotary_dim == rope_dim else rotary_dim,
        rope_interleaved=bool(family.rope_interleaved_pairs) and not mla,
        gated_mlp=family.gated_mlp,
        stored_names=family.stored_names,
        quantization=quantized,
        wrapper=wrapper.name if wrapper else None,
        ignored_fields=answered.names,
        raw=raw,
    )
    if family.encoder:
        config = with_encoder(config, fields, family, generation, MOST_LAYERS)
    if config.qk_norm or config.full_width_qk_norm:
        fields.only("use_qk_norm", True)
    for name, value in family.fixed.items():
        fields.fixed(name, value, family.name)
    for name, other in family.same.items():
        fields.fixed(name, fields.get(other), family.name)
    fields.reject_unknown(family.name, family.ignored)
    answered.refuse_needless(raw, source)
    return config


def _rope_dim(fields: Fields, family: Family, hidden: int, heads: int) -> int:
    """The number of rotated elements of a head: all of them, except under latent attention."""
    if family.mla:
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
    fields.only("attention_head_dim", head_dim)  # as Hunyuan's published files call it
    rotates_all = family.positions == "rope" and family.partial_rotary_factor is None
    if head_dim % 2 and rotates_all:
        fields.refuse("head_dim", f"must be even for rope to pair its halves, not {head_dim}")
    if family.heads_fill_hidden and head_dim * heads != hidden:
        fields.refuse("head_dim", f"contradicts {family.name}, whose heads fill hidden_size")
    return head_dim


def _kv_heads(fields: Fields, family: Family, heads: int) -> int:
    kv_heads = fields.optional_integer("num_key_value_heads", absent=family.kv_heads)
    if kv_heads is None:
        return heads
    if heads % kv_heads:
        default = "" if "num_key_value_heads" in fields.values else f", {family.name}'s default"
        fields.refuse(
            "num_attention_heads",
            f"must be a multiple of num_key_value_heads = {kv_heads}{default}",
        )
    if family.mla and kv_heads != heads:
        fields.refuse("num_key_value_heads", f"must be num_attention_heads = {heads}")
    return kv_heads


def _mla(fields: Fields, family: Family) -> MLAConfig:
    qk_nope_head_dim = fields.integer("qk_nope_head_dim")
    rope_dim = fields.integer("qk_rope_head_dim")
    fields.only("qk_head_dim", qk_nope_head_dim + rope_dim)
    interleaved = family.rope_interleaved_pairs
    if interleaved is None:
        interleaved = fields.flag("rope_interleave", True)
    return MLAConfig(
        q_lora_rank=fields.optional_integer("q_lora_rank", absent=_DEFAULT_Q_LORA_RANK),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_nope_head_dim=qk_nope_head_dim,
        qk_rope_head_dim=rope_dim,
        v_head_dim=fields.integer("v_head_dim"),
        bias=fields.flag("attention_bias", False),
        interleaved=interleaved,
    )


def _activation(fields: Fields, family: Family) -> str:
    field = family.activation_field
    name = fields.text(field, family.activation)
    name = family.activation_meanings.get(name, name)
    if name not in _ACTIVATIONS:
        fields.refuse(field, f"is not implemented: {', '.join(_ACTIVATIONS)} are")
    if family.moe and family.moe.clamped and _ACTIVATIONS[name] != "silu":
        fields.refuse("hidden_act", f'contradicts {family.name}, where it is always "silu"')
    return _ACTIVATIONS[name]


def _qk_norm(fields: Fields, family: Family) -> bool:
    if family.qk_norm is None:
        return fields.flag("use_qk_norm", False)
    return family.qk_norm


def _softcap(fields: Fields, family: Family, name: str) -> float | None:
    """The soft cap in the field `name`: the family's if the field is absent, None if it is null or
    the family has no such field, which reject_unknown then refuses."""
    if name not in family.caps:
        return None
    if name not in fields.values:
        return family.caps[name]
    return fields.number(name) if fields.get(name) is not None else None


def _multiplier(fields: Fields, family: Family, name: str) -> float:
    """One of Granite's factors, 1 in a family without them, where reject_unknown refuses others."""
    return fields.number(name, 1.0) if family.multipliers else 1.0


def _logits_scale(fields: Fields, family: Family) -> float:
    """The factor of the logits, which Granite divides by and Cohere multiplies with."""
    if family.logit_scale is not None:
        return fields.number("logit_scale", family.logit_scale)
    return 1 / _multiplier(fields, family, "logits_scaling")


def _ffn(fields: Fields, family: Family, hidden: int) -> int:
    """The width of the feed-forward network."""
    multiple = family.ffn_multiple
    return fields.integer(family.ffn_field, family.ffn or (multiple and multiple * hidden))


def _attention_scale(fields: Fields, family: Family) -> float | None:
    """The factor of the attention scores, None for the usual ``head_dim ** -0.5``."""
    if family.attention_scale is not None:
        return family.attention_scale
    if family.multipliers:
        return _multiplier(fields, family, "attention_multiplier")
    if family.query_pre_attn_scalar is None:
        return None
    return fields.integer("query_pre_attn_scalar", family.query_pre_attn_scalar) ** -0.5


def _o_bias(fields: Fields, family: Family, bias: bool) -> bool:
    """Whether o_proj has a bias, if q, k and v have one or not."""
    if family.o_bias_field:
        return fields.flag(family.o_bias_field, family.o_bias)
    return bias and family.o_bias


def _bias(fields: Fields, name: str, always: bool | None, default: bool = False) -> bool:
    """Whether projections have a bias. If the family has no choice, `always` is its value, and a
    field that contradicts it is refused (UserError)."""
    bias = fields.flag(name, default if always is None else always)
    if always is not None and bias != always:
        fields.refuse(name, f"contradicts the family, where it is always {as_json(always)}")
    return bias


def _eos_ids(fields: Fields, generation: dict[str, Any] | None, family: Family) -> tuple[int, ...]:
    ids, source = _special(fields, generation, "eos_token_id", family.eos_id)
    ids = list(ids) if isinstance(ids, list | tuple) else [] if ids is None else [ids]
    if not all(type(token) is int for token in ids):
        raise UserError(f"{source}: eos_token_id = {as_json(ids)} must be token ids")
    return tuple(ids)


def _bos_id(fields: Fields, generation: dict[str, Any] | None, family: Family) -> int | None:
    token, source = _special(fields, generation, "bos_token_id", family.bos_id)
    if token is not None and type(token) is not int:
        raise UserError(f"{source}: bos_token_id = {as_json(token)} must be a token id")
    return token


def _special(
    fields: Fields,
    generation: dict[str, Any] | None,
    name: str,
    absent: int | tuple[int, ...] | None,
) -> tuple[Any, str]:
    """The value of a special token's field, and the file that has it."""
    if generation and generation.get(name) is not None:
        return generation[name], _beside(fields.source)
    return fields.get(name, absent), fields.source


def _beside(source: str) -> str:
    return f"generation_config.json beside {source}"
