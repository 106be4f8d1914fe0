"""The small files beside the weights: configuration, generation settings, tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mpishard.config.model_config import ModelConfig
from mpishard.config.reader import read_model_config
from mpishard.errors import UserError
from mpishard.storage.downloads import refuse_placeholder
from mpishard.storage.parsing import parse_json

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
QUANTIZATION_CONFIG = "hf_quant_config.json"
COMPANIONS = (
    CONFIG,
    GENERATION_CONFIG,
    QUANTIZATION_CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "tekken.json",
)
# Folders of templates by name: as transformers calls it, and as it did before.
CHAT_TEMPLATES = ("additional_chat_templates", "chat_templates")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError with the file and, for malformed JSON, the line
    and column."""
    refuse_placeholder(path)
    try:
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}, not an object {{…}}")
    return content


def read_config(directory: Path, ignore_config: Iterable[str] = ()) -> ModelConfig:
    """The model configuration of a directory, with the token ids of ``generation_config.json`` and
    the quantization of ``hf_quant_config.json`` if there are such files. The user answers for its
    fields in `ignore_config`. Raises UserError as `read_json` and `read_model_config` do."""
    path = directory / CONFIG
    generation, quantization = (
        read_json(directory / name) if (directory / name).exists() else None
        for name in (GENERATION_CONFIG, QUANTIZATION_CONFIG)
    )
    return read_model_config(read_json(path), generation, str(path), ignore_config, quantization)


def named_templates(directory: Path) -> list[Path]:
    """The files of chat templates in folders of a directory; of two with a name the latter
    counts."""
    folders = [directory / folder for folder in reversed(CHAT_TEMPLATES)]
    return [path for folder in folders for path in sorted(folder.glob("*.jinja"))]


def companions(directory: Path) -> list[str]:
    """The names of those of the `COMPANIONS` that a directory has, and of its chat templates."""
    templates = [str(path.relative_to(directory)) for path in named_templates(directory)]
    return [name for name in (*COMPANIONS, *templates) if (directory / name).is_file()]


def copy_companions(source: Path, target: Path) -> None:
    """Copies the `companions` of a directory to another."""
    for name in companions(source):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
