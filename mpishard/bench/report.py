"""A report of `mpishard.bench.measurement.measure`, to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(report: dict[str, Any]) -> str:
    """A report of `measure` to read."""
    parts = [_speed_lines, _balance_lines, _memory_lines, _collective_lines]
    if any("moe_seconds" in row for row in report["speeds"]):
        parts.insert(2, _moe_lines)
    lines = [_heading(report), *_machine_lines(report)]
    for part in parts:
        lines += ["", *part(report)]
    return "\n".join(lines)


def _heading(report: dict[str, Any]) -> str:
    kernels = f", {report['blas_kernels']} kernels" if report["blas_kernels"] else ""
    return (
        f"{report['model']}: {report['layout']}, ranks: {report['ranks']}, threads per rank: "
        f"{report['threads']}, {report['dtype']}, NumPy {report['numpy']} ({report['blas']}"
        f"{kernels}), {report['mpi']}"
    )


def _machine_lines(report: dict[str, Any]) -> list[str]:
    return [
        "roofline of each rank, all at work: GEMV reads "
        f"{report['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s, GEMM makes "
        f"{report['product_flops_per_second'] / 1e9:.1f} Gflop/s",
        f"weights of each rank: {report['weight_bytes'] / 1e6:.1f} MB, of which a step reads "
        f"{report['read_bytes'] / 1e6:.1f} MB",
    ]


def _title(row: dict[str, Any], report: dict[str, Any]) -> str:
    length = row["prompt_tokens"]
    return (
        f"prefill {length}"
        if row["phase"] == "prefill"
        else f"decode {report['max_tokens']} after {length}"
    )


def _speed_lines(report: dict[str, Any]) -> list[str]:
    rows = [
        ("", "batch", "tokens/s", "roofline", "fraction", "with attention", "fraction", "ms/step")
        + ("communication",)
    ]
    for row in report["speeds"]:
        rows.append(
            (
                _title(row, report),
                f"{row['batch']}",
                f"{row['tokens_per_second']:.1f}",
                f"{row['roofline_tokens_per_second']:.1f}",
                _percent(row["fraction_of_roofline"]),
                f"{row['roofline_with_attention_tokens_per_second']:.1f}",
                _percent(row["fraction_of_roofline_with_attention"]),
                f"{1e3 * row['seconds_per_step']:.2f}",
                f"{100 * row['share_in_communication']:.1f} %",
            )
        )
    return _aligned(rows)


def _balance_lines(report: dict[str, Any]) -> list[str]:
    rows = [
        ("seconds of a step, all ranks", "batch", "arithmetic: least", "most", "imbalance")
        + ("attention", "Gflop/s", "of GEMM", "isendrecv", "of step")
    ]
    for row in report["speeds"]:
        if row["phase"] != "prefill":
            continue
        least, most = row["least_arithmetic_seconds"], row["most_arithmetic_seconds"]
        rate = row["attention_flops"] / row["attention_seconds"]
        rows.append(
            (
                _title(row, report),
                f"{row['batch']}",
                f"{least:.3f}",
                f"{most:.3f}",
                _percent(most / least - 1),
                f"{row['attention_seconds']:.3f}",
                f"{rate / 1e9:.1f}",
                _percent(rate / row["product_flops_per_second"]),
                f"{row['isendrecv_seconds']:.3f}",
                _percent(row["isendrecv_seconds"] / row["seconds_per_step"]),
            )
        )
    return _aligned(rows)


def _moe_lines(report: dict[str, Any]) -> list[str]:
    rows = [
        ("MoE layers of a step, all ranks", "batch", "arithmetic, s", "GEMM at least", "times")
        + ("rows: fewest", "most", "sent, there and back", "if even")
    ]
    for row in report["speeds"]:
        if row["phase"] != "prefill":
            continue
        least = row["moe_roofline_seconds"]
        rows.append(
            (
                _title(row, report),
                f"{row['batch']}",
                f"{row['moe_seconds']:.3f}",
                f"{least:.3f}",
                f"{row['moe_seconds'] / least:.2f}",
                f"{row['fewest_expert_rows']}",
                f"{row['most_expert_rows']}",
                f"{row['expert_rows_sent']}",
                f"{row['expert_rows_sent_if_even']:.0f}",
            )
        )
    return _aligned(rows)


def _memory_lines(report: dict[str, Any]) -> list[str]:
    kinds = ("kv_cache", "residual_stream", "activations", "peak")
    names = ["weights", *(kind.replace("_", " ") for kind in kinds)]
    rows = [("memory of a rank, MB", "batch", *names)]
    for row in report["memory"]:
        figures = [report["weight_bytes"], *(row[f"{kind}_bytes"] for kind in kinds)]
        title = f"prefill {row['prompt_tokens']}, decode {report['max_tokens']}"
        rows.append((title, f"{row['batch']}", *(f"{figure / 1e6:.1f}" for figure in figures)))
    return _aligned(rows)


def _collective_lines(report: dict[str, Any]) -> list[str]:
    rows = [("per step, on rank 0", "batch", "group", "calls", "payload", "wire bytes", "ms")]
    for row in report["speeds"]:
        for entry in row["collectives"]:
            rows.append(
                (
                    f"{_title(row, report)}: {entry['operation']}",
                    f"{row['batch']}",
                    entry["group"],
                    f"{entry['calls']}",
                    f"{entry['payload_bytes']}",
                    f"{entry['wire_bytes']:.0f}",
                    f"{1e3 * entry['seconds']:.3f}",
                )
            )
    return _aligned(rows)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
