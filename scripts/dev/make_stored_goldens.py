#!/usr/bin/env python3
"""Remake tests/golden/stored: the logits of the tiny models in every storage form.

    python scripts/dev/make_stored_goldens.py [FORM …]

Needs torch and transformers (the `dev` extra). A model has the numbers that its codes mean, in
float32, and transformers computes its logits (S, V) for one prompt.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts" / "dev")]

from make_goldens import LEAST_MARGIN, forward, load  # noqa: E402
from quantized_models import MODELS, prompt_of, write_plain  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "stored"


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    GOLDEN.mkdir(exist_ok=True)
    for form in sys.argv[1:] or MODELS:
        np.savez_compressed(GOLDEN / f"{form}.npz", logits=logits_of(form))
    for file in GOLDEN.glob("*.npz"):
        if file.stem not in MODELS:
            file.unlink()


def logits_of(form: str) -> np.ndarray:
    """The logits (S, V) of the plain model; raises SystemExit if two tokens are close."""
    with tempfile.TemporaryDirectory() as directory:
        logits_SV, _ = forward(load(str(write_plain(form, Path(directory)))), prompt_of(form))
    second, first = np.sort(logits_SV[-1])[-2:]
    margin = (first - second) / logits_SV.std()
    print(f"{form}: margin {margin:.4f} of the logits' standard deviation")
    if margin < LEAST_MARGIN:
        raise SystemExit(f"{form}: two tokens are {margin:.1e} apart: take another seed")
    return logits_SV


if __name__ == "__main__":
    main()
