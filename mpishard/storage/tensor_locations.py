"""The locations of weights in a checkpoint.

Most weights are tensors of their own. But one tensor may also hold several weights: q, k and v of a
layer, its gate and up, or those of all its experts. It may be transposed. A `TensorLocation` says
which elements of which tensor make up a weight, so that all other code sees one weight for each
projection and each expert. How the elements of a quantized tensor become numbers is another matter,
of `mpishard.storage.quantized`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from mpishard.config.model_config import ModelConfig, MoEConfig
from mpishard.config.weight_specs import WeightSpec, weight_specs
from mpishard.storage.quantized.form import FLOATS, Tensor
from mpishard.storage.quantized.matrix import QuantizedMatrix, find_matrix

Part = tuple[slice, ...]  # of a matrix or a vector, one slice for each axis


@dataclass(frozen=True)
class Rows:
    """The rows of a stored matrix that are the rows of a weight: from `start` on, `run` consecutive
    ones in every `period`.

    Of three heads with two rows of q, k and v each, k is:

    >>> Rows(start=2, run=2, period=6).slices(1, 6)
    [slice(3, 4, 1), slice(8, 10, 1), slice(14, 16, 1)]

    And of rows of gate and up in turns, up is:

    >>> Rows(start=1, run=1, period=2).slices(1, 6)
    [slice(3, 13, 2)]
    """

    start: int
    run: int
    period: int

    def slices(self, first: int, stop: int) -> list[slice]:
        """Where the rows `first` to `stop` - 1 of the weight are stored; at least one slice."""
        if self.run == 1 or first >= stop:
            begin = self.start + first * self.period
            return [slice(begin, begin + max(0, stop - first) * self.period, self.period)]
        pieces = []
        while first < stop:
            number, within = divmod(first, self.run)
            end = min(stop, (number + 1) * self.run)
            begin = self.start + number * self.period + within
            pieces.append(slice(begin, begin + end - first, 1))
            first = end
        return pieces


@dataclass(frozen=True)
class TensorLocation:
    """The location of a weight: some `rows` of a matrix, or elements of a vector.

    The matrix is the tensor `name`, or ``tensor[index]`` of a tensor of all experts, and its
    transpose if `transposed`. If there are `heads`, so many rows are tensors of their own, whose
    names have the number of a head in place of ``{}``. A `quantized` matrix is stored as several
    tensors in its place.
    """

    name: str
    shape: tuple[int, ...]  # of the tensor, if it is not quantized
    index: tuple[int, ...] = ()
    transposed: bool = False
    rows: Rows | None = None  # None: all
    heads: int = 0
    quantized: QuantizedMatrix | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors, by name."""
        if self.quantized:
            return self.quantized.tensors
        heads = map(self.name.format, range(self.heads))
        names = list(heads) if self.heads else [self.name]
        return {name: Tensor("", FLOATS, self.shape) for name in names}

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape of the matrix, (outputs, inputs), or of the vector."""
        shape = self.shape[len(self.index) :]
        return shape[::-1] if self.transposed else shape

    def pieces(self, part: Part) -> Iterator[tuple[str, Part]]:
        """The pieces that, one below the other, are this `part` of the weight: the tensor that has
        a piece, and the part of its matrix that it is."""
        rows, *columns = part
        if self.heads:
            for head in range(rows.start, max(rows.stop, rows.start + 1)):
                row = slice(0, int(rows.start < rows.stop))
                yield self.name.format(head % self.heads), (row, *columns)
        elif self.rows is None:
            yield self.name, part
        else:
            for piece in self.rows.slices(rows.start, rows.stop):
                yield self.name, (piece, *columns)


def locate_weights(config: ModelConfig, stored: Mapping[str, str]) -> dict[str, TensorLocation]:
    """The location of each weight of a model, by its name, in a checkpoint with the tensors
    `stored`, which have these dtypes. A missing weight has the location at which its family stores
    it. Raises DamagedTensor as `find_matrix` does."""
    locations, prefix = {}, _prefix(config, stored)
    for weight in weight_specs(config):
        possible = [
            _as_quantized(config, location, stored)
            for location in _possible_locations(*_in_its_stack(config, weight), prefix)
        ]
        there = (one for one in possible if any(name in stored for name in one.tensors))
        locations[weight.name] = next(there, possible[0])
    return locations


def _in_its_stack(config: ModelConfig, weight: WeightSpec) -> tuple[ModelConfig, WeightSpec]:
    """The configuration of the stack of layers that a weight belongs to, and the weight by the name
    that it has within this."""
    if not weight.of_encoder or config.encoder is None:
        return config, weight
    name = weight.name.removeprefix("model.encoder.")
    return config.encoder, replace(weight, name=f"model.{name}")


def _as_quantized(
    config: ModelConfig, location: TensorLocation, stored: Mapping[str, str]
) -> TensorLocation:
    """The same location, with a matrix that is stored quantized; it is never transposed."""
    if len(location.matrix_shape) != 2:
        return location
    matrix = find_matrix(config.quantization, location.name, location.matrix_shape, stored)
    return replace(location, quantized=matrix, transposed=False) if matrix else location


def _prefix(config: ModelConfig, stored: Mapping[str, str]) -> str:
    """What the names of all tensors but the head begin with in this checkpoint."""
    names = config.stored_names
    embedding = names.modules.get("model.embed_tokens", "embed_tokens")
    there = (one for one in names.prefixes if f"{one}{embedding}.weight" in stored)
    return next(there, names.prefixes[0])


def _possible_locations(
    config: ModelConfig, weight: WeightSpec, prefix: str
) -> list[TensorLocation]:
    names = config.stored_names
    if weight.layer is None:
        return [TensorLocation(_model_tensor(config, weight.name, prefix), weight.shape)]
    of_layer = f"{prefix}{names.layers}.{weight.layer}."
    name = weight.name.removeprefix(f"model.layers.{weight.layer}.")
    locations = [_in_layer(config, weight, name, of_layer)]
    if config.moe is None:
        return locations
    stacked = config.moe.names.stacked
    if weight.field == "router":
        locations.append(TensorLocation(of_layer + stacked.router, weight.shape))
    if weight.field == "e_score_correction_bias":
        both = (name, stacked.e_score_correction_bias)
        locations = [_choice_bias(config.moe, weight, f"{of_layer}{one}") for one in both if one]
    if weight.expert is not None:
        together = _stacked_locations(config.moe, weight, weight.expert, of_layer)
        locations = locations + together if config.moe.names.separate else together
    return locations


def _choice_bias(moe: MoEConfig, weight: WeightSpec, name: str) -> TensorLocation:
    """The bias by which experts are chosen, in the tensor `name`."""
    if moe.names.e_score_correction_bias_is_matrix:
        return TensorLocation(name, (1, *weight.shape), (0,))
    return TensorLocation(name, weight.shape)


def _model_tensor(config: ModelConfig, name: str, prefix: str) -> str:
    names, (module, _, kind) = config.stored_names, name.rpartition(".")
    if module == "lm_head":
        return f"{names.head}.{kind}"
    return f"{prefix}{names.modules.get(module, module.removeprefix('model.'))}.{kind}"


def _in_layer(config: ModelConfig, weight: WeightSpec, name: str, of_layer: str) -> TensorLocation:
    """The location of the weight that is called `name` in its layer."""
    names, (module, _, kind) = config.stored_names, name.rpartition(".")
    rows, total = None, weight.shape[0]
    part, _, _ = weight.field.partition("_")
    if module in names.each_head:
        name = f"{of_layer}{names.each_head[module]}.{kind}"
        return TensorLocation(name, weight.shape[1:], heads=weight.shape[0])
    if config.is_linear(weight.layer or 0) and module.startswith("linear_attn."):
        module, rows, total = _linear_rows(config, module, total)
    elif config.output_gate and module in ("self_attn.q_proj", "self_attn.gate_proj"):
        K = config.head_dim  # of each head its query, then its gate
        rows, total = Rows(K * (module == "self_attn.gate_proj"), K, 2 * K), 2 * total
        module = "self_attn.q_proj"
    elif names.qkv and module in _QKV:
        module, (rows, total) = names.qkv, _qkv_rows(config, part)
    elif part in ("gate", "up") and (fused := _gate_up(config, module)):
        width, total = weight.shape[0], 2 * weight.shape[0]
        module, rows = fused, Rows(width * (part == "up"), width, total)
    shape = (total, *weight.shape[1:])
    transposed = names.transposed and len(shape) == 2
    name = f"{of_layer}{names.modules.get(module, module)}.{kind}"
    return TensorLocation(name, shape[::-1] if transposed else shape, (), transposed, rows)


def _gate_up(config: ModelConfig, module: str) -> str | None:
    """The module of gate and up together that has this one, if there is such a one."""
    network, _, _ = module.rpartition(".")
    if network == "mlp":
        return config.stored_names.gate_up
    shared = config.moe.names.shared if config.moe else None
    return config.stored_names.shared_gate_up if network == shared else None


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _qkv_rows(config: ModelConfig, part: str) -> tuple[Rows, int]:
    """The rows of "q", "k" or "v" in a module of all three, and how many it has together."""
    heads, kv_heads, K = config.heads, config.kv_heads, config.head_dim
    total = (heads + 2 * kv_heads) * K
    groups = kv_heads if config.stored_names.qkv_by_kv_head else 1
    q, kv = heads // groups * K, kv_heads // groups * K
    start, run = {"q": (0, q), "k": (q, kv), "v": (q + kv, kv)}[part]
    return Rows(start, run, total // groups), total


def _linear_rows(config: ModelConfig, module: str, rows: int) -> tuple[str, Rows | None, int]:
    """Of a module of linear attention the one that it is stored in, where, and how many rows that
    has: one projection has, for one key head after the other, the rows of q and k and of its value
    heads' v and z, a second one those of b and a, and the convolution all q, all k, all v."""
    linear = config.linear_attention
    assert linear is not None
    part, _, kind = module.removeprefix("linear_attn.").partition("_")
    if kind == "conv1d":
        keys = linear.kv_heads * linear.key_width
        start = {"q": 0, "k": keys, "v": 2 * keys}[part]
        return "linear_attn.conv1d", Rows(start, rows, linear.channels), linear.channels
    K, heads = linear.key_width, linear.heads // linear.kv_heads
    values = heads * linear.value_width
    fused = {"in_proj_qkvz": {"q": K, "k": K, "v": values, "z": values}}
    fused |= {"in_proj_ba": {"b": heads, "a": heads}}
    for stored, sizes in fused.items():
        if part in sizes and kind == "proj":
            period, parts = sum(sizes.values()), list(sizes)
            start = sum(sizes[one] for one in parts[: parts.index(part)])
            rows_of_part = Rows(start, sizes[part], period)
            return f"linear_attn.{stored}", rows_of_part, period * linear.kv_heads
    return module, None, rows


def _stacked_locations(
    moe: MoEConfig, weight: WeightSpec, expert: int, of_layer: str
) -> list[TensorLocation]:
    """The possible locations of a weight of an expert in tensors of all experts of its layer."""
    stacked, F = moe.names.stacked, moe.moe_intermediate_size
    part, _, bias = weight.field.partition("_")
    rows = None
    if part == "down":
        name = stacked.down_bias if bias else stacked.down
        shape = (moe.num_experts, *weight.shape)
    else:
        name = stacked.gate_up_bias if bias else stacked.gate_up
        shape = (moe.num_experts, 2 * F, *weight.shape[1:])
        if stacked.alternating:
            rows = Rows(start=int(part == "up"), run=1, period=2)
        else:
            rows = Rows(start=F * (part == "up"), run=F, period=2 * F)
    name = f"{of_layer}{name}"
    if bias or not stacked.transposed:
        return [TensorLocation(name, shape, (expert,), rows=rows)]
    swapped = (shape[0], shape[2], shape[1])
    return [TensorLocation(name, swapped, (expert,), transposed=True, rows=rows)]
