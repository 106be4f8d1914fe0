"""The methods whose configuration is short: FP8, AWQ, GPTQ and MXFP4."""

from __future__ import annotations

from mpishard.config.fields import Fields
from mpishard.config.quantization.compressed_tensors import block_size
from mpishard.config.quantization.modules import (
    EVERY,
    Modules,
    compile_expression,
    of_transformers,
)
from mpishard.config.quantization.scheme import Quantization, Scheme

_COMMON = frozenset(
    "quant_method activation_scheme kv_cache_scheme dequantize backend meta".split()
)
_OF_AWQ = frozenset("do_fuse exllama_config fuse_max_seq_len modules_to_fuse sym desc_act".split())
_OF_GPTQ = frozenset(
    """
    act_group_aware batch_size block_name_to_quantize cache_block_outputs damp_auto_increment
    damp_percent dataset disable_exllama exllama_config lm_head max_input_length
    model_file_base_name model_name_or_path model_seqlen module_name_preceding_first_block
    modules_in_block_to_quantize mse parallel_packing static_groups sym tokenizer true_sequential
    use_cuda_fp16 use_exllama
    """.split()
)


def read_fp8(fields: Fields) -> Quantization:
    """FP8 as DeepSeek-V3 has it: by blocks or, with a null weight_block_size, by tensor."""
    fields.only("fmt", "e4m3", "float8_e4m3fn")
    fields.only("scale_fmt", "float", "ue8m0")
    whole = fields.get("weight_block_size") is None
    block = (None, None) if whole else block_size(fields, "weight_block_size")
    ignored = of_transformers(fields, "modules_to_not_convert")
    ignored |= of_transformers(fields, "ignored_layers")
    fields.reject_unknown("fp8", _COMMON)
    scheme = Scheme("fp8", block, scale="weight_scale_inv", other_scale="weight_scale")
    return _everywhere(fields, scheme, ignored)


def read_fbgemm(fields: Fields) -> Quantization:
    """FP8 with a scale for each row."""
    ignored = of_transformers(fields, "modules_to_not_convert")
    fields.reject_unknown("fbgemm_fp8", _COMMON | {"activation_scale_ub"})
    return _everywhere(fields, Scheme("fp8", (1, None)), ignored)


def read_awq(fields: Fields) -> Quantization:
    """AWQ, of which the gemm layout with four bits and zero points is read."""
    fields.only("bits", 4)
    fields.only("w_bit", 4)
    fields.only("zero_point", True)
    version = fields.text("version", fields.text("format", "gemm"))
    if version.lower() != "gemm":
        fields.refuse("version", "is not read: gemm is")
    group = _group_size(fields, "q_group_size" if "q_group_size" in fields.values else "group_size")
    ignored = of_transformers(fields, "modules_to_not_convert")
    fields.reject_unknown("awq", _COMMON | _OF_AWQ)
    return _everywhere(fields, Scheme("awq", (1, group), symmetric=False), ignored)


def read_gptq(fields: Fields) -> Quantization:
    """GPTQ with four bits, of both versions of the zero points."""
    if fields.get("bits") != 4:
        fields.refuse("bits", "is not read: 4 is")
    fields.only("pack_dtype", "int32")
    fields.only("is_marlin_format", False)
    name = "format" if "format" in fields.values else "checkpoint_format"
    version = fields.text(name, "gptq")
    if version not in ("gptq", "gptq_v2"):
        fields.refuse(name, "is not read: gptq and gptq_v2 are")
    fields.get("checkpoint_format")
    scheme = Scheme(
        "gptq",
        (1, _group_size(fields, "group_size")),
        symmetric=False,
        ordered=fields.flag("desc_act", False),
        zeros_less_one=version == "gptq",
    )
    ignored = _dynamic(fields) | of_transformers(fields, "modules_to_not_convert")
    fields.reject_unknown("gptq", _COMMON | _OF_GPTQ)
    return _everywhere(fields, scheme, ignored)


def _dynamic(fields: Fields) -> Modules:
    """The modules that GPTQModel's `dynamic` leaves out: its keys that begin with ``-:``."""
    section = fields.section("dynamic")
    patterns = []
    for key in section.values if section else ():
        if not key.startswith("-:"):
            fields.refuse("dynamic", "has modules with parameters of their own, not implemented")
        patterns.append(compile_expression(fields, "dynamic", key.removeprefix("-:")))
    return Modules(expressions=tuple(patterns))


def read_mxfp4(fields: Fields) -> Quantization:
    """MXFP4 as gpt-oss has it: only its experts."""
    ignored = of_transformers(fields, "modules_to_not_convert")
    fields.reject_unknown("mxfp4", _COMMON)
    return _everywhere(fields, Scheme("mxfp4", (1, 32)), ignored)


def _group_size(fields: Fields, name: str) -> int | None:
    """The inputs that share a scale; None for all, which is written as -1."""
    if fields.get(name) == -1:
        return None
    return fields.integer(name, 128)


def _everywhere(fields: Fields, scheme: Scheme, ignored: Modules) -> Quantization:
    return Quantization(fields.text("quant_method", ""), ((EVERY, scheme),), ignored)
