#!/usr/bin/env python3
"""mpishard and Hugging Face transformers side by side: the same model, process and threads.

    python scripts/compare_with_transformers.py MODEL [--threads 1 --batch 1 8 …]

Needs torch and transformers (the `dev` extra). In each round mpishard, transformers with eager
attention and transformers with sdpa attention take their turns, so that a slow moment of the
machine meets all of them; for every figure transformers' faster attention counts. All compute in
float32, ask the head for the last token's logits only, choose greedily and keep a KV cache.
Beside the speeds stands the largest difference of the prompts' last logits.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, sleep

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PARSER = argparse.ArgumentParser(description="mpishard and transformers side by side.")
PARSER.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face directory")
PARSER.add_argument("--prompt-tokens", type=int, default=512, metavar="N")
PARSER.add_argument("--max-tokens", type=int, default=32, metavar="N")
PARSER.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="N")
PARSER.add_argument("--threads", type=int, default=1, metavar="N")
PARSER.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds, after a warm-up")
ARGS = PARSER.parse_args()

from mpishard.runtime import launch  # noqa: E402

os.environ["OPENBLAS_NUM_THREADS"] = str(ARGS.threads)
launch.start()  # what every rank does before it loads NumPy

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import mpishard  # noqa: E402
from mpishard.arithmetic.gemm import KERNELS  # noqa: E402
from mpishard.engine.sampling import SamplingRow, sample  # noqa: E402
from mpishard.engine.sampling_params import SamplingParams  # noqa: E402
from mpishard.sequences.step import pack  # noqa: E402

# Seconds in which the threads of the one that had its turn go to sleep.
PAUSE = 0.2
ATTENTIONS = ("eager", "sdpa")

# (B, S) new tokens -> ((B,) chosen tokens, (B, V) logits); remembers the sequences.
ScheduledChunk = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def main() -> None:
    torch.set_num_threads(ARGS.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    ours = mpishard.load(ARGS.model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(ARGS.model, dtype=torch.float32)
    theirs.eval()
    print(
        f"{ARGS.model}: float32, {ARGS.threads} threads each, best of {ARGS.repeat} rounds "
        f"(median in brackets); NumPy {np.__version__}, "
        f"OpenBLAS for {KERNELS}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    print(f"{'tokens/s':14}{'batch':>6}{'mpishard':>16}{'transformers':>16}{'':7}{'ratio':>14}")
    for batch in ARGS.batch:
        compare(ours, theirs, batch)


def compare(ours: mpishard.Model, theirs: transformers.PreTrainedModel, batch: int) -> None:
    """Print the lines of one batch size."""
    ids_BS = np.random.default_rng(0).integers(ours.config.vocab, size=(batch, ARGS.prompt_tokens))
    contestants: dict[str, Callable[[], ScheduledChunk]] = {
        "mpishard": partial(feed_mpishard, ours, batch)
    }
    for attention in ATTENTIONS:
        contestants[attention] = partial(feed_transformers, theirs, attention)
    times: dict[tuple[str, str], list[float]] = {}
    logits: dict[str, np.ndarray] = {}
    for number in range(ARGS.repeat + 1):
        for name, make in contestants.items():
            prompt, generation, logits[name] = run(make(), ids_BS)
            if number:  # the first is to warm up
                times.setdefault(("prompt", name), []).append(prompt)
                times.setdefault(("generation", name), []).append(generation)
            sleep(PAUSE)
    for phase, tokens in (("prompt", batch * ARGS.prompt_tokens), ("generation", batch)):
        print_line(phase, batch, tokens, {name: times[phase, name] for name in contestants})
    difference = np.abs(logits["mpishard"] - logits["eager"]).max() / logits["eager"].std()
    print(f"largest difference of logits: {difference:.1e} of their standard deviation")


def run(feed: ScheduledChunk, ids_BS: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Seconds of the prompt and of one generation step, and the logits after the prompt."""
    started = perf_counter()
    ids_B, logits_BV = feed(ids_BS)
    prompt = perf_counter() - started
    started = perf_counter()
    for _ in range(ARGS.max_tokens):
        ids_B, _ = feed(ids_B[:, np.newaxis])
    return prompt, (perf_counter() - started) / ARGS.max_tokens, logits_BV


def feed_mpishard(model: mpishard.Model, batch: int) -> ScheduledChunk:
    decoder = model.decoder
    caches = [decoder.allocate_cache(ARGS.prompt_tokens + ARGS.max_tokens) for _ in range(batch)]

    def feed(ids_BS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits_BV = decoder.forward(pack(list(zip(ids_BS, caches, strict=True)), decoder.division))
        rows = [
            SamplingRow(SamplingParams(), place, cache.length) for place, cache in enumerate(caches)
        ]
        return np.array(sample(logits_BV, rows, decoder.config.vocab, decoder.mesh)), logits_BV

    return feed


def feed_transformers(model: transformers.PreTrainedModel, attention: str) -> ScheduledChunk:
    model.set_attn_implementation(attention)
    cache = transformers.DynamicCache(config=model.config)

    @torch.inference_mode()
    def feed(ids_BS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        output = model(
            torch.from_numpy(ids_BS), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        logits_BV = output.logits[:, -1]
        return logits_BV.argmax(dim=-1).numpy(), logits_BV.numpy()

    return feed


def print_line(phase: str, batch: int, tokens: int, seconds: dict[str, list[float]]) -> None:
    """One line of the table: `tokens` a step by the best and the median of each one's seconds."""
    faster = min(ATTENTIONS, key=lambda name: min(seconds[name]))
    mine, theirs = seconds["mpishard"], seconds[faster]
    figures = [
        f"{tokens / min(times):.1f} ({tokens / median(times):.1f})" for times in (mine, theirs)
    ]
    ratio = f"{min(theirs) / min(mine):.2f} ({median(theirs) / median(mine):.2f})"
    length = ARGS.prompt_tokens if phase == "prompt" else ARGS.max_tokens
    print(
        f"{f'{phase} {length}':14}{batch:6}{figures[0]:>16}{figures[1]:>16} {faster:6}{ratio:>14}",
        flush=True,
    )


if __name__ == "__main__":
    main()
