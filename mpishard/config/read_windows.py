"""Reads the sliding window of each layer in a ``config.json``."""

from __future__ import annotations

from mpishard.config.families.family import Family
from mpishard.config.fields import Fields

# Values of `Family.sliding` with which use_sliding_window must switch the window on, and with which
# layer_types may choose the layers.
_SWITCHED = ("from a layer", "alternating before a layer", "everywhere by a switch")
_BY_LAYER = ("from a layer", "alternating before a layer", "alternating")

_DEFAULT_MAX_WINDOW_LAYERS = 28


def read_windows(fields: Fields, family: Family, layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer, None for full attention. Raises UserError as
    `read_model_config` does."""
    window = _window(fields, family)
    bound = _DEFAULT_MAX_WINDOW_LAYERS
    if family.sliding in _SWITCHED:
        bound = fields.non_negative_integer("max_window_layers", bound)
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
