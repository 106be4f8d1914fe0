#!/usr/bin/env python3
"""Whether two checkouts compute the same bits: logits, hidden states and generated tokens.

    python scripts/dev/same_bits.py OLD [NEW] [--models M …] [--layouts L …] [--cache DIR]
    python scripts/dev/same_bits.py OLD [NEW] --speed [--rounds 7]

Both checkouts run the same commands on models of every kind in many layouts, in one MPI job for
each layout. One line for each model and layout says `same` or what differs first; the exit status
is 1 if anything does. What OLD computed is kept in the cache while its code stays as it is.

With --speed it runs the bench command of both in turn instead, and prints how many times as fast as
OLD each phase of NEW is: the median of the rounds, their range, and the best round of NEW by the
best of OLD, which is what remains where others use the machine.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
DATA_MODELS = ("cpython-4m", "cpython-moe-7m")
# Of tests/tiny_models.py: one of every kind of attention, norm, rope and mixture.
TINY_MODELS = (
    "llama-mqa", "llama-dynamic-old", "qwen2-yarn-new", "qwen3-llama3-new", "mistral-window",
    "mixtral-window", "qwen2_moe-shared", "olmoe-plain", "gpt_oss-yarn", "deepseek_v3-groups",
)  # fmt: skip
MODELS = DATA_MODELS + TINY_MODELS
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # fields of their number

# Ranks and flags by name. The flags are those that every version understands.
LAYOUTS = {
    "serial": (1, ""),
    "tp2": (2, "--tp 2"),
    "tp3": (3, "--tp 3"),
    "tp4-sp": (4, "--tp 4 --sequence-parallel"),
    "tp4-fd": (4, "--tp 4 --flash-decoding"),
    "cp2": (2, "--cp 2"),
    "tp2-cp2-gather": (4, "--tp 2 --cp 2 --cp-prefill all-gather --cp-order contiguous"),
    "tp2-cp2-fd": (4, "--tp 2 --cp 2 --flash-decoding --decode-merge all-to-all"),
    "tp2-dp2": (4, "--tp 2 --dp 2"),
}
DENSE_LAYOUTS = {
    "tp2-cp2-sp": (4, "--tp 2 --cp 2 --sequence-parallel --decode-merge all-reduce"),
}
MIXTURE_LAYOUTS = {
    "tp2-ep2": (2, "--tp 2 --ep 2"),
    "tp2-cp2-ep2-gather": (4, "--tp 2 --cp 2 --ep 2 --expert-dispatch gather"),
    "tp2-dp2-ep4": (4, "--tp 2 --dp 2 --ep 4 --sequence-parallel"),
    "dp4-ep4-gather": (4, "--dp 4 --ep 4 --expert-dispatch gather"),
}
EVERY_LAYOUT = LAYOUTS | DENSE_LAYOUTS | MIXTURE_LAYOUTS

PROMPTS = ("the rope", "in a def (", "s", "not the end of it:\n  in")

# Lengths of the sequences to score: at once, by so many tokens a step, and by one, as decode does.
LONG = {"lengths": (300, 150, 33, 7, 1), "chunk": 64, "steps": (17, 5)}
SHORT = {"lengths": (50, 21, 11, 3), "chunk": 17, "steps": (13, 6)}
SHORTEST = {"lengths": (21, 17, 11, 3), "chunk": 7, "steps": (13, 6)}
ENOUGH_POSITIONS = 64  # for SHORT
NEW_TOKENS = 6

JOB_SECONDS = 600


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Whether two checkouts compute the same bits.")
    parser.add_argument("old", type=Path, metavar="OLD", help="a checkout")
    parser.add_argument("new", type=Path, nargs="?", default=ROOT, metavar="NEW")
    parser.add_argument(
        "--models", nargs="+", default=MODELS, metavar="M", help="also others of the tiny ones"
    )
    parser.add_argument(
        "--layouts", nargs="+", choices=EVERY_LAYOUT, default=EVERY_LAYOUT, metavar="L"
    )
    parser.add_argument("--cache", type=Path, default=None, metavar="DIR")
    parser.add_argument("--list", action="store_true", help="print the models and layouts")
    parser.add_argument("--speed", action="store_true", help="compare speeds instead")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="of --speed")
    args = parser.parse_args()
    args.old, args.new = args.old.resolve(), args.new.resolve()
    return args


def main() -> int:
    args = parse()
    if args.list:
        print("models:", *MODELS)
        for name, (ranks, flags) in EVERY_LAYOUT.items():
            print(f"{name}: {ranks} ranks {flags}")
        return 0
    if args.speed:
        compare_speeds(args)
        return 0
    with tempfile.TemporaryDirectory() as directory:
        cache = args.cache or Path(directory)
        return compare(args, cache, Path(directory))


def compare(args: argparse.Namespace, cache: Path, scratch: Path) -> int:
    """Print a line for each model and layout; 1 if any differs."""
    models = cache / "models"
    write_models(args.old, models, args.models)
    fingerprint = fingerprint_of(args.old)
    differing = total = 0
    for name in args.layouts:
        suited = [model for model in args.models if suits(models / model, name)]
        kept = cache / f"{name}-{fingerprint}.json"
        old = json.loads(kept.read_text()) if kept.exists() else {}
        if missing := [model for model in suited if model not in old]:
            old |= run_layout(args.old, name, missing, models, scratch / "old" / name)
            kept.write_text(json.dumps(old))
        new = run_layout(args.new, name, suited, models, scratch / "new" / name)
        for model in suited:
            found = difference(old[model], new[model])
            differing += bool(found)
            total += 1
            print(f"{model:18} {name:18} {found or 'same'}", flush=True)
    print(f"{total - differing} of {total} are the same" if differing else f"all {total} same")
    return 1 if differing else 0


def suits(model: Path, layout: str) -> bool:
    """Whether a model has what `layout` divides."""
    config = json.loads((model / "config.json").read_text())
    _, flags = EVERY_LAYOUT[layout]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    if "--flash-decoding" in flags and int(flags.split()[1]) <= kv_heads:
        return False
    return layout not in (DENSE_LAYOUTS if any(f in config for f in EXPERTS) else MIXTURE_LAYOUTS)


def write_models(checkout: Path, models: Path, chosen: Sequence[str]) -> None:
    """Write the chosen models, or links to them, and the sequences to score below `models`."""
    models.mkdir(parents=True, exist_ok=True)
    missing = [model for model in chosen if not (models / model).exists()]
    for model in missing:
        if model in DATA_MODELS:
            (models / model).symlink_to(checkout / "data" / model)
    tiny = [model for model in missing if model not in DATA_MODELS]
    code = "import sys, tiny_text\nfor n in sys.argv[2:]: tiny_text.write_speaker(n, sys.argv[1]+n)"
    if tiny:
        subprocess.run(
            [sys.executable, "-c", code, f"{models}/", *tiny],
            env=environment(checkout, checkout / "tests"),
            check=True,
        )
    for model in chosen:
        vocab = json.loads((models / model / "config.json").read_text())["vocab_size"]
        random = np.random.RandomState(1)
        for kind in ("lengths", "steps"):
            with open(models / f"{model}.{kind}.jsonl", "w") as file:
                for place, length in enumerate(sizes_of(models / model)[kind]):
                    ids = random.randint(3, vocab, length).tolist()
                    file.write(json.dumps({"id": f"s{place}", "input_ids": ids}) + "\n")


def sizes_of(model: Path) -> dict[str, Any]:
    config = json.loads((model / "config.json").read_text())
    if model.name in DATA_MODELS:
        return LONG
    return SHORT if config["max_position_embeddings"] >= ENOUGH_POSITIONS else SHORTEST


def fingerprint_of(checkout: Path) -> str:
    """A digest of what is run and of the code of a checkout."""
    run = (EVERY_LAYOUT, PROMPTS, LONG, SHORT, SHORTEST, NEW_TOKENS, inspect.getsource(commands))
    digest = hashlib.sha256(repr(run).encode())
    for file in sorted((checkout / "mpishard").rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def commands(model: str, flags: list[str], models: Path, out: Path) -> dict[str, list[str]]:
    """The command lines to run on `model`, by name."""
    directory, sizes = str(models / model), sizes_of(models / model)
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    most = ["--max-tokens", str(NEW_TOKENS), "--ignore-eos"]

    def logits(name: str, kind: str, *more: str) -> list[str]:
        source, target = models / f"{model}.{kind}.jsonl", out / f"{model}.{name}.npz"
        return ["logits", directory, "--input", f"{source}", "--output", f"{target}", *more, *flags]

    answers = out / f"{model}.batch.jsonl"
    return {
        "prefill": logits("prefill", "lengths", "--hidden-states"),
        "chunks": logits("chunks", "lengths", "--prefill-chunk", str(sizes["chunk"])),
        "steps": logits("steps", "steps", "--prefill-chunk", "1"),
        "float64": logits("float64", "lengths", "--compute-dtype", "float64"),
        "greedy": ["generate", directory, "--json", *prompts, *most, *flags],
        "sampled": ["generate", directory, "--json", *prompts, *most, "--temperature", "1", *flags],
        "batch": [
            *("batch", directory, "--input", f"{models / f'{model}.lengths.jsonl'}"),
            *("--output", f"{answers}", *most, "--max-batch-tokens", str(sizes["chunk"]), *flags),
        ],
    }


def run_layout(
    checkout: Path, layout: str, chosen: list[str], models: Path, out: Path
) -> dict[str, dict[str, Any]]:
    """What a checkout computes with each of the models in a layout, by the name of the command: a
    digest of every row of every array, or of every answer, or the message of a failure."""
    ranks, flags = EVERY_LAYOUT[layout]
    out.mkdir(parents=True)
    jobs = {model: commands(model, flags.split(), models, out) for model in chosen}
    lines = [(f"{model}.{name}", line) for model in chosen for name, line in jobs[model].items()]
    (out / "jobs.json").write_text(json.dumps(lines))
    line = launched(ranks, __file__, "--work", str(checkout), str(out))
    with open(out / "stderr", "w+") as stderr:
        try:
            subprocess.run(
                line, env=environment(checkout), stderr=stderr, timeout=JOB_SECONDS, check=True
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            stderr.seek(0)
            print(f"{checkout}, {layout}: {error}\n{stderr.read()}", file=sys.stderr)
    return {
        model: {name: result_of(out, f"{model}.{name}") for name in jobs[model]} for model in chosen
    }


def launched(ranks: int, *words: str) -> list[str]:
    """The command that starts Python on so many ranks."""
    mpirun = Path(sys.executable).with_name("mpirun")
    start = [str(mpirun if mpirun.exists() else "mpirun"), "-n", str(ranks)] if ranks > 1 else []
    return [*start, sys.executable, *words]


def environment(*paths: Path) -> dict[str, str]:
    """That of a process which imports from `paths`, with one thread a rank; ranks that wait let
    others of this machine compute."""
    settings = {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MPIR_CVAR_ENABLE_HEAVY_YIELD": "1",
    }
    return os.environ | settings


def work(checkout: Path, out: Path) -> None:
    """What each rank does: the commands of ``jobs.json`` one after the other, as typed."""
    import mpishard

    if not Path(mpishard.__file__ or "").is_relative_to(checkout):
        raise SystemExit(f"{mpishard.__file__} is not in {checkout}")
    rank = int(os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or 0)
    entry = str(Path(mpishard.__file__ or "").with_name("__main__.py"))
    stdout, stderr = sys.stdout, sys.stderr
    for name, line in json.loads((out / "jobs.json").read_text()):
        with (
            open(out / f"{name}.out{rank}", "w") as said,
            open(out / f"{name}.err{rank}", "w") as e,
        ):
            sys.argv, sys.stdout, sys.stderr = [entry, *line], said, e
            try:
                runpy.run_module("mpishard", run_name="__main__")
            except SystemExit as end:
                if rank == 0:
                    (out / f"{name}.status").write_text(str(end.code or 0))
            finally:
                sys.stdout, sys.stderr = stdout, stderr


def result_of(out: Path, name: str) -> dict[str, Any]:
    """What a command has computed, as `run_layout` says."""
    status = out / f"{name}.status"
    if not status.exists() or status.read_text() != "0":
        said = "".join(file.read_text() for file in sorted(out.glob(f"{name}.err*")))
        return {"failed": said.strip()[-500:] or "did not end"}
    array_file, answers = out / f"{name}.npz", out / f"{name}.jsonl"
    if array_file.exists():
        with np.load(array_file) as arrays:
            found = {array: digests(arrays[array]) for array in arrays.files}
        array_file.unlink()
    else:
        text = (answers if answers.exists() else out / f"{name}.out0").read_text()
        parsed = [json.loads(line) for line in text.splitlines()]
        for answer in parsed:
            if "error" in answer:
                return {"failed": str(answer["error"])}
        found = {str(a["id"]): [str([a["output_ids"], a["text"]])] for a in parsed}
    if not found:
        return {"failed": "nothing was written"}
    return found


def digests(array: np.ndarray) -> list[str]:
    """For each row of an array, of its type, shape and bits, and the largest value to read."""
    rows = np.ascontiguousarray(array)
    kind = f"{rows.dtype}{rows.shape[1:]}".encode()
    return [
        f"{hashlib.sha256(kind + row.tobytes()).hexdigest()[:16]} (most {row.max():.9g})"
        for row in rows
    ]


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first difference between the results of two checkouts, or nothing. What neither could
    do shows nothing, and so counts as one."""
    for command, before in old.items():
        after = new[command]
        for results, which in ((before, "OLD"), (after, "NEW")):
            if "failed" in results:
                return f"{command}: {which} failed: {results['failed']}"
        if before.keys() != after.keys():
            return f"{command}: {sorted(before.keys() ^ after.keys())} are not in both"
        for name, rows in before.items():
            if len(rows) != len(after[name]):
                return f"{command} {name}: {len(rows)} rows in OLD, {len(after[name])} in NEW"
            wrong = [i for i, (a, b) in enumerate(zip(rows, after[name], strict=True)) if a != b]
            if wrong:
                first = wrong[0]
                pair = f"{rows[first]} in OLD, {after[name][first]} in NEW"
                return f"{command} {name}: {len(wrong)} of {len(rows)} rows, {first} first: {pair}"
    return ""


