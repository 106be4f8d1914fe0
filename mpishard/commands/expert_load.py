"""The load of experts that --expert-load reports: a table, and a JSON file.

The file of a load is one object: ``format``, ``model``, ``layout``, ``ranks``, ``experts`` and
``top_k`` of the run, and ``loads``, one for each layer and phase ("prefill" or "decode") of the
tokens:

    {"layer": 0, "phase": "prefill", "rows_of_experts": [...], "rows_of_ranks": [...],
     "dropped": 0, "imbalance_of_experts": 1.25, "imbalance_of_ranks": 1.1}

A row is one (token, expert) pair, of all steps and requests. Ranks that shard the width of the same
experts have the same rows. The imbalance is the maximum over the mean, null where there are no
rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpishard.api import Model
from mpishard.errors import UserError, brief
from mpishard.parallel.expert_load import ExpertLoad, imbalance
from mpishard.storage.model_dir import read_json

LOAD_FORMAT = "mpishard expert load 1"

MOST_ROWS = 2**62  # of an expert: their sums are shared and compared as float64


def load_report(model: Model, load: ExpertLoad) -> dict[str, Any]:
    """What `load` counted of `model`, on every rank. Collective."""
    totals, moe = load.totals(model.mesh), model.config.moe
    assert moe is not None, "only MoE models have a load"
    return {
        "format": LOAD_FORMAT,
        "model": str(model.path),
        "layout": str(model.mesh.layout),
        "ranks": model.mesh.world.size,
        "experts": moe.num_experts,
        "top_k": moe.top_k,
        "loads": [
            {
                "layer": rows.layer,
                "phase": rows.phase,
                "rows_of_experts": rows.tokens_per_expert,
                "rows_of_ranks": rows.tokens_per_rank,
                "dropped": rows.dropped,
                "imbalance_of_experts": imbalance(rows.tokens_per_expert),
                "imbalance_of_ranks": imbalance(rows.tokens_per_rank),
            }
            for rows in totals
        ],
    }


def load_table(report: dict[str, Any]) -> str:
    """A report of `load_report` to read."""
    return "\n".join(_load_lines(report))


def _load_lines(report: dict[str, Any]) -> Iterator[str]:
    yield (
        f"expert load, {report['top_k']} of {report['experts']} experts a token, "
        f"{report['ranks']} ranks; most over mean:"
    )
    yield f"{'layer':>5}  {'phase':<10}  {'rows':>9}  {'dropped':>9}  {'experts':>7}  {'ranks':>7}"
    for one in report["loads"]:
        rows, dropped = sum(one["rows_of_experts"]), one["dropped"]
        if rows or dropped:
            imbalances = (one["imbalance_of_experts"], one["imbalance_of_ranks"])
            columns = "  ".join("      -" if x is None else f"{x:7.2f}" for x in imbalances)
            yield f"{one['layer']:>5}  {one['phase']:<10}  {rows:>9}  {dropped:>9}  {columns}"


def read_loads(path: Path) -> dict[int, list[int]]:
    """The rows of each expert in prefill and decode together, by layer, from a file that
    --expert-load wrote; UserError if it is none."""
    content = read_json(path)
    if content.get("format") != LOAD_FORMAT:
        raise UserError(
            f'{path} has the "format" {brief(repr(content.get("format")))}, not {LOAD_FORMAT!r}: '
            "give the file that --expert-load wrote"
        )
    loads: dict[int, list[int]] = {}
    try:
        for one in content["loads"]:
            layer, rows_E = one["layer"], one["rows_of_experts"]
            _check_rows(layer, rows_E, content["experts"])
            before_E = loads.get(layer, [0] * len(rows_E))
            loads[layer] = [a + b for a, b in zip(before_E, rows_E, strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        problem = brief(f"{type(error).__name__}: {error}")
        raise UserError(f"{path} is not a load as --expert-load writes it: {problem}") from None
    if not any(map(any, loads.values())):
        raise UserError(f"{path} has no rows: there is nothing to go by")
    return loads


def _check_rows(layer: Any, rows_E: Any, experts: Any) -> None:
    """Refuse, with a ValueError, what cannot be the number of a layer and the rows of each of so
    many experts."""
    counts = [layer, *rows_E]
    if not all(type(count) is int and 0 <= count <= MOST_ROWS for count in counts):
        raise ValueError(f"layer and rows must be whole numbers from 0 to {MOST_ROWS}")
    if not rows_E or len(rows_E) != experts:
        raise ValueError(f"there are rows of {len(rows_E)} experts, not of {experts!r}")
