"""The worked example of docs/parallelism/context.md, held to the ledger of a run."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

import mpishard
from mpishard.model import Decoder
from mpishard.sequences.step import Step, pack

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "parallelism" / "context.md"
ROW = re.compile(
    r"\| (prefill|decode) \| (\d) (\w+) \| `(\w+)` \| [^|]+ \| ([\d,]+) \| ([\d,]+) \|"
)


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
