#!/usr/bin/env python3
"""Change the package in small ways, drawn at random, and show which tests notice.

    python tests/fuzz/mutate.py --count 30 --seed 11
    python tests/fuzz/mutate.py --count 30 --seed 11 --only 4 17 --stages np3 np4

Each mutant is the package with one change in `mpishard/parallel`, `mpishard/arithmetic` or
`mpishard/engine`: an operator, a constant, a condition, a statement left out, two arguments that
change places. The kind of the change is drawn first, so that rare kinds come as often as common
ones. Mutants are made in a temporary copy, never in place; number 0 is the package unchanged, which
the tests must pass. Whether a survivor behaves as the original does is for the reader to judge.
Ends with status 1 if a mutant survives.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).resolve().parents[2]
FLOORS = ("parallel", "arithmetic", "engine")

SERIAL = {
    "parallel": ("combine", "routing_file", "expert_placement"),
    "arithmetic": (
        *("routing", "combine", "balancing", "choice", "packed", "reference", "attention"),
        *("products", "erf", "delta_rule"),
    ),
    "engine": ("scheduler", "prefix_cache", "choice"),
}
RANKS = {
    "parallel": (
        *("sublayers", "experts", "capacity", "expert_load", "routing_replay", "linear_attention"),
        *("model", "schedule", "sampling", "limits", "replicas"),
    ),
    "arithmetic": ("sublayers", "experts", "capacity", "sampling", "model", "schedule", "limits"),
    "engine": ("sampling", "logits_processing", "limits", "schedule", "api", "model"),
}

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In},
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv},
}
EXTREMES = ("min", "max", "argmin", "argmax", "minimum", "maximum", "any", "all")
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")


class Mutation(NamedTuple):
    """The bytes from `start` to `stop` of `file` become `text`."""

    kind: str
    file: Path
    start: int
    stop: int
    text: str


def mutations(file: Path) -> Iterator[Mutation]:
    """All changes that one file allows."""
    source = (CHECKOUT / file).read_bytes()
    line_starts = [0]
    for line in source.splitlines(keepends=True):
        line_starts.append(line_starts[-1] + len(line))
    for node in _code(ast.parse(source)):
        for kind, old, text in _changes(node):
            assert isinstance(old, ast.expr | ast.stmt)
            assert old.end_lineno is not None and old.end_col_offset is not None
            start = line_starts[old.lineno - 1] + old.col_offset
            stop = line_starts[old.end_lineno - 1] + old.end_col_offset
            yield Mutation(kind, file, start, stop, text)


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below `node` that compute something: no texts, error messages or annotations."""
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if name in ("annotation", "returns") or not isinstance(child, ast.AST):
                continue
            if not isinstance(child, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom):
                yield child
                yield from _code(child)


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.AST, str]]:
    """What can be done to a node: (kind, what is replaced, by which text)."""
    unparse = ast.unparse
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        swapped = ast.Compare(node.left, [COMPARISONS[type(node.ops[0])]()], node.comparators)
        yield "comparison", node, f"({unparse(swapped)})"
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        swapped_op = ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
        yield "operator", node, f"({unparse(swapped_op)})"
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield "constant", node, str(node.value + 1)
        if node.value > 0:
            yield "constant", node, str(node.value - 1)
    if isinstance(node, ast.If | ast.IfExp):
        yield "condition", node.test, f"(not ({unparse(node.test)}))"
    if isinstance(node, ast.comprehension):
        for test in node.ifs:
            yield "condition", test, f"(not ({unparse(test)}))"
    if isinstance(node, ast.AugAssign) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield "statement", node, "pass"
    if isinstance(node, ast.Call):
        yield from _changed_calls(node)
    if isinstance(node, ast.For | ast.comprehension):
        yield "loop", node.iter, f"reversed(list({unparse(node.iter)}))"
    if isinstance(node, ast.arguments):
        for default in filter(None, [*node.defaults, *node.kw_defaults]):
            yield from _changed_default(default)
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        yield from _changed_default(node.value)


def _changed_calls(node: ast.Call) -> Iterator[tuple[str, ast.AST, str]]:
    called = ast.unparse(node.func)
    before, _, name = called.rpartition(".")
    args = node.args
    for i in range(len(args) - 1):
        pair = args[i : i + 2]
        texts = [ast.unparse(one) for one in pair]
        if texts[0] != texts[1] and not any(isinstance(one, ast.Starred) for one in pair):
            swapped = ast.Call(node.func, [*args[:i], *pair[::-1], *args[i + 2 :]], node.keywords)
            yield "arguments", node, ast.unparse(swapped)
    if name in EXTREMES:
        other = EXTREMES[EXTREMES.index(name) ^ 1]
        yield "extreme", node.func, f"{before}.{other}" if before else other
    if name in COLLECTIVES and args:
        yield "collective", node, f"({ast.unparse(args[0])})"


