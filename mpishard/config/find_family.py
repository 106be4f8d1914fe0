"""Finds the family of a ``config.json``, and in a multimodal one the fields of the language model.

`architectures` names the family, and `model_type` where a file has no architectures.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mpishard.config.families import FAMILIES
from mpishard.config.families.family import Family
from mpishard.config.families.wrappers import WRAPPERS, Wrapper
from mpishard.config.fields import Fields
from mpishard.config.known_fields import DEFAULT_SIZES, WRAPPER_FIELDS

_BY_MODEL_TYPE = {
    name: family for family in FAMILIES.values() for name in (family.name, *family.aliases)
}
_BY_ARCHITECTURE = {
    name: family
    for family in FAMILIES.values()
    for name in (family.architecture, *family.architecture_aliases)
}
_WRAPPERS = {name: wrapper for wrapper in WRAPPERS for name in wrapper.architectures}
_WRAPPERS_BY_MODEL_TYPE = {wrapper.name: wrapper for wrapper in WRAPPERS}

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
# Fields that a wrapper may have in place of its language model.
_SHARED = (
    *("eos_token_id", "bos_token_id", "tie_word_embeddings"),
    *("quantization_config", "compression_config"),
)
# Words in the names of a wrapper's fields that do not concern its language model.
_OF_TOWERS = frozenset("vision visual image video media audio projector mm".split())
_LISTED = "the README lists those that are"


def find_family(fields: Fields) -> tuple[Family, Fields, Wrapper | None]:
    """The family, its fields, and the wrapper around it in a multimodal checkpoint.

    Raises UserError for an unknown architecture or model type, for a wrapper without the fields of
    its language model, and for unknown fields of a wrapper.
    """
    names, kind = fields.get("architectures"), fields.get("model_type")
    if kind is not None and type(kind) is not str:
        fields.refuse("model_type", "must be a string")
    if not names and (names is None or isinstance(names, list)):
        return _by_model_type(fields, kind)
    if not isinstance(names, list) or len(names) != 1 or type(names[0]) is not str:
        fields.refuse("architectures", "must be a list of one name")
    if names[0] in _WRAPPERS:
        wrapper = _WRAPPERS[names[0]]
        if kind not in (None, wrapper.name):
            fields.refuse("model_type", f'must be "{wrapper.name}", as architectures is {names[0]}')
        return _unwrapped(fields, wrapper)
    if names[0] not in _BY_ARCHITECTURE:
        fields.refuse("architectures", f"is not implemented; {_LISTED}")
    family = _BY_ARCHITECTURE[names[0]]
    if kind not in (None, family.name, *family.aliases):
        fields.refuse("model_type", f'must be "{family.name}", as architectures is {names[0]}')
    return family, fields, None


def _by_model_type(fields: Fields, kind: str | None) -> tuple[Family, Fields, Wrapper | None]:
    if kind is None:
        fields.refuse("architectures", "is missing, and so is model_type: one must name the family")
    if kind in _WRAPPERS_BY_MODEL_TYPE:
        return _unwrapped(fields, _WRAPPERS_BY_MODEL_TYPE[kind])
    if kind not in _BY_MODEL_TYPE:
        fields.refuse("model_type", f"is not implemented; {_LISTED}")
    return _BY_MODEL_TYPE[kind], fields, None


def _unwrapped(outer: Fields, wrapper: Wrapper) -> tuple[Family, Fields, Wrapper]:
    inner = outer.section("text_config")
    is_flat = inner is None and wrapper.flat
    if inner is None and not is_flat:
        outer.refuse("text_config", "is missing: it must hold the fields of the language model")
    default = next(iter(wrapper.families))
    values = dict(outer.values) if inner is None else inner.values
    kind = values.get("model_type") or default
    kind = kind if isinstance(kind, str) else ""
    if is_flat:
        values = {name: value for name, value in values.items() if not _is_of_tower(name)}
    fields = Fields(
        _completed(values, outer.values, wrapper, kind),
        outer.source,
        within="" if inner is None else inner.within,
        answered=outer.answered,
    )
    fields.asked |= {"architectures", "model_type"}
    name = wrapper.families.get(kind, "")
    if name not in _BY_MODEL_TYPE:
        fields.refuse("model_type", f"is not implemented in {wrapper.name}; {_LISTED}")
    for field, value in wrapper.always.items():
        fields.only(field, value)
    if not is_flat:
        of_towers = {field for field in outer.values if _is_of_tower(field)}
        known = WRAPPER_FIELDS[wrapper.name] | of_towers | wrapper.ignored | set(_SHARED)
        outer.reject_unknown(wrapper.name, frozenset(known))
    return _inside(wrapper, _BY_MODEL_TYPE[name]), fields, wrapper


def _inside(wrapper: Wrapper, family: Family) -> Family:
    """A family as the checkpoints of a wrapper store it."""
    if not (wrapper.transposed_experts and family.moe):
        return family
    names = family.moe.names
    names = replace(names, stacked=replace(names.stacked, transposed=True))
    return replace(family, moe=replace(family.moe, names=names))


def _is_of_tower(name: str) -> bool:
    return not _OF_TOWERS.isdisjoint(name.split("_"))


def _completed(
    values: dict[str, Any], outer: dict[str, Any], wrapper: Wrapper, kind: str
) -> dict[str, Any]:
    """The fields of the language model, with those that the file leaves to defaults, and those that
    stand outside."""
    sizes = dict(zip(_SIZES, DEFAULT_SIZES.get(kind, ()), strict=False))
    merged = sizes | wrapper.defaults | wrapper.always | values
    for name in _SHARED:
        if merged.get(name) is None and outer.get(name) is not None:
            merged[name] = outer[name]
    # transformers asks the wrapper. If nobody says, the head decides: see `Checkpoint.open`.
    for tied in (outer.get("tie_word_embeddings"), merged.get("tie_word_embeddings"), True):
        if tied is not None:
            merged["tie_word_embeddings"] = tied
            break
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(merged.get(name), dict):
            merged[name] = _without_mrope(merged[name])
            if "rope_theta" in merged[name] and "rope_theta" not in values:
                merged.pop("rope_theta", None)
    return merged


def _without_mrope(rope: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding of text, in which all three positions of a token are the same."""
    return {
        name: "default" if name in ("type", "rope_type") and value == "mrope" else value
        for name, value in rope.items()
        if not name.startswith("mrope_")
    }
