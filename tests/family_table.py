"""How the families differ from the llama decoder, as rows of a table, and their names.

``docs/families.md`` and the README show them; ``python tests/pages.py`` rewrites these pages.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

from mpishard.config.families import FAMILIES
from mpishard.config.families.family import Family
from mpishard.config.model_config import ExpertNames, LayerNormNames

# Fields of `Family` that change no mathematics, or that are defaults of sizes and ids alone.
_NO_MATHEMATICS = frozenset(
    """
    architecture name aliases max_position_embeddings kv_heads head_dim bos_id eos_id norm_eps tied
    activation_field activation_meanings window window_layers needs_window theta rope rope_types
    original_positions same uniform quantization ignored fixed heads_fill_hidden nth nth_field
    sliding_theta_field o_bias_field qkv_bias_field qkv_bias_default rotary_dim spellings variant
    ffn ffn_field architecture_aliases ffn_multiple mlp_bias_field mlp_bias_default
    encoder_stored_names encoder_moe_names
    """.split()
)
_NORMS = {
    (True, True): "norms before and after each sub-layer",
    (False, True): "norms after each sub-layer, none before",
    (False, False): "no norms beside the last",
}


def table() -> str:
    """The rows of all families, in Markdown."""
    rows = [
        f"| {family.name} | {architecture} | {'; '.join(_differences(family)) or 'nothing'} |"
        for architecture, family in FAMILIES.items()
    ]
    head = "| family | architecture | what it has that llama has not |"
    return "\n".join([head, "|---|---|---|", *rows])


def names() -> str:
    """The names of all families, in lines of Markdown."""
    dense = [family.name for family in FAMILIES.values() if family.moe is None]
    mixtures = [family.name for family in FAMILIES.values() if family.moe is not None]
    lists = f"- dense: {', '.join(dense)}", f"- MoE: {', '.join(mixtures)}"
    return "\n".join(textwrap.fill(one, 120, subsequent_indent="  ") for one in lists)


def _differences(family: Family) -> Iterator[str]:
    for one in fields(Family):
        value = getattr(family, one.name)
        default = one.default
        if one.default_factory is not MISSING:
            default = one.default_factory()
        if one.name == "o_bias" and family.qkv_bias is False:
            continue  # it has none either
        if value != default and one.name not in _NO_MATHEMATICS:
            yield _phrase(family, one.name, value)


def _phrase(family: Family, name: str, value: Any) -> str:
    nth = f"{family.nth}th"
    phrases: dict[str, Any] = {
        "qkv_bias": "biases on q, k and v" if value else "no biases in attention",
        "o_bias": "a bias on o by a field of its own" if family.o_bias_field else "no bias on o",
        "qk_norm": f"norms of each head of q and k{'' if value else ' (a field)'}",
        "qk_norm_after_rope": "these after rope",
        "full_width_qk_norm": "norms over all heads of q and of k",
        "qk_l2_norm": "norms of q and k without a weight, after rope",
        "chunk": "attention within chunks in layers with rope",
        "temperature": "queries that grow with their position in layers without rope",
        "sinks": "attention sinks",
        "output_gate": "gated attention: its output times sigmoid(gate x)",
        "linear_attention": "gated delta nets in the layers of linear_attention",
        "mla": "multi-head latent attention",
        "sliding": f"sliding window: {str(value).replace('nth', nth)}",
        "rope_interleaved_pairs": "rope on pairs of neighbours" + ("" if value else " (a field)"),
        "partial_rotary_factor": f"rope on a part of each head, {value:g} unless a field says so"
        if isinstance(value, float)
        else "",
        "rope_layers": {
            "sliding": "rope only in layers with a window, if there are any",
            "no_rope_layers": f"no rope in every {nth} layer (a field)",
        }.get(str(value)),
        "sliding_theta": f"layers with a window have a rope of their own, of theta {value}",
        "query_scale": "queries that grow with their position",
        "rope_mscales": "longrope with scales of its own, and its short factors at all lengths",
        "rope_alpha": "a dynamic rope of fixed stretch",
        "forms": f"by fields: {value}",
        "positions": {
            "learned": "learned positions",
            "alibi": "ALiBi in place of positions",
            "relative": "relative position biases in place of positions",
        }.get(str(value)),
        "encoder": "an encoder, to whose outputs every layer of the decoder attends",
        "attention_scale": f"scores times {value}",
        "position_offset": f"position 0 in row {value}",
        "layer_norm": "LayerNorm",
        "norm_weight": "norms without weight",
        "norm_bias": "norms with a bias",
        "embedding_norm": "a norm of the embedding",
        "parallel_residual": "a parallel residual",
        "logit_scale": f"logits times {value} unless a field says otherwise",
        "head_bias": "a bias on the head",
        "mlp_bias": "biases in the feed-forward network" + ("" if value else " (a field)"),
        "activation": f"activation {value}",
        "gated_mlp": "a feed-forward network without a gate",
        "stored_names": ", ".join(_stored(family)),
        "moe": "experts: " + ", ".join(_experts(family)) if family.moe else "",
        "norms": _where(family.norms),
        "norm_offset": f"norms times {value} + weight",
        "scaled_embedding": "embeddings times the root of their width",
        "multipliers": "factors of embeddings, sub-layers, scores and logits",
        "caps": "soft caps of " + " and ".join(_CAPPED[cap] for cap in family.caps),
        "query_pre_attn_scalar": f"scores divided by the root of query_pre_attn_scalar, {value}",
    }
    return phrases.get(name) or f"{name} = {value}"


def _stored(family: Family) -> Iterator[str]:
    names = family.stored_names
    if names.qkv:
        yield f"q, k and v in one tensor{' by key/value head' if names.qkv_by_kv_head else ''}"
    if names.gate_up or names.shared_gate_up:
        yield "gate and up in one tensor"
    if names.each_head:
        yield "norms of q and k with a tensor for each head"
    if names.transposed:
        yield "transposed matrices"
    if names.modules or names.layers != "layers":
        yield "other names of tensors"
    if names.unused:
        yield "layers that are not used"


_CAPPED = {"attn_logit_softcapping": "scores", "final_logit_softcapping": "logits"}


def _where(norms: LayerNormNames) -> str:
    if norms == LayerNormNames(ffn=None):
        return "one norm for both sub-layers"
    return _NORMS.get((norms.attention is not None, norms.attention_post is not None), "")


def _experts(family: Family) -> Iterator[str]:
    moe = family.moe
    assert moe is not None
    yield f"scores by {moe.scoring}"
    if moe.normalized:
        yield "normalized"
    if moe.choice != "top k":
        yield f"chosen by {moe.choice}"
    if moe.names.e_score_correction_bias:
        yield "with a bias for the choice"
    if moe.shared:
        yield "a shared one" + (" with a gate" if moe.names.shared_gate else "")
    if moe.dense != "never":
        yield f"dense layers {moe.dense}"
    if moe.top_k:
        yield f"always {moe.top_k} for a token"
    if moe.capacity:
        yield "so many tokens of a sequence and no more"
    if moe.biases:
        yield "with biases"
    if moe.scale_inputs:
        yield "weights multiply the inputs"
    if moe.clamped:
        yield "a clamped activation"
    if moe.names != ExpertNames() and moe.names.separate is None:
        yield "stored together"
