#!/usr/bin/env python3
"""Draw memory per rank and time against the length of the context, a line for each layout.

    mpishard bench MODEL --json --batch 1 --prompt-tokens 1024 8192 > serial.json
    mpirun -n 2 mpishard bench MODEL --cp 2 --json --batch 1 --prompt-tokens 1024 8192 > cp.json
    python scripts/plot_contexts.py serial.json cp.json --output contexts.png

Needs matplotlib (the `plot` extra). Several reports of one layout are one line. The ending of the
output's name says what it becomes: .png, .svg, .pdf.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

Line = dict[int, float]  # length of the context -> figure


class Panel(NamedTuple):
    """One of the drawings: what it shows, under which name in which rows of a report."""

    title: str
    unit: str
    rows: str  # "memory" or the phase of "speeds"
    figure: str
    factor: float  # from the report's unit


PANELS = (
    Panel("Peak memory of a rank", "MB", "memory", "peak_bytes", 1e-6),
    Panel("of that, a prompt's activations", "MB", "memory", "activations_bytes", 1e-6),
    Panel("of that, the KV cache", "MB", "memory", "kv_cache_bytes", 1e-6),
    Panel("Prefill", "s", "prefill", "seconds_per_step", 1),
    Panel("Generation", "ms per token", "decode", "seconds_per_step", 1e3),
)


def main() -> int:
    args = _parse()
    try:
        reports = [read_report(path) for path in args.reports]
        panels = [(panel, lines(reports, panel, args.batch)) for panel in PANELS]
        draw(panels, heading(reports, args.batch), args.output)
    except ProblemError as error:
        print(f"plot_contexts.py: error: {error}", file=sys.stderr)
        return 2
    print(args.output)
    return 0


class ProblemError(Exception):
    """What the caller can mend, in one sentence."""


def read_report(path: Path) -> dict[str, Any]:
    """What ``mpishard bench --json`` printed into a file. Raises ProblemError for anything else."""
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ProblemError(f"{path} cannot be read: {error}") from None
    if not isinstance(report, dict) or not {"layout", "memory", "speeds"} <= report.keys():
        raise ProblemError(f"{path} is not a report of `mpishard bench --json`")
    return report


def lines(reports: Iterable[dict[str, Any]], panel: Panel, batch: int) -> dict[str, Line]:
    """The figures of a panel by layout and length of the context, both in order: layouts as they
    come, lengths ascending. Raises ProblemError for a report without the batch."""
    by_layout: dict[str, Line] = {}
    for report in reports:
        rows = report["memory"] if panel.rows == "memory" else report["speeds"]
        line = by_layout.setdefault(report["layout"], {})
        found = [
            row
            for row in rows
            if row["batch"] == batch and row.get("phase", "memory") == panel.rows
        ]
        if not found:
            batches = sorted({row["batch"] for row in rows})
            raise ProblemError(
                f"--batch {batch}: the report of {report['layout']} has only {batches}"
            )
        for row in found:
            line[row["prompt_tokens"]] = row[panel.figure] * panel.factor
    return {layout: dict(sorted(line.items())) for layout, line in by_layout.items()}


def heading(reports: list[dict[str, Any]], batch: int) -> str:
    """What the drawing is of: the models, and what all lines have in common."""
    models = ", ".join(sorted({report["model"] for report in reports}))
    dtypes = ", ".join(sorted({report["dtype"] for report in reports}))
    return f"{models}, {dtypes}, batch {batch}"


def draw(panels: list[tuple[Panel, dict[str, Line]]], title: str, output: Path) -> None:
    """Write all panels into the picture `output`. Raises ProblemError without matplotlib, and where
    the picture cannot be written."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogFormatter
    except ImportError:
        raise ProblemError(
            "drawing needs matplotlib, which is not installed: pip install 'mpishard[plot]'"
        ) from None
    figure = Figure(figsize=(12, 7), layout="constrained")
    figure.suptitle(title)
    *axes, legend = figure.subplots(2, 3).flat
    for (panel, by_layout), axis in zip(panels, axes, strict=True):
        for layout, line in by_layout.items():
            axis.plot(list(line), list(line.values()), marker="o", label=layout)
        lengths = sorted({length for line in by_layout.values() for length in line})
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.minorticks_off()
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(LogFormatter())
        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
        axis.set(title=panel.title, ylabel=panel.unit, xlabel="tokens of context")
        axis.grid(alpha=0.3)
    legend.axis("off")
    legend.legend(*axes[0].get_legend_handles_labels(), loc="center", frameon=False)
    try:
        figure.savefig(output)
    except (OSError, ValueError) as error:
        raise ProblemError(f"--output {output} cannot be written: {error}") from None


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Memory and time against context length.")
    parser.add_argument(
        "reports", type=Path, nargs="+", metavar="REPORT", help="of `mpishard bench --json`"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="OUT.png")
    parser.add_argument(
        "--batch", type=int, default=1, metavar="N", help="whose lines to draw (default: 1)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
