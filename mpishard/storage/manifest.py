"""The manifest of a shard directory, ``mpishard.json``: what all its files have in common."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpishard.config.weight_sharding import WeightSharding
from mpishard.errors import UserError, brief
from mpishard.storage.arrays import DTYPES
from mpishard.storage.model_dir import read_json

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """The facts that all files of a conversion share: the content of ``mpishard.json``."""

    conversion: str
    source: str
    dtype: str
    sharding: WeightSharding
    ignore_config: tuple[str, ...] = ()  # fields of config.json that the user answered for
    head_differs: bool = False  # the head is stored, though config.json ties it to the embedding

    @property
    def mapping(self) -> dict[str, int]:
        """The sharding as numbers; there is one file for each of the `ranks`."""
        return {"tp": self.sharding.tp, "ep": self.sharding.ep, "ranks": self.sharding.ranks}

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """The manifest in a file. Raises UserError for another format version, a missing field, and
        a mapping or dtype that this version cannot read."""
        raw = read_json(path)
        check_version(path, raw.get("format_version"))
        try:
            conversion, source, dtype = raw["conversion"], raw["source"], raw["dtype"]
            mapping = raw["mapping"]
        except KeyError as error:
            raise UserError(f"{path} is not a manifest of shards: it lacks {error}") from None
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise UserError(
                f"{path}: dtype is {brief(repr(dtype))}, not one of {', '.join(DTYPES)}"
            )
        ignored, head_differs = raw.get("ignore_config", []), raw.get("head_differs", False)
        if not isinstance(ignored, list) or not all(isinstance(name, str) for name in ignored):
            raise UserError(f"{path}: ignore_config is {brief(str(ignored))}, not a list of names")
        if type(head_differs) is not bool:
            raise UserError(
                f"{path}: head_differs is {brief(str(head_differs))}, not true or false"
            )
        sharding = _read_mapping(path, mapping)
        return cls(conversion, source, dtype, sharding, tuple(ignored), head_differs)

    def write(self, path: Path) -> None:
        """Writes the manifest as JSON."""
        content = {
            "format_version": FORMAT_VERSION,
            "conversion": self.conversion,
            "source": self.source,
            "dtype": self.dtype,
            "mapping": self.mapping,
            **({"ignore_config": self.ignore_config} if self.ignore_config else {}),
            **({"head_differs": True} if self.head_differs else {}),
        }
        path.write_text(json.dumps(content, indent=2) + "\n")


def _read_mapping(path: Path, mapping: Any) -> WeightSharding:
    numbers = mapping if isinstance(mapping, dict) else {}
    sound = numbers.keys() == {"tp", "ep", "ranks"} and all(
        type(number) is int and number > 0 for number in numbers.values()
    )
    if not sound or numbers["ranks"] % numbers["tp"] or numbers["ranks"] % numbers["ep"]:
        raise UserError(
            f"{path}: mapping is {brief(str(mapping))}, but must have tp and ep, whole numbers "
            "from 1, and ranks, a multiple of both"
        )
    return WeightSharding(**numbers)


def check_version(path: Path, version: Any) -> None:
    """Refuse a file of another format version (UserError)."""
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {brief(str(version))}, but this program reads version "
            f"{FORMAT_VERSION}: convert the model again with `mpishard shard`"
        )