def compare_speeds(args: argparse.Namespace) -> None:
    """Print, for 1 and 2 ranks, how many times as fast as OLD every phase of NEW is."""
    model = str(args.old / "data" / DATA_MODELS[0])
    for ranks in (1, 2):
        olds: list[dict[str, float]] = []
        news: list[dict[str, float]] = []
        for turn in range(args.rounds):
            order = [(args.old, olds), (args.new, news)]
            for checkout, found in order if turn % 2 == 0 else reversed(order):
                found.append(bench(checkout, ranks, model))
        for what in olds[0]:
            pairs = [(old[what], new[what]) for old, new in zip(olds, news, strict=True)]
            ratios = [new / old for old, new in pairs]
            best = max(new for _, new in pairs) / max(old for old, _ in pairs)
            print(
                f"{ranks} ranks, {what}: {median(ratios):.3f} ({min(ratios):.3f} to "
                f"{max(ratios):.3f}), best by best {best:.3f}",
                flush=True,
            )


def bench(checkout: Path, ranks: int, model: str) -> dict[str, float]:
    """Tokens a second of a checkout, by the phase and the number of sequences."""
    flags = ("--prompt-tokens", "512", "--max-tokens", "32", "--repeat", "1", "--json")
    line = launched(ranks, "-m", "mpishard", "bench", model, *flags, "--tp", str(ranks))
    done = subprocess.run(
        line, env=environment(checkout), cwd=checkout, capture_output=True, text=True, check=True
    )
    found = {}
    for speed in json.loads(done.stdout)["speeds"]:
        phase = "prefill" if speed["phase"] in ("prompt", "prefill") else "decode"
        found[f"{phase} of {speed['batch']}"] = speed["tokens_per_second"]
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(main())
