"""The table of storage forms.

================  ==================================================  ==============================
form              tensors of a module                                 written by
================  ==================================================  ==============================
fp8               weight, weight_scale_inv or weight_scale            DeepSeek, Qwen, MiniMax, Meta,
                                                                      compressed-tensors, ModelOpt
int8              weight, weight_scale, weight_zero_point             compressed-tensors
packed            weight_packed, weight_scale, weight_shape,          compressed-tensors
                  weight_zero_point, weight_g_idx
awq               qweight, qzeros, scales                             AutoAWQ
gptq              qweight, qzeros, scales, g_idx                      AutoGPTQ, GPTQModel
nvfp4             weight_packed, weight_scale, weight_global_scale    compressed-tensors
nvfp4-modelopt    weight, weight_scale, weight_scale_2                ModelOpt
mxfp4             _blocks, _scales                                    gpt-oss, of all experts
mxfp4-packed      weight_packed, weight_scale                         compressed-tensors
================  ==================================================  ==============================
"""

from __future__ import annotations

from mpishard.config.quantization.scheme import Scheme
from mpishard.storage.quantized import awq, gptq, mxfp4, nvfp4, packed, scaled
from mpishard.storage.quantized.form import Form

FORMS: dict[str, Form] = {
    "fp8": scaled.FP8_FORM,
    "int8": scaled.INT8_FORM,
    "packed": packed.FORM,
    "awq": awq.FORM,
    "gptq": gptq.FORM,
    "nvfp4": nvfp4.PACKED_FORM,
    "nvfp4-modelopt": nvfp4.MODELOPT_FORM,
    "mxfp4": mxfp4.BLOCKS_FORM,
    "mxfp4-packed": mxfp4.PACKED_FORM,
}


def title_of(scheme: Scheme) -> str:
    """The name of its elements."""
    return f"int{scheme.bits}" if scheme.form == "packed" else FORMS[scheme.form].title


def describe_scheme(scheme: Scheme) -> str:
    """A scheme in words.

    >>> describe_scheme(Scheme("fp8", (128, 128)))
    'FP8, a scale for each 128 x 128'
    >>> describe_scheme(Scheme("gptq", (1, 64), symmetric=False, ordered=True))
    'GPTQ, a scale for each 64 of a row, zero points, columns of a group anywhere'
    """
    rows, columns = scheme.block
    if rows is None:
        extent = "matrix"
    elif columns is None:
        extent = "row"
    else:
        extent = f"{columns} of a row" if rows == 1 else f"{rows} x {columns}"
    zeros = ", zero points" if not scheme.symmetric else ""
    order = ", columns of a group anywhere" if scheme.ordered else ""
    return f"{title_of(scheme)}, a scale for each {extent}{zeros}{order}"
