"""The import rules, held over the syntax tree: who may know whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent

ROOMS = {
    "collective": set[str](),
    "scheduling": set[str](),
    "actors": {"collective", "scheduling"},
}
"""Each room, and the rooms that it may import."""

LAYERS = {
    "collective": [
        {"types", "errors"},
        {"abc"},
        {"_by_value", "_integers", "_cuts", "_grids", "_boxes", "_rings", "_tallies", "_relays", "_reductions"}
        | {"_pairs", "_moving", "_summing", "_routes", "_plots", "layouts", "planning"},
        # Public, and below the private folders.
        {"tensors", "_array_pickling", "_arrow_pickling", "_torch_pickling", "_gate", "reductions", "work", "scopes"}
        | {"freight"},
        {"_core", "_backends", "_links", "_rows", "_store"},
    ],
    "scheduling": [{"types", "errors"}, {"abc"}],
    "actors": [{"errors"}, {"abc"}],
}
"""From the bottom up, by the name after the room's; what is not listed is on top.

A module imports its own layer and those below it, type checking aside.
"""

LIBRARIES = {
    "ray": ("*/_ray*.py",),
    "torch": ("collective/_backends/*.py", "collective/tensors.py", "collective/_torch*.py", "collective/testing/*.py"),
    "cupy": ("collective/_backends/*.py", "collective/tensors.py"),
    "pyarrow": ("collective/_rows/arrow_types.py", "collective/_arrow_pickling.py"),
}
"""Each library that is kept at the edge, and the modules that are its edge."""

CHOOSERS = {
    "collective/_backends/__init__.py": (
        "collective._backends.gloo",
        "collective._backends.memory",
        "collective._backends.shm",
        "collective._backends.two_level",
    ),
    "collective/_links/kinds.py": ("collective._links.memory", "collective._links.shm", "collective._links.sockets"),
    "actors/_runtimes/__init__.py": ("actors._runtimes._ray", "actors._runtimes.inproc"),
}
"""The one module that chooses among implementations by name, and those that nobody else mentions."""


@dataclass(frozen=True)
class Import:
    where: str
    name: str
    typing_only: bool


def modules(room: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / room).rglob("*.py"))


def imports(path: Path, source: str | None = None) -> list[Import]:
    """Return what a module imports, anywhere in it, as full dotted names."""
    tree = ast.parse((ROOT / path).read_text() if source is None else source)
    package = path.parent.parts
    return [
        Import(f"{path}:{node.lineno}", name, typing_only)
        for node, typing_only in walk(tree, False)
        for name in imported(node, package)
    ]


def walk(node: ast.AST, typing_only: bool) -> Iterator[tuple[ast.AST, bool]]:
    yield node, typing_only
    for child in ast.iter_child_nodes(node):
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and child in node.body
        yield from walk(child, typing_only or guarded)


def imported(node: ast.AST, package: tuple[str, ...]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = [*package[: len(package) + 1 - node.level]] if node.level else []
        base += [node.module] if node.module else []
        return [".".join([*base, alias.name]) for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
        return [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
    return []


def layer(room: str, dotted: str) -> int:
    """Return the layer of a module of a room, or of a name in one; the room's `__init__` is on top."""
    first = dotted.split(".")[1] if "." in dotted else ""
    return next((number for number, names in enumerate(LAYERS[room]) if first in names), len(LAYERS[room]))


def dotted(path: Path) -> str:
    return ".".join(path.with_suffix("").parts)


def wrong_rooms(path: Path, found: list[Import]) -> list[Import]:
    room = path.parts[0]
    others = (set(ROOMS) | {"tests", "examples", "benchmarks"}) - ROOMS[room] - {room}
    return [each for each in found if each.name.split(".")[0] in others]


def wrong_layers(path: Path, found: list[Import]) -> list[Import]:
    room = path.parts[0]
    own = layer(room, dotted(path))
    within = [each for each in found if not each.typing_only and each.name.split(".")[0] == room]
    return [each for each in within if layer(room, each.name) > own]


def wrong_choosers(path: Path, found: list[Import]) -> list[Import]:
    kept = {module for chooser, modules in CHOOSERS.items() if path != Path(chooser) for module in modules}
    return [each for each in found if each.name in kept or each.name.rpartition(".")[0] in kept]


def wrong_libraries(path: Path, found: list[Import]) -> list[Import]:
    kept = {library for library, edge in LIBRARIES.items() if not any(path.match(pattern) for pattern in edge)}
    return [each for each in found if not each.typing_only and each.name.split(".")[0] in kept]


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("rule", [wrong_rooms, wrong_layers, wrong_choosers, wrong_libraries])
def test_rule(rule, room):
    assert modules(room)
    assert [each for path in modules(room) for each in rule(path, imports(path))] == []


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (wrong_rooms, "collective/group.py", "import actors"),
        (wrong_rooms, "collective/group.py", "if TYPE_CHECKING:\n    from scheduling.types import Resources"),
        (wrong_rooms, "scheduling/feasibility.py", "def f():\n    from collective import Group"),
        (wrong_rooms, "actors/gang.py", "from tests import helpers"),
        (wrong_layers, "collective/types.py", "from collective.abc import Link"),
        (wrong_layers, "collective/abc.py", "from ._links import mux"),
        (wrong_layers, "collective/_links/mux.py", "from collective.links import open_endpoint"),
        (wrong_layers, "collective/_links/mux.py", "from collective import Group"),
        (wrong_layers, "collective/_links/mux.py", "from ..group import Group"),
        (wrong_choosers, "actors/gang.py", "from actors._runtimes import _ray"),
        (wrong_choosers, "actors/gang.py", "def f():\n    from actors._runtimes.inproc import InprocRuntime"),
        (wrong_libraries, "actors/gang.py", "def f():\n    import ray.util"),
        (wrong_libraries, "collective/group.py", "from torch import Tensor"),
        (wrong_libraries, "collective/_rows/formats.py", "def f():\n    import pyarrow.ipc"),
        (wrong_libraries, "collective/group.py", "import importlib\nimportlib.import_module('cupy')"),
    ],
)
def test_a_violation_is_found(rule, path, source):
    assert len(rule(Path(path), imports(Path(path), source))) == 1


@pytest.mark.parametrize("room", ROOMS)
def test_every_layer_is_there(room):
    there = {path.relative_to(room).with_suffix("").parts[0] for path in modules(room)}
    assert set().union(*LAYERS[room]) - there == set()


def test_every_implementation_that_is_chosen_is_there():
    chosen = {
        each.name.rpartition(".")[0] if each.name.rpartition(".")[2][0].isupper() else each.name
        for chooser in CHOOSERS
        for each in imports(Path(chooser))
    }
    assert {module for modules in CHOOSERS.values() for module in modules} <= chosen


@pytest.mark.parametrize("room", ROOMS)
def test_importing_a_room_imports_no_heavy_library(room):
    # Importing torch takes seconds, and every actor process imports these.
    program = f"import sys, {room}; print(*sorted({set(LIBRARIES)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
