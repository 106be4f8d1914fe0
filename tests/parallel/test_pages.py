"""Worked examples of the pages on parallelisms, held to the ledger and to the calls of a run."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from mpi4py import MPI
from tiny_models import tiny_config
from toys import toy

import mpishard
from mpishard.communication.mesh import Mesh
from mpishard.config.layout import Layout
from mpishard.engine.generate import next_tokens
from mpishard.engine.sampling import SamplingRow
from mpishard.engine.sampling_params import SamplingParams
from mpishard.model import Decoder
from mpishard.sequences.step import Step, pack

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "parallelism"
PAGE = PAGES / "context.md"
ROW = re.compile(
    r"\| (prefill|decode) \| (\d) (\w+) \| `(\w+)` \| [^|]+ \| ([\d,]+) \| ([\d,]+) \|"
)


CALL = re.compile(r"\| (prefill|decode|both) \| `(\w+)` \| \[[\w.]+\]\(\.\./\.\./([\w/.]+)\) \|")


def shown(phase: str, cp_rank: int) -> dict[tuple[str, str], tuple[int, int]]:
    """Calls and bytes sent per layer by operation and group, as the page has them."""
    calls: Counter[tuple[str, str]] = Counter()
    sent: Counter[tuple[str, str]] = Counter()
    for step, number, operation, group, *sent_by_cp_rank in ROW.findall(PAGE.read_text()):
        if step == phase:
            calls[operation, group] += int(number)
            sent[operation, group] += int(sent_by_cp_rank[cp_rank].replace(",", ""))
    return {key: (calls[key], sent[key]) for key in calls}


def sent_by_layers(model: Decoder, step: Step) -> dict[tuple[str, str], tuple[int, float]]:
    """Calls and bytes sent by operation and group in all layers, without embedding and head."""
    found: dict[tuple[str, str], tuple[int, float]] = {}
    ledger = model.mesh.ledger

    def observe(layer: int, _: np.ndarray) -> None:
        if layer == 0:
            ledger.clear()
        if layer == model.config.layers:
            found.update({(what, on): (e.calls, e.wire_bytes) for what, on, e in ledger})

    model.forward(step, observe)
    return found


@pytest.mark.ranks(4)
def test_the_table_of_context_parallelism_is_the_ledger(comm: MPI.Intracomm):
    model = mpishard.load(ROOT / "data" / "cpython-4m", comm, tp=2, cp=2).decoder
    mesh, layers = model.mesh, model.config.layers
    cache = model.allocate_cache(17, 16)
    for phase, tokens in (("prefill", 16), ("decode", 1)):
        step = pack([(np.arange(tokens), cache)], model.sequence_sharding)
        expected = shown(phase, mesh.cp.rank)
        assert len(expected) > 1
        assert sent_by_layers(model, step) == {
            key: (layers * calls, layers * sent) for key, (calls, sent) in expected.items()
        }
    mesh.free()


@pytest.mark.ranks(4)
def test_the_way_of_a_query_is_the_one_that_the_page_shows(comm: MPI.Intracomm):
    """Each function is called, for the first time in this order; they are in ten files."""
    rows = CALL.findall((PAGES / "flash-decoding.md").read_text())
    assert len({file for _, _, file in rows}) == 10
    layout = Layout(tp=2, cp=2, flash_decoding=True)
    mesh = Mesh.split(comm, layout, tiny_config("llama-mqa"))
    model = toy("llama-mqa", mesh)
    cache = model.allocate_cache(9, 8)
    called: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        file = frame.f_code.co_filename
        if event == "call" and "mpishard" in file:
            called.append((frame.f_code.co_name, f"mpishard{file.rpartition('mpishard')[2]}"))

    for phase, tokens in (("prefill", 8), ("decode", 1)):
        step = pack([(np.arange(tokens), cache)], model.sequence_sharding)
        called.clear()
        sys.setprofile(note)
        try:
            next_tokens(model, step, [SamplingRow(SamplingParams(), 0, cache.length)])
        finally:
            sys.setprofile(None)
        expected = [(name, file) for when, name, file in rows if when in (phase, "both")]
        assert [call for call in dict.fromkeys(called) if call in expected] == expected, phase
    mesh.free()
