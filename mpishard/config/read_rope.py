"""Reads the rotary embeddings in a ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mpishard.config.families.family import Family
from mpishard.config.fields import Fields
from mpishard.config.model_config import MAX_POSITIONS, NO_ROPE, Rope
from mpishard.config.read_windows import read_rotated
from mpishard.errors import UserError

_ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def read_ropes(
    fields: Fields, family: Family, head_dim: int, windows: tuple[int | None, ...]
) -> tuple[tuple[Rope, ...], int, int]:
    """The rotary embedding of each layer, the number of positions that are usable with it, and the
    number of rotated elements of a head of `head_dim`. Raises UserError as `read_model_config`
    does."""
    positions = fields.integer("max_position_embeddings", family.max_position_embeddings)
    original = fields.optional_integer("original_max_position_embeddings")
    reader = _Reader(family, positions, original or family.original_positions)
    scaling = fields.section("rope_scaling")
    parameters = fields.section("rope_parameters")
    theta = fields.optional_number("rope_theta")
    partial = None
    if family.partial_rotary_factor is not None:
        partial = fields.optional_number("partial_rotary_factor")
        if family.rotary_dim and "rotary_dim" in fields.values:
            partial = fields.integer("rotary_dim") / head_dim
    if family.sliding_theta is None:
        sections = [scaling, parameters]
        full = sliding = reader.read(fields, sections, theta, family.theta)
    else:
        local_theta = None
        if family.sliding_theta_field:
            local_theta = fields.optional_number(family.sliding_theta_field)
        by_type = parameters or Fields({}, fields.source)
        sections = [scaling, by_type.section("full_attention")]
        full = reader.read(fields, sections, theta, family.theta)
        sections.append(by_type.section("sliding_attention"))
        sliding = reader.read(fields, sections[2:], local_theta, family.sliding_theta)
        by_type.reject_unknown(f"{family.name}, which has full_attention and sliding_attention")
    rotary_dim = _rotary_dim(fields, family, head_dim, partial, sections)
    for rope in (full, sliding):
        _check(fields, rope, rotary_dim)
    stretched = _stretched(fields, full, positions)
    rotated = read_rotated(fields, family, windows)
    unrotated = _unrotated(fields, family)
    ropes = tuple(
        (full if window is None else sliding) if rotates else unrotated
        for window, rotates in zip(windows, rotated, strict=True)
    )
    return ropes, stretched, rotary_dim


def _unrotated(fields: Fields, family: Family) -> Rope:
    """What layers without rope have: with `Family.temperature`, queries that grow with their
    position."""
    if not family.temperature:
        return NO_ROPE
    length = fields.integer("floor_scale", 8192)
    beta = fields.optional_number("attn_scale")
    if not fields.flag("attn_temperature_tuning", True):
        return NO_ROPE
    return Rope(
        "none",
        original_positions=length,
        query_scale_beta=0.1 if beta is None else beta,
        query_scale_offset=1,
    )


def _rotary_dim(
    fields: Fields,
    family: Family,
    head_dim: int,
    outer: float | None,
    sections: list[Fields | None],
) -> int:
    """The number of rotated elements of a head: its even part by partial_rotary_factor, which is a
    field of the `sections` or the `outer` one beside them."""
    if family.partial_rotary_factor is None:
        return head_dim
    inner = [section.optional_number("partial_rotary_factor") for section in sections if section]
    given = [one for one in inner if one is not None]
    partial = given[0] if given else outer
    if partial is None:
        partial = family.partial_rotary_factor
    rotary_dim = int(head_dim * partial)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise UserError(
            f"{fields.source}: partial_rotary_factor = {partial:g} must leave an even number of "
            f"the head's {head_dim} elements to rotate, not {rotary_dim}"
        )
    return rotary_dim


def _check(fields: Fields, rope: Rope, rotary_dim: int) -> None:
    if rope.theta <= 1:
        raise UserError(f"{fields.source}: rope_theta = {rope.theta:g} must be above 1")
    if rope.kind in ("dynamic", "ntk_alpha") and rotary_dim == 2:
        fields.refuse("head_dim", "must be at least 4 for dynamic rope, not 2")
    if rope.kind == "longrope" and rope.original_positions == 1:
        fields.refuse("original_max_position_embeddings", "must be above 1 for longrope")
    for name, factors in (("short", rope.short_factors), ("long", rope.long_factors)):
        if rope.kind == "longrope" and len(factors) != rotary_dim // 2:
            raise UserError(
                f"{fields.source}: {name}_factor of the rope has {len(factors)} numbers, "
                f"but heads have {rotary_dim // 2} pairs to rotate"
            )


def _stretched(fields: Fields, rope: Rope, positions: int) -> int:
    """The number of positions that are usable with `rope`."""
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
    return int(stretched)


@dataclass(frozen=True)
class _Reader:
    """Reads one rotary embedding. `original` is original_max_position_embeddings beside the object
    that describes it. It takes precedence over the field inside, as in transformers."""

    family: Family
    positions: int
    original: int | None

    def read(
        self,
        fields: Fields,
        sections: list[Fields | None],
        theta: float | None,
        default_theta: float,
    ) -> Rope:
        """The rotary embedding in the `sections`, which are two spellings of it, or the family's
        default. `theta` is rope_theta beside them."""
        given = [section for section in sections if section is not None]
        ropes = [
            self._read_section(section, theta, default_theta)
            for section in given or [Fields(self.family.rope, fields.source)]
        ]
        if ropes[0] != ropes[-1]:
            fields.refuse("rope_scaling", "contradicts rope_parameters: keep the right one")
        return ropes[0]

    def _read_section(
        self, section: Fields, outer_theta: float | None, default_theta: float
    ) -> Rope:
        """The rotary embedding in one object, rope_scaling or rope_parameters."""
        positions = self.positions
        kind = section.text("rope_type", section.text("type", "default"))
        kind = self.family.rope_types.get(kind, kind)
        if kind not in _ROPE_KINDS:
            name = "rope_type" if section.values.get("rope_type") else "type"
            section.refuse(name, f"is not implemented: {', '.join(_ROPE_KINDS)} are")
        theta = section.optional_number("rope_theta")
        if theta is None:
            theta = default_theta if outer_theta is None else outer_theta
        elif outer_theta is not None and theta != outer_theta:
            section.refuse("rope_theta", f"contradicts rope_theta = {outer_theta:g} outside")
        inner_original = section.optional_integer("original_max_position_embeddings")
        original = self.original or inner_original or positions
        section.asked.add("finetuned")  # only a remark, in the first yarn checkpoints

        if kind == "default":
            rope = Rope(kind, theta, original_positions=positions)
        elif kind == "dynamic" and self.family.rope_alpha and section.values.get("alpha"):
            # A fixed stretch, which does not depend on the length of the sequence.
            alpha = section.number("alpha")
            rope = Rope("ntk_alpha", theta, alpha, original_positions=positions)
            section.asked |= {"factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
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
            if rope.high_freq_factor < rope.low_freq_factor:
                low = f"{rope.low_freq_factor:g}"
                section.refuse("high_freq_factor", f"must be at least low_freq_factor = {low}")
        elif kind == "longrope":
            rope = Rope(
                kind,
                theta,
                section.optional_number("factor") or max(1.0, positions / original),
                original,
                attention_factor=section.optional_number("attention_factor"),
                short_factors=section.numbers("short_factor"),
                long_factors=section.numbers("long_factor"),
            )
            if self.family.rope_mscales:
                mscales = section.number("short_mscale"), section.number("long_mscale")
                rope = replace(rope, mscales=mscales, long_factors=rope.short_factors)
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
        if self.family.query_scale:
            beta = section.optional_number("llama_4_scaling_beta") or 0.0
            rope = replace(rope, query_scale_beta=beta, original_positions=original)
            section.asked.add("max_position_embeddings")  # the same as outside
        if self.family.partial_rotary_factor is not None:
            section.asked.add("partial_rotary_factor")
        if rope.factor < 1:
            section.refuse("factor", f"must be at least 1, not {rope.factor:g}")
        section.reject_unknown(f"rope type {kind}")
        return rope
