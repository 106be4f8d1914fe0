"""Weights as the checkpoints of their families store them: other names, fused and transposed.

The names are the family's own, which transformers finds or does not when golden values are made.
How several weights lie in one tensor is written out here once more, with whole arrays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tiny_encoder_models import parts

from mpishard.config.model_config import ModelConfig

Weights = dict[str, np.ndarray]


def stored(config: ModelConfig, weights: Weights, prefix: str | None = None) -> Weights:
    """The tensors of a checkpoint with these `weights`, which have the names of the table; all but
    the head below `prefix`, the first of the family's unless given."""
    if config.encoder is not None:
        decoder, encoder = parts(config, weights)
        alone = replace(config, encoder=None)
        return stored(config.encoder, encoder) | stored(alone, decoder, prefix)
    names = config.stored_names
    prefix = names.prefixes[0] if prefix is None else prefix
    tensors: Weights = {}
    for name, array in _fused(config, weights).items():
        module, _, kind = name.rpartition(".")
        if config.moe and config.moe.names.e_score_correction_bias_is_matrix:
            array = array[np.newaxis] if kind == "e_score_correction_bias" else array
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
        before, found, kind = name.partition("self_attn.q_proj.")
        if config.output_gate and found:
            q, gate = (left.pop(f"{before}self_attn.{part}_proj.{kind}") for part in ("q", "gate"))
            fused[name] = _head_by_head(config.heads, q, gate)
            continue
        before, found, _ = name.partition("linear_attn.q_proj.")
        if config.linear_attention and found:
            before += "linear_attn"
            part = {one: left.pop(f"{before}.{one}_proj.weight") for one in "qkvzba"}
            key_heads = config.linear_attention.kv_heads
            fused[f"{before}.in_proj_qkvz.weight"] = _head_by_head(
                key_heads, *(part[one] for one in "qkvz")
            )
            fused[f"{before}.in_proj_ba.weight"] = _head_by_head(key_heads, part["b"], part["a"])
            taps = [left.pop(f"{before}.{one}_conv1d.weight") for one in "qkv"]
            fused[f"{before}.conv1d.weight"] = np.concatenate(taps)
            continue
        for network, module in (("mlp", names.gate_up), ("shared_mlp", names.shared_gate_up)):
            before, found, kind = name.partition(f".{network}.gate_proj.")
            if module and found:
                both = [
                    left.pop(f"{before}.{network}.{part}_proj.{kind}") for part in ("gate", "up")
                ]
                fused[f"{before}.{module}.{kind}"] = np.concatenate(both)
                break
        else:
            fused[name] = left.pop(name)
    return fused


def _head_by_head(heads: int, *parts: np.ndarray) -> np.ndarray:
    """The rows of each head of all `parts` after those of the head before."""
    split = [np.split(part, heads) for part in parts]
    return np.concatenate([rows for of_head in zip(*split, strict=True) for rows in of_head])


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
