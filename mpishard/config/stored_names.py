"""Where the checkpoints of a family keep the weights.

Everywhere in mpishard a weight has the name that it has in llama, as in the table of
`mpishard.config.weight_specs`. A family's `StoredNames` says where its checkpoints differ: in the
names, by transposed matrices, and by fused ones, which are several weights in one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StoredNames:
    """The names of a family's tensors and what they hold; the defaults are llama's.

    A module is the name of a weight without ``.weight`` or ``.bias``, such as ``model.norm`` or, in
    a layer, ``self_attn.q_proj``. `modules` has the stored name of each module that is called
    otherwise: of the model's own, below the prefix, and of a layer's, below the layer.
    """

    # What stands where llama has "model.": the one that a checkpoint has the embedding under.
    prefixes: tuple[str, ...] = ("model.",)
    layers: str = "layers"
    modules: Mapping[str, str] = field(default_factory=dict, hash=False)
    head: str = "lm_head"  # below no prefix
    # One module for q, k and v. Its rows are all queries, all keys, all values, or, if
    # `qkv_by_kv_head`, for one key/value head after the other its queries, its key and its value.
    qkv: str | None = None
    qkv_by_kv_head: bool = False
    # Modules whose rows, one for each head, are tensors of their own; ``{}`` is the head's number.
    each_head: Mapping[str, str] = field(default_factory=dict, hash=False)
    gate_up: str | None = None  # one module: the rows of gate, then those of up
    shared_gate_up: str | None = None  # the same of a shared expert
    transposed: bool = False  # the layers' matrices are (inputs, outputs)
    # The ends of the names of tensors in a layer that follow from the configuration.
    buffers: tuple[str, ...] = ()
    # The beginnings of the names of tensors that are not used, such as layers for other tasks.
    unused: tuple[str, ...] = ()
