"""Reads ``quantization_config`` into a `Quantization`."""

from __future__ import annotations

from typing import Any

from mpishard.config.fields import Fields
from mpishard.config.quantization.compressed_tensors import read_compressed_tensors
from mpishard.config.quantization.methods import (
    read_awq,
    read_fbgemm,
    read_fp8,
    read_gptq,
    read_mxfp4,
)
from mpishard.config.quantization.modelopt import read_modelopt
from mpishard.config.quantization.scheme import Quantization

METHODS = {
    "fp8": read_fp8,
    "fbgemm_fp8": read_fbgemm,
    "compressed-tensors": read_compressed_tensors,
    "modelopt": read_modelopt,
    "modelopt_fp4": read_modelopt,
    "awq": read_awq,
    "gptq": read_gptq,
    "mxfp4": read_mxfp4,
}
REMEDY = "take the model's unquantized checkpoint, or dequantize this one and save it"


def read_quantization(
    fields: Fields, beside: dict[str, Any] | None, own: str | None
) -> Quantization | None:
    """What `fields`, those of ``config.json``, say about the storage of the weights; None if they
    are not quantized.

    `beside` is the content of ``hf_quant_config.json``, which holds if config.json says nothing.
    `own` is the method that only this family has.

    Raises UserError for a method or a form that is not read, and for an unknown field.
    """
    given = [fields.section(name) for name in ("quantization_config", "compression_config")]
    section = given[0] or given[1]
    if section is None and beside:
        source = f"hf_quant_config.json beside {fields.source}"
        section = Fields(beside, source, answered=fields.answered).section("quantization")
    if section is None:
        return None
    method = section.text("quant_method", "modelopt" if "quant_algo" in section.values else "")
    readable = [own] if own else [name for name in METHODS if name != "mxfp4"]
    if method not in readable:
        section.refuse("quant_method", f"must be one of {', '.join(readable)}: {REMEDY}")
    if METHODS[method] is not read_modelopt and section.get("quant_algo") is not None:
        section.refuse("quant_algo", f"is not read beside quant_method {method}: {REMEDY}")
    return METHODS[method](section)
