"""A Hugging Face directory: ``config.json`` and safetensors files, read by slices.

The safetensors library checks the files. Slices come from memory maps at the offsets in the headers
of the files, which reads columns several times faster and can convert on the way. Weights have the
names of `mpishard.config.weight_specs`, also if one tensor holds several of them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from mpishard.config.model_config import ModelConfig
from mpishard.config.weight_specs import weight_specs
from mpishard.errors import UserError, brief
from mpishard.storage.arrays import DTYPES, StoredArray
from mpishard.storage.model_dir import read_config, read_json
from mpishard.storage.quantized.form import FLOATS, Dtypes
from mpishard.storage.quantized.matrix import CACHE_SCALES, UNREAD, DamagedTensor, canonical
from mpishard.storage.tensor_locations import Part, TensorLocation, locate_weights

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

EMBEDDING = "model.embed_tokens.weight"

Header = tuple[Path, int, dict[str, Any]]  # file, offset of its data, entry of the tensor


class Checkpoint:
    """The weights of a Hugging Face directory. A weight is read when it is asked for."""

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        locations: dict[str, TensorLocation],
        arrays: dict[str, StoredArray],
    ):
        self.path = path
        self.config = config
        self.locations = locations  # by the name of the weight
        self.arrays = arrays  # by the name of the tensor in the files
        self._shapes = {weight.name: weight.shape for weight in weight_specs(config)}

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """The checkpoint in a directory. It is checked that every weight of the model is there with
        its shape, and no other tensor.

        Raises UserError for damaged, truncated or missing files, for missing, misshapen or unknown
        tensors, and for dtypes and storage forms that cannot be read.
        """
        path = Path(path)
        config = read_config(path)
        headers = _read_headers(path)
        dtypes = {name: entry["dtype"] for name, (_, _, entry) in headers.items()}
        locations = locate_weights(config, dtypes)
        _refuse_unknown(config, headers, locations)
        checkpoint = cls(path, config, locations, _find_arrays(path, locations, headers))
        head = f"{config.stored_names.head}.weight"
        if config.tied and head in headers:
            stored = _stored(head, *headers[head])
            _check_tied(locations[EMBEDDING].name, checkpoint.arrays, head, stored)
        return checkpoint

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole shape of a weight."""
        return self._shapes[name]

    def dtype(self, name: str) -> np.dtype:
        """The stored dtype of a weight; float32 for a quantized one, which `read` dequantizes."""
        location = self.locations[name]
        if location.quantized:
            return DTYPES["float32"]
        return self.arrays[next(iter(location.tensors))].dtype

    def read(
        self, name: str, slices: tuple[slice, ...], dtype: DTypeLike | None = None
    ) -> np.ndarray:
        """A copy of ``weight[slices]``, in `dtype` or, without it, in the stored dtype."""
        return np.array(self.view(name, slices), dtype, order="C")

    def view(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        """``weight[slices]``: a view of the file, where it is one piece and not quantized."""
        location, shape = self.locations[name], self._shapes[name]
        bounds = [part.indices(length) for part, length in zip(slices, shape, strict=True)]
        part = tuple(slice(start, stop) for start, stop, _ in bounds)
        pieces = [self._numbers(location, *piece) for piece in location.pieces(part)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _numbers(self, location: TensorLocation, tensor: str, part: Part) -> np.ndarray:
        """The numbers in `part` of the matrix in which a weight is located, which has `tensor`."""
        if location.quantized:
            with self._naming_files():
                return location.quantized.part(self._stored(location), *part)
        matrix = self.arrays[tensor].map()[location.index]
        if location.heads:
            matrix = matrix[np.newaxis]
        return (matrix.swapaxes(-2, -1) if location.transposed else matrix)[part]

    def check_quantized(self) -> None:
        """Refuse stored indices and sizes of quantized weights that are wrong (UserError)."""
        with self._naming_files():
            for location in self.locations.values():
                if location.quantized:
                    location.quantized.check(self._stored(location))

    @contextmanager
    def _naming_files(self) -> Iterator[None]:
        """A tensor with impossible values becomes a UserError with its file."""
        try:
            yield
        except DamagedTensor as damage:
            raise UserError(f"{self.arrays[damage.tensor].path}: {damage}") from None

    def _stored(self, location: TensorLocation) -> dict[str, np.ndarray]:
        """The stored tensors of a quantized matrix, by the names that its form has for them."""
        return {
            tensor.name: self.arrays[name].map()[location.index]
            for name, tensor in location.tensors.items()
        }


def _read_headers(directory: Path) -> dict[str, Header]:
    if (directory / SINGLE).exists():
        return _read_header(directory / SINGLE)
    if not (directory / INDEX).exists():
        raise UserError(f"{directory} has neither {SINGLE} nor {INDEX}: no weights to read")
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError(f"{directory / INDEX} has no weight_map from tensor names to file names")
    files: dict[str, dict[str, Header]] = {}
    for name, file in weight_map.items():
        if file not in files:
            _check_file(directory, file, name)
            files[file] = _read_header(directory / file)
        if name not in files[file]:
            raise UserError(f"{directory / file} lacks {brief(name)}, which {INDEX} places in it")
    unlisted = {name: header for headers in files.values() for name, header in headers.items()}
    return unlisted | {name: files[file][name] for name, file in weight_map.items()}


def _check_file(directory: Path, file: str, name: str) -> None:
    """Refuse a file of the index that is not there, or not below the directory (UserError)."""
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise UserError(
            f"{directory / INDEX} places {brief(name)} in {brief(file)}, outside of the directory: "
            "copy that file into it and name it there"
        )
    if not os.path.isfile(directory / file):
        raise UserError(f"{directory / brief(file)} is missing: {INDEX} places {brief(name)} in it")


def _read_header(path: Path) -> dict[str, Header]:
    try:
        with safe_open(path, "np"), open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
    except SafetensorError as error:
        size, problem = path.stat().st_size, brief(str(error), 300)
        raise UserError(f"{path} ({size} bytes) is truncated or damaged: {problem}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    entries.pop("__metadata__", None)
    return {name: (path, 8 + length, entry) for name, entry in entries.items()}


def _find_arrays(
    directory: Path, locations: dict[str, TensorLocation], headers: dict[str, Header]
) -> dict[str, StoredArray]:
    """The stored arrays of all `locations`, by the names of the tensors."""
    arrays: dict[str, StoredArray] = {}
    for location in locations.values():
        experts = location.shape[: len(location.index)] if location.quantized else ()
        for name, tensor in location.tensors.items():
            if name in arrays:  # it also holds the weight of another expert
                continue
            shape = (*experts, *tensor.shape)
            if name not in headers:
                raise UserError(
                    f"{directory} lacks the tensor {name}, "
                    f"which its config.json calls for in shape {shape}"
                )
            array = _stored(name, *headers[name], tensor.dtypes)
            if array.shape != shape and not (location.quantized and canonical(array.shape, shape)):
                raise UserError(
                    f"{array.path}: {name} has shape {array.shape}, "
                    f"but config.json calls for {shape}"
                )
            arrays[name] = replace(array, shape=shape)
    return arrays


def _stored(
    name: str,
    path: Path,
    data_start: int,
    entry: dict[str, Any],
    dtypes: Dtypes = FLOATS,
) -> StoredArray:
    dtype = dtypes.get(entry["dtype"])
    if dtype is None:
        raise UserError(
            f"{path}: {brief(name)} has dtype {entry['dtype']}; {', '.join(dtypes)} can be read"
        )
    return StoredArray(path, data_start + entry["data_offsets"][0], dtype, tuple(entry["shape"]))


def _refuse_unknown(
    config: ModelConfig, headers: dict[str, Header], locations: dict[str, TensorLocation]
) -> None:
    known = {name for location in locations.values() for name in location.tensors}
    modules = {where.quantized.module for where in locations.values() if where.quantized}
    unknown = [
        name
        for name in headers.keys() - known
        if not _harmless(config, name) and not _of_quantized(name, modules, headers)
    ]
    if unknown:
        raise UserError(
            f"{headers[unknown[0]][0]} holds {_listed(unknown)}, "
            f"which a {config.family} model with this config.json does not have"
        )


def _of_quantized(name: str, modules: set[str], headers: dict[str, Header]) -> bool:
    """Whether a tensor is left unread because it belongs to quantized modules: to one of them, or
    to a cache in FP8."""
    module, _, end = name.rpartition(".")
    if module in modules and end == "bias":  # GPTQ's tools write one that is zero
        return not _stored(name, *headers[name]).map().any()
    return bool(modules) and (end in CACHE_SCALES or (module in modules and end in UNREAD))


def _harmless(config: ModelConfig, name: str) -> bool:
    # Old checkpoints store the rotary frequencies, which follow from the configuration.
    names = config.stored_names
    buffers = ("rotary_emb.inv_freq", *names.buffers)
    if name.endswith(buffers) or (config.tied and name == f"{names.head}.weight"):
        return True
    # The layers that predict several tokens are stored after the last decoder layer, and not used.
    more = config.raw.get("num_nextn_predict_layers")
    layer = re.match(r"model\.layers\.([0-9]{1,9})\.", name)
    return (
        isinstance(more, int) and layer is not None and int(layer[1]) - config.layers in range(more)
    )


def _listed(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    first = brief(first)
    return f"{first} and {len(others)} more tensors" if others else f"the tensor {first}"


def _check_tied(
    embedding_name: str, arrays: dict[str, StoredArray], head_name: str, head: StoredArray
) -> None:
    """Refuse a stored head that config.json ties to the embedding, but that differs from it. Every
    64th row is compared: a head that was trained separately differs everywhere."""
    embedding = arrays[embedding_name]
    if head.shape != embedding.shape or (embedding.map()[::64] != head.map()[::64]).any():
        raise UserError(
            f"{head.path}: {head_name} differs from {embedding_name}, but config.json ties them; "
            "set tie_word_embeddings to false to use both"
        )
