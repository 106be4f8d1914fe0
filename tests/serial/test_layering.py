"""The floors of the package: what each module may import, and what it must leave to others."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from mpi_runner import run_mpi

PACKAGE = Path(__file__).parents[2] / "mpishard"

# Lowest first. A floor has one or more parts, a module or a folder of modules; a part may import
# from itself and from lower floors, not from its neighbours.
FLOORS = (
    ("errors",),
    ("arithmetic", "config"),
    ("sequences", "storage", "communication", "reference"),
    ("parallel",),
    ("layers", "rope"),
    ("model",),
    ("engine",),
)
SURFACE = (
    *("api", "batch", "bench", "cli", "commands", "layout_resolution", "options", "runtime"),
    *("completions", "prompts", "scoring", "tokenizer"),
    "__main__",
)

# The packages of others that a part knows. The surface may know all.
KNOWS: dict[str, set[str]] = {
    "errors": set(),
    "arithmetic": {"numpy", "threadpoolctl"},
    "config": set(),
    "sequences": {"numpy"},
    "storage": {"numpy", "h5py", "safetensors", "ml_dtypes"},
    "communication": {"numpy", "mpi4py"},
    "reference": {"numpy"},
    "parallel": {"numpy"},
    "layers": {"numpy"},
    "rope": {"numpy"},
    "model": {"numpy"},
    "engine": {"numpy"},
}

EDGE = {"mpishard.cli", "mpishard.runtime.launch", "mpishard.__main__"}
# These set the number of threads, which NumPy reads when it is imported, or put that off.
IMPORT_LATE = EDGE | {"mpishard"}
# These take a tenth of the time that a rank needs to start, and most commands do without.
SELDOM_NEEDED = {"tqdm", "mpishard.tokenizer.chat_template"}

PICKLING = set(
    "bcast gather scatter allgather alltoall reduce allreduce scan exscan "
    "send recv isend irecv bsend ssend issend sendrecv".split()
)


def read_package() -> dict[str, ast.Module]:
    """The syntax tree of every module, under its dotted name."""
    trees = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        trees[name] = ast.parse(file.read_text(), str(file))
    return trees


TREES = read_package()
MODULES = sorted(name for name in TREES if name != "mpishard")


def part_of(module: str) -> str:
    """The part that `module` belongs to; all of the surface is one."""
    part = module.split(".")[1]
    return "surface" if part in SURFACE else part


def floor_of(part: str) -> int:
    """The height of `part`, the surface above all others."""
    if part == "surface":
        return len(FLOORS)
    return next(height for height, parts in enumerate(FLOORS) if part in parts)


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules that are imported anywhere in `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in TREES else node.module


def own_imports(module: str) -> set[str]:
    """The modules of the package, other than its root, that `module` imports."""
    return {name for name in imported(TREES[module]) if name.startswith("mpishard.")}


def test_every_module_belongs_to_a_floor():
    parts = {"surface", *KNOWS}
    assert {part for floor in FLOORS for part in floor} == set(KNOWS)
    assert [module for module in MODULES if part_of(module) not in parts] == []


def test_imports_go_down():
    upward = [
        f"{module} imports {name}"
        for module in MODULES
        for name in own_imports(module)
        if part_of(name) != part_of(module) and floor_of(part_of(name)) >= floor_of(part_of(module))
    ]
    assert upward == []


def test_there_are_no_cycles():
    graph = {module: own_imports(module) for module in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_packages_of_others_are_known_where_they_belong():
    strange = [
        f"{module} imports {name}"
        for module in MODULES
        if part_of(module) != "surface"
        for name in {name.split(".")[0] for name in imported(TREES[module])}
        if name not in sys.stdlib_module_names | KNOWS[part_of(module)] | {"mpishard"}
    ]
    assert strange == []


def test_the_oracle_is_independent():
    allowed = ("mpishard.config", "mpishard.errors")
    assert all(name.startswith(allowed) for name in own_imports("mpishard.reference"))


def test_imports_stand_at_the_top():
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    late = [
        f"{module}, {node.name}"
        for module in sorted(TREES.keys() - IMPORT_LATE)
        for node in ast.walk(TREES[module])
        if isinstance(node, functions) and set(imported(node)) - SELDOM_NEEDED
    ]
    assert late == []


def test_what_is_seldom_needed_is_not_loaded_at_the_start():
    seldom = SELDOM_NEEDED | {"jinja2"}
    script = f"import sys, mpishard.commands; sys.exit(not {seldom}.isdisjoint(sys.modules))"
    assert run_mpi(None, ["-c", script]).returncode == 0


def test_the_world_is_named_at_the_edge_only():
    naming = [
        f"{module}, line {node.lineno}"
        for module in sorted(TREES.keys() - EDGE)
        for node in ast.walk(TREES[module])
        if isinstance(node, (ast.Attribute, ast.Name, ast.alias)) and "COMM_WORLD" in name_of(node)
    ]
    assert naming == []


def name_of(node: ast.Attribute | ast.Name | ast.alias) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else node.name


def test_below_the_surface_data_goes_through_buffers():
    """``comm.Allreduce``, never ``comm.allreduce``, which pickles."""
    pickling = [
        f"{module}, line {node.lineno}"
        for module in MODULES
        if part_of(module) != "surface"
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in PICKLING
    ]
    assert pickling == []


@pytest.mark.parametrize("module", ["mpishard", "mpishard.cli"])
def test_numpy_is_not_loaded_before_the_threads_are_set(module):
    script = f"import sys, {module}; sys.exit('numpy' in sys.modules)"
    assert run_mpi(None, ["-c", script]).returncode == 0
