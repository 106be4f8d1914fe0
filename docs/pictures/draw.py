#!/usr/bin/env python3
"""Draw the pictures of the documentation from the package's own functions, beside this file.

python docs/pictures/draw.py
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]  # the package of this checkout

from attention import flash_decoding, zigzag_ring  # noqa: E402
from experts import expert_dispatch  # noqa: E402
from floors_of_package import floors  # noqa: E402
from memory import memory_vs_context  # noqa: E402
from weights import rank_grid, tensor_vs_sequence  # noqa: E402

PICTURES = (
    *(tensor_vs_sequence, rank_grid, zigzag_ring, flash_decoding),
    *(expert_dispatch, memory_vs_context, floors),
)


def pictures() -> dict[str, str]:
    """The content of every picture, by the name of its file."""
    return {f"{draw.__name__.replace('_', '-')}.svg": str(draw()) for draw in PICTURES}


if __name__ == "__main__":
    for name, content in pictures().items():
        (HERE / name).write_text(content, encoding="utf-8")