def _changed_default(node: ast.expr) -> Iterator[tuple[str, ast.AST, str]]:
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "default", node, str(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "default", node, str(node.value * 2 + 1)


def draw(count: int, seed: int) -> list[Mutation]:
    """So many different changes: of a random kind each, then of a random place."""
    by_kind: dict[str, list[Mutation]] = {}
    for floor in FLOORS:
        for path in sorted((CHECKOUT / "mpishard" / floor).glob("*.py")):
            for mutation in mutations(path.relative_to(CHECKOUT)):
                by_kind.setdefault(mutation.kind, []).append(mutation)
    chance, drawn = random.Random(seed), list[Mutation]()
    while len(drawn) < count and (kinds := sorted(kind for kind in by_kind if by_kind[kind])):
        candidates = by_kind[chance.choice(kinds)]
        drawn.append(candidates.pop(chance.randrange(len(candidates))))
    return drawn


def mutated(mutation: Mutation) -> bytes:
    source = (CHECKOUT / mutation.file).read_bytes()
    return source[: mutation.start] + mutation.text.encode() + source[mutation.stop :]


def describe(mutation: Mutation) -> str:
    """File, line, what stood there and what stands there now."""
    source = (CHECKOUT / mutation.file).read_bytes()
    line = source.count(b"\n", 0, mutation.start) + 1
    first = source.rfind(b"\n", 0, mutation.start) + 1
    last = source.find(b"\n", mutation.stop)
    before = source[first:last].decode().rstrip()
    after = (source[first : mutation.start] + mutation.text.encode()).decode()
    after += source[mutation.stop : last].decode().rstrip()
    minus = "".join(f"\n    - {text}" for text in before.split("\n"))
    plus = "".join(f"\n    + {text}" for text in after.split("\n"))
    return f"{mutation.kind}, {mutation.file}:{line}{minus}{plus}"


def commands(floors: tuple[str, ...], stages: list[str]) -> Iterator[tuple[str, list[str]]]:
    """The tests of each stage, as arguments of pytest."""
    for stage in stages:
        folder, tests = ("serial", SERIAL) if stage == "serial" else ("parallel", RANKS)
        names = dict.fromkeys(name for floor in floors for name in tests[floor])
        files = [f"tests/{folder}/test_{name}.py" for name in names]
        yield stage, files if stage == "serial" else ["-k", stage, *files]


def verdict(copy: Path, arguments: list[str], limit: float) -> str | None:
    """What went wrong in these tests, run in `copy`; None if nothing did."""
    options = ["-q", "-x", "--tb=line", "-p", "no:cacheprovider"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *arguments],
        cwd=copy,
        # A bytecode file of the same second and size would hide the next mutant.
        env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as stopped:
        process.terminate()  # the runner of the tests then ends the ranks that it started
        try:
            process.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        if isinstance(stopped, KeyboardInterrupt):
            raise
        return f"timed out after {limit:g} s"
    if process.returncode == 0:
        return None
    found = re.search(r"^(FAILED|ERROR) (?:tests/)?(.*)$", output, re.MULTILINE)
    if found is None:
        sys.exit(f"pytest ended with status {process.returncode}:\n{output[-2000:]}")
    return f"killed by {found[2]}"[:150]


def main() -> int:
    """Draw mutants, try each, and count those that survive."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--count", type=int, default=30, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="these of the mutants")
    parser.add_argument("--list", action="store_true", help="show the mutants, run nothing")
    parser.add_argument(
        "--stages",
        nargs="+",
        default=["serial", "np2"],
        metavar="STAGE",
        help="'serial', 'np2', 'np3', …: which tests, in this order (default: serial np2)",
    )
    parser.add_argument("--limit", type=float, default=300, metavar="S", help="of one stage")
    args = parser.parse_args()
    drawn = draw(args.count, args.seed)
    survivors = []
    with tempfile.TemporaryDirectory(prefix="mutate-") as directory:
        copy = Path(directory) / "checkout"
        ignored = shutil.ignore_patterns(".*", "__pycache__")
        shutil.copytree(CHECKOUT, copy, ignore=ignored)
        for number in args.only or range(1, len(drawn) + 1):
            mutation = drawn[number - 1] if number else None
            print(number, describe(mutation) if mutation else "unchanged", flush=True)
            if args.list:
                continue
            if mutation:
                (copy / mutation.file).write_bytes(mutated(mutation))
            floors = (mutation.file.parts[1],) if mutation else FLOORS
            started, told = time.monotonic(), None
            for stage, arguments in commands(floors, args.stages):
                told = verdict(copy, arguments, args.limit)
                if told:
                    told = f"{stage}: {told}"
                    break
            print(f"    {told or 'SURVIVED'} ({time.monotonic() - started:.0f} s)", flush=True)
            if mutation:
                shutil.copy(CHECKOUT / mutation.file, copy / mutation.file)
                if not told:
                    survivors.append(number)
    if not args.list:
        print(f"survivors: {survivors or 'none'}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
