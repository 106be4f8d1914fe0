#!/usr/bin/env python3
"""Remake mpishard/config/known_fields.py: the fields that transformers' configuration classes know.

    python scripts/dev/list_known_fields.py

Needs transformers (the `dev` extra). A family whose code is not in transformers has no class; its
name is skipped.
"""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TARGET = Path(__file__).resolve().parents[2] / "mpishard" / "config" / "known_fields.py"

FAMILIES = """
    llama mistral qwen2 qwen3 gemma2 mixtral qwen2_moe qwen3_moe olmoe gpt_oss deepseek_v2
    deepseek_v3 gemma gemma3_text phi3 olmo2 olmo3 granite granitemoe granitemoeshared glm glm4
    glm4_moe smollm3 exaone4 cohere cohere2 seed_oss ministral3 ernie4_5 ernie4_5_moe dots1
    minimax_m2 hunyuan_v1_dense hunyuan_v1_moe phimoe arcee nemotron gpt2 gpt_neox gptj phi opt
    bloom mpt falcon starcoder2 gpt_bigcode stablelm olmo llama4_text qwen3_next switch_transformers
    qwen2_vl_text qwen2_5_vl_text qwen3_vl_text qwen3_vl_moe_text
""".split()
WRAPPERS = """
    gemma3 internvl kimi_k25 llama4 llava llava_next mistral3 qwen2_vl qwen2_5_vl qwen3_vl
    qwen3_vl_moe
""".split()
SIZES = """
    hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size
""".split()
SPARSE = "llama mistral gemma3_text llama4_text qwen2 qwen3".split()

HEAD = """\"\"\"The fields that transformers knows, by the model_type of the configuration class.

Made by ``scripts/dev/list_known_fields.py`` from transformers {version}. A field of these that no
reader asks for could change the logits, whatever its value: see `Fields.reject_unknown`.
\"\"\"

from __future__ import annotations


def _by_class(table: str) -> dict[str, frozenset[str]]:
    lines = table.replace("\\n        ", " ").strip().splitlines()
    parts = (line.partition(":") for line in lines)
    return {{name.strip(): frozenset(fields.split()) for name, _, fields in parts}}


"""


def main() -> None:
    every = {name: _fields(name) for name in (*FAMILIES, *WRAPPERS) if name in CONFIG_MAPPING}
    common = _names(PreTrainedConfig).union(
        name
        for name in every["llama"]
        if sum(name in fields for fields in every.values()) > len(every) // 2
    )
    special = {name for fields in every.values() for name in fields if name.endswith("_token_id")}
    rare = {name: fields - common - special for name, fields in every.items()}
    TARGET.write_text(
        HEAD.format(version=transformers.__version__)
        + "# Fields that most classes have.\n"
        + f"COMMON_FIELDS = frozenset(\n{_wrapped(common - special)}.split()\n)\n\n"
        + f"KNOWN_FIELDS = _by_class(\n{_table(rare, FAMILIES)})\n\n"
        + "# Of the classes that have a text_config.\n"
        + f"WRAPPER_FIELDS = _by_class(\n{_table(rare, WRAPPERS)})\n\n"
        + "# What a text_config may omit: its hidden_size, intermediate_size, num_hidden_layers,\n"
        + "# num_attention_heads and vocab_size.\n"
        + "DEFAULT_SIZES: dict[str, tuple[int, ...]] = {\n"
        + "".join(f'    "{name}": {_sizes(name)},\n' for name in SPARSE)
        + "}\n"
    )


def _fields(model_type: str) -> set[str]:
    return _names(CONFIG_MAPPING[model_type])


def _names(config: Any) -> set[str]:
    names = {field.name for field in dataclasses.fields(config)}
    return names | set(config.attribute_map) | set(config.attribute_map.values())


def _sizes(model_type: str) -> tuple[int, ...]:
    default = CONFIG_MAPPING[model_type]()
    return tuple(getattr(default, name) for name in SIZES)


def _table(fields: dict[str, set[str]], names: list[str]) -> str:
    lines = [
        textwrap.fill(
            f"{name}: {' '.join(sorted(fields[name]))}",
            100,
            initial_indent=4 * " ",
            subsequent_indent=8 * " ",
            break_on_hyphens=False,
        )
        for name in names
        if name in fields
    ]
    quotes = 3 * '"'
    return f"    {quotes}\n" + "\n".join(lines) + f"\n    {quotes}\n"


def _wrapped(names: set[str]) -> str:
    quotes, indent = 3 * '"', 4 * " "
    words = textwrap.fill(
        " ".join(sorted(names)), 100, initial_indent=indent, subsequent_indent=indent
    )
    return f"{indent}{quotes}\n{words}\n{indent}{quotes}"


if __name__ == "__main__":
    main()
