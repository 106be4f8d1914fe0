#!/usr/bin/env python3
"""Remake tests/golden: what Hugging Face transformers computes for the tiny models of the tests.

    python scripts/make_goldens.py [VARIANT …]

Needs torch and transformers (the `dev` extra). For each variant and prompt P it stores, in float32:
ids_P (S,), logits_P (S, V) at every position, hidden_P (layers + 1, S, D): the residual stream
entering each layer and after the final norm, and greedy_P: the continuation, recomputed without a
cache, so that the rope types that depend on the length are well defined.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny_models import VARIANTS, tiny_prompts, write_checkpoint  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"
CONTINUATION = 8
LEAST_MARGIN = 2e-3  # of the logits' standard deviation, ten times the tolerance of the tests


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    GOLDEN.mkdir(exist_ok=True)
    for variant in sys.argv[1:] or VARIANTS:
        arrays = golden(variant)
        np.savez_compressed(GOLDEN / f"{variant}.npz", **arrays)
        print(f"{variant}: least margin {arrays['margin']:.4f} of the logits' standard deviation")
    if not sys.argv[1:]:
        for file in GOLDEN.glob("*.npz"):
            if file.stem not in VARIANTS:
                file.unlink()


def golden(variant: str) -> dict[str, Any]:
    """The arrays of one file; raises SystemExit if two tokens are too close to tell apart."""
    arrays: dict[str, Any] = {"transformers": np.array(transformers.__version__)}
    margins = []
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(variant, directory)
        for p, ids in enumerate(tiny_prompts(variant)):
            # Afresh for each prompt, because dynamic rope remembers the longest sequence it saw.
            model = load(directory)
            logits, hidden = forward(model, ids)
            arrays |= {f"ids_{p}": np.array(ids), f"logits_{p}": logits, f"hidden_{p}": hidden}
            sequence = list(ids)
            for _ in range(CONTINUATION):
                logits, _ = forward(model, sequence)
                second, first = np.sort(logits[-1])[-2:]
                margins.append((first - second) / logits.std())
                sequence.append(int(logits[-1].argmax()))
            arrays[f"greedy_{p}"] = np.array(sequence[len(ids) :])
    arrays["margin"] = np.array(min(margins))
    if min(margins) < LEAST_MARGIN:
        raise SystemExit(f"{variant}: two tokens are {min(margins):.1e} apart: take another seed")
    return arrays


def load(directory: str) -> transformers.PreTrainedModel:
    """The model, which must have found each of its weights in the checkpoint and left none."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    wrong = {what: names for what, names in report.items() if names}
    if wrong:
        raise SystemExit(f"{directory}: transformers reports {wrong}")
    return model.eval()


@torch.no_grad()
def forward(model: transformers.PreTrainedModel, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Logits (S, V) and hidden states (layers + 1, S, D) of one sequence."""
    output = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    return output.logits[0].numpy(), torch.cat(output.hidden_states).numpy()


if __name__ == "__main__":
    main()
