"""The configuration that NVIDIA's ModelOpt writes, into ``config.json`` or, in older checkpoints,
only into ``hf_quant_config.json`` beside it."""

from __future__ import annotations

from mpishard.config.fields import Fields
from mpishard.config.quantization.modules import EVERY, Modules, of_modelopt, strings
from mpishard.config.quantization.scheme import Quantization, Scheme

_SCHEMES = {
    "FP8": Scheme("fp8"),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme("fp8", (1, None)),
    "FP8_PB_WO": Scheme("fp8", (128, 128)),
    "NVFP4": Scheme("nvfp4-modelopt", (1, 16)),
    "W4A16_NVFP4": Scheme("nvfp4-modelopt", (1, 16)),
}
_MIXED = "MIXED_PRECISION"

# The same again in another spelling, bookkeeping, and what is done to activations and the cache.
_WITHOUT_EFFECT = frozenset(
    "config_groups producer quant_method kv_cache_scheme kv_cache_quant_algo "
    "activation_scheme".split()
)


def read_modelopt(fields: Fields) -> Quantization:
    """Raises UserError for a quant_algo that is not read."""
    algorithm = fields.text("quant_algo", "").upper()
    fields.only("has_zero_point", False)
    fields.only("pre_quant_scale", False)
    layers = fields.section("quantized_layers")
    if algorithm == _MIXED:
        if layers is None:
            fields.refuse("quantized_layers", "is missing: it must say how each layer is stored")
        schemes = tuple(_layer(layers, name) for name in layers.values)
    elif "quant_algo" in fields.values and fields.get("quant_algo") is None:
        schemes = ()  # only the cache is quantized
    else:
        schemes = ((EVERY, _scheme(fields)),)
    ignored = of_modelopt(strings(fields, "ignore") + strings(fields, "exclude_modules"))
    fields.reject_unknown("modelopt", _WITHOUT_EFFECT)
    return Quantization("modelopt", schemes, ignored)


def _layer(layers: Fields, name: str) -> tuple[Modules, Scheme]:
    layer = layers.section(name)
    if layer is None:
        layers.refuse(name, "must be an object with its quant_algo")
    return of_modelopt([name]), _scheme(layer)


def _scheme(fields: Fields) -> Scheme:
    algorithm = fields.text("quant_algo", "").upper()
    if algorithm not in _SCHEMES:
        readable = ", ".join((*_SCHEMES, _MIXED))
        fields.refuse("quant_algo", f"is not read: {readable} are")
    scheme = _SCHEMES[algorithm]
    if scheme.block[1] is not None:
        fields.only("group_size", scheme.block[1])
    else:
        fields.get("group_size")
    return scheme
