"""Reads the rotary embedding in a ``config.json``."""

from __future__ import annotations

from mpishard.config.families.family import Family
from mpishard.config.fields import Fields
from mpishard.config.model_config import MAX_POSITIONS, Rope
from mpishard.errors import UserError

_ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


def read_rope(fields: Fields, family: Family, head_dim: int) -> tuple[Rope, int]:
    """The rotary embedding, and the number of positions that are usable with it. Raises UserError
    as `read_model_config` does."""
    positions = fields.integer("max_position_embeddings", family.max_position_embeddings)
    theta = fields.optional_number("rope_theta")
    original = fields.optional_integer("original_max_position_embeddings")
    sections = [fields.section("rope_scaling"), fields.section("rope_parameters")]
    given = [section for section in sections if section is not None]
    ropes = [
        _read_section(section, theta, family.theta, positions, original)
        for section in given or [Fields(family.rope, fields.source)]
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


def _read_section(
    section: Fields,
    outer_theta: float | None,
    default_theta: float,
    positions: int,
    outer_original: int | None,
) -> Rope:
    """The rotary embedding in one object, rope_scaling or rope_parameters.

    `outer_theta` and `outer_original` are fields beside the object. The latter takes precedence
    over the field inside, as in transformers."""
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
    section.asked.add("finetuned")  # only a remark, in the first yarn checkpoints

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
    else:  # yarn; a zero means no value, as in transformers
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
