"""The load of a mixture's experts, to read and as a JSON file.

The file is one object: ``format``, ``model``, ``layout``, ``ranks``, ``experts`` and ``top_k`` of
the run, and ``loads``, one for each layer and phase ("prompt" or "generation") of the tokens:

    {"layer": 0, "phase": "prompt", "rows_of_experts": [...], "rows_of_ranks": [...],
     "dropped": 0, "imbalance_of_experts": 1.25, "imbalance_of_ranks": 1.1}

A row is one token for one of its experts, all steps and requests together. Ranks that divide the
width of the same experts have the same rows. The imbalance is the most over the mean, null where
there are no rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mpishard.api import Model
from mpishard.parallel.expert_load import Load, imbalance

LOAD_FORMAT = "mpishard expert load 1"


def load_report(model: Model, load: Load) -> dict[str, Any]:
    """What `load` counted of `model`, on every rank. Collective."""
    totals, moe = load.totals(model.mesh), model.config.moe
    assert moe is not None, "a load is that of a mixture"
    return {
        "format": LOAD_FORMAT,
        "model": str(model.path),
        "layout": str(model.mesh.layout),
        "ranks": model.mesh.world.size,
        "experts": moe.experts,
        "top_k": moe.top_k,
        "loads": [
            {
                "layer": rows.layer,
                "phase": rows.phase,
                "rows_of_experts": rows.of_experts,
                "rows_of_ranks": rows.of_ranks,
                "dropped": rows.dropped,
                "imbalance_of_experts": imbalance(rows.of_experts),
                "imbalance_of_ranks": imbalance(rows.of_ranks),
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
