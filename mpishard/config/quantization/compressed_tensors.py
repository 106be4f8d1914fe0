"""The configuration that llm-compressor and compressed-tensors write: groups of modules, and how
the weights of each group are stored."""

from __future__ import annotations

from mpishard.config.fields import Fields
from mpishard.config.quantization.modules import Modules, of_compressed_tensors
from mpishard.config.quantization.scheme import Quantization, Scheme

# The form of each format of a group, by the type and the bits of its weights.
_FORMS = {
    ("float-quantized", "float", 8): "fp8",
    ("naive-quantized", "float", 8): "fp8",
    ("int-quantized", "int", 8): "int8",
    ("naive-quantized", "int", 8): "int8",
    ("pack-quantized", "int", 4): "packed",
    ("pack-quantized", "int", 8): "packed",
    ("nvfp4-pack-quantized", "float", 4): "nvfp4",
    ("mxfp4-pack-quantized", "float", 4): "mxfp4-packed",
}
_GROUP_SIZES = {"nvfp4": 16, "mxfp4-packed": 32}

# How weights were rounded, and what is done to activations, which stay in float32 here.
_WITHOUT_EFFECT = frozenset(
    "dynamic observer observer_kwargs scale_dtype zp_dtype input_activations output_activations "
    "kv_cache_scheme global_compression_ratio quantization_status version".split()
)


def read_compressed_tensors(fields: Fields) -> Quantization:
    """Raises UserError for formats, bits and transforms that are not read."""
    fields.only("quantization_status", "compressed")
    sparsity = fields.section("sparsity_config")
    if sparsity:
        sparsity.only("format", "dense")
    for name in ("transform_config", "moe_sparsity_config"):
        if fields.section(name):
            fields.refuse(name, "is not implemented")
    groups = fields.section("config_groups")
    if groups is None and fields.get("config_groups") is None:
        fields.refuse("config_groups", "is missing: it must say how weights are stored")
    top = fields.text("format", "")
    found = [_group(groups, name, top) for name in groups.values] if groups else []
    ignored = of_compressed_tensors(fields, "ignore")
    fields.reject_unknown("compressed-tensors", _WITHOUT_EFFECT)
    schemes = tuple(one for one in found if one is not None)
    return Quantization("compressed-tensors", schemes, ignored)


def _group(groups: Fields, name: str, top: str) -> tuple[Modules, Scheme] | None:
    """The modules and the scheme of a group; None if it leaves the weights as they are."""
    group = groups.section(name)
    weights = group.section("weights") if group else None
    if group is None or weights is None:
        return None
    form = group.text("format", top)
    kind, bits = weights.text("type", "int"), weights.integer("num_bits", 8)
    if (form, kind, bits) not in _FORMS:
        readable = ", ".join(f"{one[0]} with {one[1]}{one[2]}" for one in _FORMS)
        weights.refuse("num_bits", f"with {kind} in the format {form} is not read: {readable} are")
    scheme = Scheme(
        _FORMS[form, kind, bits],
        _block(weights, _FORMS[form, kind, bits]),
        bits=bits,
        symmetric=weights.flag("symmetric", True),
        ordered=weights.get("actorder") == "group",
    )
    weights.only("actorder", "group", "weight", "static", "dynamic", False, True)
    weights.reject_unknown("compressed-tensors", _WITHOUT_EFFECT)
    modules = of_compressed_tensors(group, "targets")
    group.reject_unknown("compressed-tensors", _WITHOUT_EFFECT)
    return modules, scheme


def _block(weights: Fields, form: str) -> tuple[int | None, int | None]:
    """The rows and columns that share a scale."""
    size = weights.optional_integer("group_size")
    strategy = weights.text("strategy", "tensor" if size is None else "group")
    if form in _GROUP_SIZES:
        weights.only("group_size", _GROUP_SIZES[form])
        weights.only("strategy", "group", "tensor_group")
        return 1, _GROUP_SIZES[form]
    if strategy == "block":
        return block_size(weights, "block_structure")
    if strategy in ("group", "tensor_group"):
        return 1, weights.integer("group_size")
    if strategy not in ("channel", "tensor"):
        weights.refuse("strategy", "is not read: tensor, channel, group and block are")
    return (1, None) if strategy == "channel" else (None, None)


def block_size(fields: Fields, name: str) -> tuple[int, int]:
    """The rows and columns of a block."""
    value = fields.get(name)
    sizes = value if isinstance(value, list) else []
    if len(sizes) != 2 or not all(type(one) is int and one > 0 for one in sizes):
        fields.refuse(name, "must be the rows and columns of a block, such as [128, 128]")
    return sizes[0], sizes[1]
