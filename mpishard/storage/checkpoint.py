"""A Hugging Face directory: ``config.json`` and safetensors files, read by slices.

The safetensors library checks the files. Slices come from memory maps at the offsets in the headers
of the files, which reads columns several times faster and can convert on the way. Weights have the
names of `mpishard.config.weight_specs`, also if one tensor holds several of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from mpishard.config.model_config import ModelConfig
from mpishard.config.weight_specs import weight_specs
from mpishard.errors import UserError, brief
from mpishard.storage.arrays import DTYPES, StoredArray, row_blocks
from mpishard.storage.model_dir import read_config
from mpishard.storage.quantized.form import FLOATS, Dtypes
from mpishard.storage.quantized.matrix import CACHE_SCALES, UNREAD, DamagedTensor, canonical
from mpishard.storage.tensor_locations import Part, TensorLocation, locate_weights
from mpishard.storage.text_half import text_half
from mpishard.storage.weight_files import Header, read_headers

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


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
        self.unread: list[str] = []  # tensors of other parts of a multimodal model
        self._shapes = {weight.name: weight.shape for weight in weight_specs(config)}

    @classmethod
    def open(cls, path: str | Path, ignore_config: Iterable[str] = ()) -> Checkpoint:
        """The checkpoint in a directory. It is checked that every weight of the model is there with
        its shape, and no other tensor. The user answers for fields of the configuration in
        `ignore_config`.

        A head that config.json ties to the embedding, but that is stored and differs from it, is
        used as it is stored; a head that is stored alone is the embedding, too. transformers 5 does
        the same.

        Raises UserError for damaged, truncated or missing files, for missing, misshapen or unknown
        tensors, and for dtypes and storage forms that cannot be read.
        """
        path = Path(path)
        config = read_config(path, ignore_config)
        headers = read_headers(path)
        headers, unread = text_half(headers) if config.wrapper else (headers, [])
        if config.wrapper:
            config = _transposed_as_stored(config, headers)
        head = f"{config.stored_names.head}.weight"
        if config.tied and head in headers:
            embedding = _locate(config, headers)[EMBEDDING].name
            if embedding not in headers:
                headers[embedding] = headers.pop(head)
            else:
                untied = replace(config, tied=False, head_differs=True)
                if cls._of(path, untied, headers).has_other_head():
                    config = untied
        checkpoint = cls._of(path, config, headers)
        checkpoint.unread = unread
        return checkpoint

    @classmethod
    def _of(cls, path: Path, config: ModelConfig, headers: dict[str, Header]) -> Checkpoint:
        locations = _locate(config, headers)
        _refuse_unknown(config, headers, locations)
        return cls(path, config, locations, _find_arrays(path, locations, headers))

    def has_other_head(self) -> bool:
        """Whether a head that is a weight of its own differs from the embedding."""
        for rows in row_blocks(self.shape(HEAD), 4):
            embedding, head = (self.view(name, (rows, slice(None))) for name in (EMBEDDING, HEAD))
            if embedding.dtype != head.dtype or embedding.tobytes() != head.tobytes():
                if (embedding.astype(np.float64) != head.astype(np.float64)).any():  # 0 is -0
                    return True
        return False

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

    def copy_to(self, out: np.ndarray, name: str, slices: tuple[slice, ...]) -> None:
        """Writes ``weight[slices]`` into `out`: a quantized weight by blocks of rows, so that
        memory holds one block twice, not the weight."""
        if self.locations[name].quantized is None:
            out[...] = self.view(name, slices)
            return
        rows, columns = slices
        for part in row_blocks(out.shape, np.dtype(np.float32).itemsize):
            these = slice(rows.start + part.start, rows.start + part.stop)
            out[part] = self.view(name, (these, columns))

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


def _locate(config: ModelConfig, headers: dict[str, Header]) -> dict[str, TensorLocation]:
    dtypes = {name: entry["dtype"] for name, (_, _, entry) in headers.items()}
    try:
        return locate_weights(config, dtypes)
    except DamagedTensor as damage:
        raise UserError(f"{headers[damage.tensor][0]}: {damage}") from None


def _transposed_as_stored(config: ModelConfig, headers: dict[str, Header]) -> ModelConfig:
    """The configuration for the experts of qwen3_vl_moe as they are stored: the Hub has them
    transposed, and transformers 5 writes them as other families do."""
    if config.moe is None or not config.moe.names.stacked.transposed:
        return config
    names, (D, F) = config.moe.names, (config.hidden, config.moe.moe_intermediate_size)
    shapes = [
        tuple(entry["shape"][-2:])
        for name, (_, _, entry) in headers.items()
        if name.endswith(names.stacked.gate_up)
    ]
    if (2 * F, D) not in shapes or 2 * F == D:
        return config
    names = replace(names, stacked=replace(names.stacked, transposed=False))
    return replace(config, moe=replace(config.moe, names=names))


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
    """Whether a tensor is left unread because it belongs to a quantized module."""
    module, _, end = name.rpartition(".")
    if module in modules and end == "bias":  # GPTQ's tools write one that is zero
        return not _stored(name, *headers[name]).map().any()
    return module in modules and end in UNREAD


def _harmless(config: ModelConfig, name: str) -> bool:
    # Old checkpoints store the rotary frequencies, which follow from the configuration.
    names = config.stored_names
    buffers = ("rotary_emb.inv_freq", *names.buffers)
    if (
        name.startswith(names.unused)
        or name.endswith(buffers)
        or (config.tied and name == f"{names.head}.weight")
    ):
        return True
    if config.quantization is not None and name.rpartition(".")[2] in CACHE_SCALES:
        return True  # of a cache in FP8
    # The layers that predict several tokens are stored after the last decoder layer, and not used.
    more = config.text_fields.get("num_nextn_predict_layers")
    layer = re.match(r"model\.layers\.([0-9]{1,9})\.", name)
    return (
        isinstance(more, int) and layer is not None and int(layer[1]) - config.layers in range(more)
    )


def _listed(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    first = brief(first)
    return f"{first} and {len(others)} more tensors" if others else f"the tensor {first}"
