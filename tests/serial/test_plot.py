"""``scripts/plot_contexts.py``: what it draws, mostly of reports that are made up here."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny_models import write_checkpoint

import mpishard
from mpishard.bench import measure, probes

SCRIPT = Path(__file__).parents[2] / "scripts" / "plot_contexts.py"
FIGURES = ("peak_bytes", "activations_bytes", "kv_cache_bytes")


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plot_contexts", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plot_contexts = load_script()


def report(layout: str, lengths: list[int], scale: float, batches: tuple[int, ...] = (1,)) -> dict:
    """A report as `mpishard bench --json` prints it, of what the plot reads."""
    cases = [(length, batch) for length in lengths for batch in batches]
    memory = [
        {"prompt_tokens": length, "batch": batch}
        | {name: int(scale * batch * length * 10**place) for place, name in enumerate(FIGURES, 3)}
        for length, batch in cases
    ]
    speeds = [
        {"phase": phase, "prompt_tokens": length, "batch": batch}
        | {"seconds_per_step": scale * batch * length * seconds}
        for length, batch in cases
        for phase, seconds in (("prefill", 0.01), ("decode", 1e-5))
    ]
    return {
        "model": "a-model",
        "layout": layout,
        "dtype": "float32",
        "memory": memory,
        "speeds": speeds,
    }


SERIAL = report("--tp 1 --dp 1", [8192, 1024], 1.0, (1, 8))
RING = report("--tp 1 --cp 2 --dp 1", [1024, 8192], 0.5)


@pytest.mark.parametrize(
    ("title", "at_1024"),
    [
        ("Peak memory of a rank", 1024e3 / 1e6),
        ("of that, a prompt's activations", 1024e4 / 1e6),
        ("of that, the KV cache", 1024e5 / 1e6),
        ("Prefill", 10.24),
        ("Generation", 10.24),
    ],
)
def test_a_panel_has_a_line_for_each_layout(title, at_1024):
    (panel,) = [panel for panel in plot_contexts.PANELS if panel.title == title]
    by_layout = plot_contexts.lines([SERIAL, RING], panel, 1)
    assert list(by_layout) == [SERIAL["layout"], RING["layout"]]
    for layout, scale in ((SERIAL["layout"], 1.0), (RING["layout"], 0.5)):
        assert list(by_layout[layout]) == [1024, 8192]
        assert by_layout[layout][1024] == pytest.approx(scale * at_1024)
        assert by_layout[layout][8192] == pytest.approx(8 * scale * at_1024)


def test_reports_of_one_layout_are_one_line():
    longer = report(SERIAL["layout"], [32768], 1.0)
    panel = plot_contexts.PANELS[0]
    (line,) = plot_contexts.lines([SERIAL, longer], panel, 1).values()
    assert list(line) == [1024, 8192, 32768]


def test_the_batch_is_chosen():
    panel = plot_contexts.PANELS[0]
    (one,) = plot_contexts.lines([SERIAL], panel, 1).values()
    (eight,) = plot_contexts.lines([SERIAL], panel, 8).values()
    assert eight[1024] == pytest.approx(8 * one[1024])
    with pytest.raises(
        plot_contexts.ProblemError, match=r"--batch 8: .*--cp 2 --dp 1 has only \[1\]"
    ):
        plot_contexts.lines([SERIAL, RING], panel, 8)


def test_the_heading_says_what_the_lines_have_in_common():
    assert plot_contexts.heading([SERIAL, RING], 1) == "a-model, float32, batch 1"


def test_a_report_of_bench_has_every_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "NODE_WORKING_SET", 2**20)
    monkeypatch.setattr(probes, "RANK_WORKING_SET", 2**20)
    model = mpishard.load(write_checkpoint("llama-mha", tmp_path))
    measured = measure(model, [4, 9], 2, [1], repeat=1)
    for panel in plot_contexts.PANELS:
        (line,) = plot_contexts.lines([measured], panel, 1).values()
        assert list(line) == [4, 9] and min(line.values()) > 0
    path = tmp_path / "report.json"
    path.write_text(json.dumps(measured))
    assert plot_contexts.read_report(path) == measured


def run(
    tmp_path: Path, *options: object, python: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    files = []
    for name, content in (("serial", SERIAL), ("ring", RING)):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(content))
    command = [sys.executable, *(python or (str(SCRIPT),)), *map(str, files), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(("ending", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_script_draws_or_says_what_it_needs(tmp_path, ending, begins):
    output = tmp_path / f"contexts.{ending}"
    finished = run(tmp_path, "--output", output)
    if importlib.util.find_spec("matplotlib"):
        assert finished.returncode == 0, finished.stderr
        assert output.read_bytes().startswith(begins)
    else:
        assert finished.returncode == 2
        assert "pip install 'mpishard[plot]'" in finished.stderr


def test_without_matplotlib_the_message_says_what_to_install(tmp_path):
    hidden = (
        "import sys, runpy; sys.modules['matplotlib'] = None; sys.argv[0] = 'plot_contexts.py'; "
    )
    hidden += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    finished = run(tmp_path, "--output", tmp_path / "a.png", python=("-c", hidden))
    assert finished.returncode == 2
    assert finished.stderr == (
        "plot_contexts.py: error: drawing needs matplotlib, which is not installed: "
        "pip install 'mpishard[plot]'\n"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("{", "cannot be read"), ("[1]", "is not a report of")],
)
def test_what_is_no_report_is_refused(tmp_path, content, message):
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(plot_contexts.ProblemError, match=f"^{path} {message}"):
        plot_contexts.read_report(path)
