"""Formats of weights that are not read, by the names of their files, and what to do instead."""

from __future__ import annotations

import re
from pathlib import Path

_SAVE = (
    "convert them with transformers: `AutoModelForCausalLM.from_pretrained(MODEL)"
    ".save_pretrained(OUT)`"
)
_DOWNLOAD = "download the model's model*.safetensors and config.json instead"

# The pattern of a file's name, what it is, and what to do. The first match is said.
_FORMATS = (
    (r"adapter_model\..*|adapter_config\.json", "an adapter (PEFT), which is not a whole model",
     "merge it into its base model: `PeftModel.merge_and_unload()`"),
    (r"consolidated.*\.(safetensors|pth)", "weights under the names of their author's own code",
     _DOWNLOAD),
    (r"pytorch_model.*\.bin(\.index\.json)?", "pickled weights of PyTorch, which can hold code",
     _SAVE),
    (r".*\.gguf", "weights of llama.cpp", _DOWNLOAD),
    (r".*\.(bin|pt|pth|ckpt)", "pickled weights of PyTorch, which can hold code", _SAVE),
    (r"tf_model.*\.h5", "weights of TensorFlow", _DOWNLOAD),
    (r"flax_model.*\.msgpack", "weights of Flax", _DOWNLOAD),
    (r".*\.onnx(_data)?", "a model of ONNX", _DOWNLOAD),
    (r"weights.*\.npz", "weights of MLX", _DOWNLOAD),
)  # fmt: skip
_NOT_THE_MODEL = re.compile(r"adapter_model\..*|consolidated.*")


def is_foreign(name: str) -> bool:
    """Whether a file is not of the model's weights in Hugging Face's names."""
    return _NOT_THE_MODEL.fullmatch(name) is not None


def foreign_file(*names: str) -> str | None:
    """What a file of one of these `names` is, in a format that is not read, and what to do about
    it."""
    for pattern, what, remedy in _FORMATS:
        for name in names:
            if re.fullmatch(pattern, name):
                return f"{name} is {what}; {remedy}"
    return None


def foreign_format(directory: Path) -> str | None:
    """The same of the files of a directory."""
    return foreign_file(*sorted(file.name for file in directory.iterdir()))
