"""Describes a model, and verifies that its weights are complete and undamaged."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import numpy as np

from mpishard.config.active_options import active_options
from mpishard.config.layout import block, kv_heads_of, query_heads_of
from mpishard.config.model_config import MAX_POSITIONS, NO_ROPE, MLAConfig, ModelConfig, MoEConfig
from mpishard.config.weight_sharding import WeightSharding
from mpishard.config.weight_specs import local_experts, weight_specs
from mpishard.errors import UserError
from mpishard.storage.arrays import Progress, StoredArray, checksum
from mpishard.storage.checkpoint import Checkpoint
from mpishard.storage.quantized.forms import describe_scheme, title_of
from mpishard.storage.rank_file import Part
from mpishard.storage.shards import ShardDirectory
from mpishard.storage.source import Source, notices


def describe(source: Source) -> list[str]:
    """Lines that describe a model and the content of each file. Raises UserError if a file of
    shards does not hold the slices of its rank."""
    lines = [f"model         {source.path}", *_model_lines(source.config), _weights_line(source)]
    lines += _quantized_lines(source)
    lines += [f"note          {notice}" for notice in notices(source)]
    if isinstance(source, ShardDirectory):
        manifest = source.manifest
        lines.append(f"shards        {manifest.sharding}, made from {manifest.source}")
        lines.append(f"conversion    {manifest.conversion}")
        return [*lines, "", *_columns(_rank_rows(source))]
    return [*lines, "", *_columns(_file_rows(source))]


def _model_lines(config: ModelConfig) -> list[str]:
    windows = [window for window in config.windows if window is not None]
    sizes = " and ".join(map(str, sorted(set(windows))))
    reach = f", window {sizes} in {len(windows)} of {config.layers} layers" if windows else ""
    return [
        f"family        {config.family}{f', in {config.wrapper}' if config.wrapper else ''}",
        f"layers        {config.layers}",
        *([f"encoder       {_encoder(config.encoder)}"] if config.encoder else []),
        f"hidden        {config.hidden}",
        f"heads         {config.heads} query, {config.kv_heads} key/value, width {config.head_dim}",
        *([f"latent        {_latent(config.mla)}"] if config.mla else []),
        *([f"ffn           {config.ffn}, {config.activation}"] if _is_dense(config) else []),
        *([f"experts       {_experts(config, config.moe)}"] if config.moe else []),
        f"vocabulary    {config.vocab}{', head tied to the embedding' if config.tied else ''}",
        f"positions     {_positions(config)}{reach}",
        *(
            f"{'' if place else 'options':14}{option}"
            for place, option in enumerate(active_options(config))
        ),
    ]


def _encoder(encoder: ModelConfig) -> str:
    sparse = encoder.moe.layers.count(True) if encoder.moe else 0
    return f"{encoder.layers} layers, {sparse} of them with experts"


def _positions(config: ModelConfig) -> str:
    if config.max_position_embeddings == MAX_POSITIONS:
        return "any number"
    rope = f", rope {config.rope.kind}" if config.rope != NO_ROPE else ""
    return f"{config.max_position_embeddings}{rope}"


def _latent(mla: MLAConfig) -> str:
    queries = f", queries {mla.q_lora_rank}" if mla.q_lora_rank else ""
    return f"keys and values {mla.kv_lora_rank}, rotated key {mla.qk_rope_head_dim}{queries}"


def _is_dense(config: ModelConfig) -> bool:
    """Whether some layer has no experts."""
    return config.moe is None or not all(config.moe.layers)


def _experts(config: ModelConfig, moe: MoEConfig) -> str:
    shared = (
        f", and a shared one of width {moe.shared_expert_intermediate_size}"
        if moe.shared_expert_intermediate_size
        else ""
    )
    layers = f" in {sum(moe.layers)} of {config.layers} layers" if _is_dense(config) else ""
    return (
        f"{moe.num_experts} of width {moe.moe_intermediate_size}, {config.activation}, "
        f"{moe.top_k} for a token{shared}{layers}"
    )


def _weights_line(source: Source) -> str:
    table = weight_specs(source.config)
    parameters = sum(prod(weight.shape) for weight in table)
    dtypes = sorted({_dtype_name(source, weight.name) for weight in table})
    return f"weights       {parameters:,} parameters, {' and '.join(dtypes)}"


def _quantized_lines(source: Source) -> list[str]:
    """A line for each storage form: how many matrices have it, and what shares a scale."""
    if not isinstance(source, Checkpoint):
        return []
    schemes = [one.quantized.scheme for one in source.locations.values() if one.quantized]
    return [
        f"quantized     {schemes.count(scheme)} matrices: {describe_scheme(scheme)}"
        for scheme in dict.fromkeys(schemes)
    ]


def _dtype_name(source: Source, name: str) -> str:
    quantized = source.locations[name].quantized if isinstance(source, Checkpoint) else None
    return title_of(quantized.scheme) if quantized else source.dtype(name).name


def _rank_rows(shards: ShardDirectory) -> Iterable[tuple[str, ...]]:
    columns = list(_held(shards.config, shards.sharding, 0))
    yield "rank", "file", "bytes", "tensors", *columns
    for rank in range(shards.sharding.ranks):
        yield (
            str(rank),
            shards.file(rank).name,
            f"{shards.file(rank).stat().st_size:,}",
            str(len(shards.parts(rank))),
            *map(_range, _held(shards.config, shards.sharding, rank).values()),
        )


def _held(config: ModelConfig, sharding: WeightSharding, index: int) -> dict[str, slice]:
    """The part of each sharded dimension that is in shard `index`."""
    moe, tp, rank = config.moe, sharding.tp, sharding.tp_rank(index)
    held = {"query heads": query_heads_of(config, tp, rank)}
    if config.mla is None:
        held["kv heads"] = kv_heads_of(config, tp, rank)
    if _is_dense(config):
        held["ffn"] = block(config.ffn, tp, rank)
    if moe:
        held["experts"] = local_experts(moe.num_experts, sharding, index)
        held["of their width"] = block(
            moe.moe_intermediate_size, sharding.etp, sharding.etp_rank(index)
        )
        if moe.shared_expert_intermediate_size:
            held["shared"] = block(moe.shared_expert_intermediate_size, tp, rank)
    held["vocabulary"] = block(config.vocab, tp, rank)
    return held


def _file_rows(checkpoint: Checkpoint) -> Iterable[tuple[str, ...]]:
    yield "file", "bytes", "tensors"
    files = [array.path for array in checkpoint.arrays.values()]
    for file in sorted(set(files)):
        yield file.name, f"{file.stat().st_size:,}", str(files.count(file))


def _range(indices: slice) -> str:
    """The indices as text: ``0-3``, ``4`` or ``none``."""
    length = indices.stop - indices.start
    if length <= 1:
        return str(indices.start) if length else "none"
    return f"{indices.start}-{indices.stop - 1}"


def _columns(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def stored_bytes(source: Source) -> int:
    """The number of bytes that `verify` reads."""
    if isinstance(source, Checkpoint):
        return sum(array.nbytes for array in source.arrays.values())
    return sum(
        part.array.nbytes
        for rank in range(source.sharding.ranks)
        for part in source.parts(rank).values()
    )


def verify(source: Source, progress: Progress = lambda done: None) -> None:
    """Reads every weight, and calls `progress` with the bytes of each block.

    Raises UserError with file and tensor if a value is not finite, or if a stored index or size of
    a quantized weight is wrong. For shards it is also raised if
    data do not have their checksum, if a file does not hold the slices of its rank, and if two
    ranks hold different values of the same slice.
    """
    if isinstance(source, Checkpoint):
        for name, array in source.arrays.items():
            _, finite = _read_through(array, progress)
            _refuse_infinite(name, array, finite)
        source.check_quantized()
        return
    first: dict[tuple[str, str], Part] = {}
    for rank in range(source.sharding.ranks):
        for name, part in source.parts(rank).items():
            crc32, finite = _read_through(part.array, progress)
            part.compare(crc32)
            _refuse_infinite(name, part.array, finite)
            _compare_replicas(first.setdefault((name, repr(part.held)), part), part)


def _read_through(array: StoredArray, progress: Progress) -> tuple[int, bool]:
    """The checksum of an array and whether all its values are finite."""
    crc32, finite = 0, True
    for rows in array.blocks():
        crc32 = checksum(rows, crc32)
        finite = finite and bool(np.isfinite(rows).all())
        progress(rows.nbytes)
    return crc32, finite


def _refuse_infinite(name: str, array: StoredArray, finite: bool) -> None:
    if not finite:
        raise UserError(f"{array.path}: {name} has values that are infinite or not numbers")


def _compare_replicas(first: Part, part: Part) -> None:
    if part.crc32 != first.crc32:
        raise UserError(
            f"{part.array.path}: {part.name} has checksum {part.crc32:08x}, "
            f"but the same part of it in {first.array.path.name} has {first.crc32:08x}"
        )
