"""Reads what differs from layer to layer in a ``config.json``: windows, chunks, rotation."""

from __future__ import annotations

from mpishard.config.families.family import Family
from mpishard.config.fields import Fields

# Values of `Family.sliding` with which use_sliding_window must switch the window on, and with which
# layer_types may choose the layers.
_SWITCHED = (
    "from a layer",
    "alternating before a layer",
    "everywhere by a switch",
    "without rope by a switch",
)
_BY_LAYER = (
    "from a layer",
    "from a layer without a switch",
    "alternating before a layer",
    "alternating",
    "all but every nth",
    "without rope by a switch",
)


def read_windows(fields: Fields, family: Family, layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer, None for full attention. Raises UserError as
    `read_model_config` does."""
    window = _window(fields, family)
    bound = family.window_layers
    if family.sliding in (*_SWITCHED, "from a layer without a switch"):
        bound = fields.non_negative_integer("max_window_layers", bound)
    by_field = family.chunk is None and fields.get("layer_types") is not None
    windows = _by_type(fields, family, window, layers) if by_field else ()
    if by_field and family.sliding in _BY_LAYER:
        fields.asked.add(family.nth_field or "")
        return windows
    slides = _slides(fields, family, window, bound, layers)
    by_rule = tuple(window if slide else None for slide in slides)
    if by_field and windows != by_rule:
        fields.refuse("layer_types", f"contradicts {family.name}, whose layers are all alike")
    return by_rule


def read_chunks(fields: Fields, family: Family, layers: int) -> tuple[int | None, ...]:
    """The chunk of each layer, None for attention to all earlier positions. Raises UserError as
    `read_model_config` does."""
    if family.chunk is None:
        return (None,) * layers
    chunk = fields.optional_integer("attention_chunk_size", absent=family.chunk)
    types = fields.get("layer_types")
    if types is None:
        rotated = _rotated_by_field(fields, family, layers)
        return tuple(chunk if rotates else None for rotates in rotated)
    meaning = {"full_attention": None, "chunked_attention": chunk}
    if not isinstance(types, list) or not all(kind in meaning for kind in map(str, types)):
        fields.refuse("layer_types", f"must be a list of {' and '.join(meaning)}")
    if len(types) != layers:
        fields.refuse("layer_types", f"must have one entry for each of the {layers} layers")
    if "chunked_attention" in types and chunk is None:
        fields.refuse("layer_types", "has chunked_attention, but no attention_chunk_size")
    return tuple(meaning[kind] for kind in types)


def read_rotated(fields: Fields, family: Family, windows: tuple[int | None, ...]) -> list[bool]:
    """Whether each layer has a rotary embedding. Raises UserError as `read_model_config` does."""
    if family.rope_layers == "sliding" and any(windows):
        return [window is not None for window in windows]
    if family.rope_layers == "no_rope_layers":
        return _rotated_by_field(fields, family, len(windows))
    return [True] * len(windows)


def _slides(
    fields: Fields, family: Family, window: int | None, bound: int, layers: int
) -> list[bool]:
    """Whether each layer has a window by the family's rule. `bound` is max_window_layers."""
    if family.sliding in ("from a layer", "from a layer without a switch"):
        return [layer >= bound for layer in range(layers)]
    if family.sliding == "alternating before a layer":
        return [layer % 2 == 0 and layer < bound for layer in range(layers)]
    if family.sliding == "alternating":
        return [layer % 2 == 0 for layer in range(layers)]
    if family.sliding == "all but every nth":
        n = family.nth
        if family.nth_field and window is not None:
            n = fields.integer(family.nth_field, n)
        fields.asked.add(family.nth_field or "")
        return [(layer + 1) % n != 0 for layer in range(layers)]
    if family.sliding == "without rope by a switch":
        return [not rotated for rotated in _rotated_by_field(fields, family, layers)]
    return [True] * layers


def _rotated_by_field(fields: Fields, family: Family, layers: int) -> list[bool]:
    """What no_rope_layers says: 1 for a layer with rope; or else no_rope_layer_interval."""
    interval = fields.integer("no_rope_layer_interval", family.nth)
    rotated = fields.get("no_rope_layers")
    if rotated is None:
        return [(layer + 1) % interval != 0 for layer in range(layers)]
    if not isinstance(rotated, list) or not all(one in (0, 1) for one in rotated):
        fields.refuse("no_rope_layers", "must be a list of 1, for a layer with rope, and 0")
    if len(rotated) < layers:
        fields.refuse("no_rope_layers", f"must have an entry for each of the {layers} layers")
    return [bool(one) for one in rotated[:layers]]


def _by_type(
    fields: Fields, family: Family, window: int | None, layers: int
) -> tuple[int | None, ...]:
    """The window of each layer by layer_types."""
    types = fields.get("layer_types")
    meaning = {"full_attention": None, "sliding_attention": window}
    if not isinstance(types, list) or not all(kind in meaning for kind in map(str, types)):
        fields.refuse("layer_types", f"must be a list of {' and '.join(meaning)}")
    if len(types) != layers:
        fields.refuse("layer_types", f"must have one entry for each of the {layers} layers")
    if "sliding_attention" in types and window is None:
        fields.refuse("layer_types", "has sliding_attention, but no sliding window is in use")
    return tuple(meaning[kind] for kind in types)


def _window(fields: Fields, family: Family) -> int | None:
    """The width of the sliding window, the same in all layers that have one, or None."""
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
    # Other families have no switch. If the field is there, it must say what happens anyway.
    if fields.flag("use_sliding_window", window is not None) != (window is not None):
        fields.refuse("use_sliding_window", f"contradicts {family.name} with a window of {window}")
    if fields.values.get("use_sliding_window") is False:
        fields.asked |= {"sliding_window", "max_window_layers"}
    return window
