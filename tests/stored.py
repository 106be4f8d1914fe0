"""Weights as the checkpoints of their families store them: other names, fused and transposed.

The names are the family's own, which transformers finds or does not when golden values are made.
How several weights lie in one tensor is written out here once more, with whole arrays."""

from __future__ import annotations

import numpy as np

from mpishard.config.model_config import ModelConfig

Weights = dict[str, np.ndarray]


def stored(config: ModelConfig, weights: Weights, prefix: str | None = None) -> Weights:
    """The tensors of a checkpoint with these `weights`, which have the names of the table; all but
    the head below `prefix`, the first of the family's unless given."""
    names = config.stored_names
    prefix = names.prefixes[0] if prefix is None else prefix
    tensors: Weights = {}
    for name, array in _fused(config, weights).items():
        module, _, kind = name.rpartition(".")
        if module == "lm_head":
            tensors[f"{names.head}.{kind}"] = array
        elif module.startswith("model.layers.") and module.split(".", 3)[3] in names.each_head:
            _, _, layer, module = module.split(".", 3)
            for head, row in enumerate(array):
                own = names.each_head[module].format(head)
                tensors[f"{prefix}{names.layers}.{layer}.{own}.{kind}"] = np.ascontiguousarray(row)
        elif not module.startswith("model.layers."):
            module = names.modules.get(module, module.removeprefix("model."))
            tensors[f"{prefix}{module}.{kind}"] = array
        else:
            _, _, layer, module = module.split(".", 3)
            if names.transposed:
                array = np.ascontiguousarray(array.T)
            module = names.modules.get(module, module)
            tensors[f"{prefix}{names.layers}.{layer}.{module}.{kind}"] = array
    return tensors


def _fused(config: ModelConfig, weights: Weights) -> Weights:
    """The same, with q, k and v in one, and gate and up."""
    names, left = config.stored_names, dict(weights)
    fused: Weights = {}
    for name in weights:
        if name not in left:
            continue
        before, found, kind = name.partition("self_attn.q_proj.")
        if names.qkv and found:
            q, k, v = (left.pop(f"{before}self_attn.{part}_proj.{kind}") for part in "qkv")
            fused[f"{before}{names.qkv}.{kind}"] = _qkv(config, q, k, v)
            continue
        before, found, kind = name.partition("mlp.gate_proj.")
        if names.gate_up and found:
            both = [left.pop(f"{before}mlp.{part}_proj.{kind}") for part in ("gate", "up")]
            fused[f"{before}{names.gate_up}.{kind}"] = np.concatenate(both)
            continue
        fused[name] = left.pop(name)
    return fused


def _qkv(config: ModelConfig, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    if not config.stored_names.qkv_by_kv_head:
        return np.concatenate([q, k, v])
    rows = []
    each = len(q) // config.kv_heads
    for head in range(config.kv_heads):
        rows.append(q[head * each : (head + 1) * each])
        for part in (k, v):
            rows.append(part[head * config.head_dim : (head + 1) * config.head_dim])
    return np.concatenate(rows)
