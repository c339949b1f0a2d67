"""The order of the rooms, import circles and the weight of an import, checked on the sources and in a fresh interpreter."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import emomerge
import emomerge.integrations
import emomerge.optim

PACKAGE = Path(emomerge.__file__).parent
FLOOR = {"controls", "errors", "extras", "files", "guard", "native", "notebook", "numerics", "progress", "results", "watch"}
ALLOWED = {
    "controls": {"errors"},
    "errors": set(),
    "extras": {"errors"},
    "files": {"errors"},
    "guard": {"errors", "native", "watch"},
    "native": {"errors"},
    "notebook": {"errors"},
    "numerics": {"errors"},
    "progress": {"errors"},
    "results": {"errors", "files"},
    "watch": {"errors"},
    "checkpoints": FLOOR,
    "adapters": FLOOR | {"checkpoints"},
    "optim": FLOOR,
    "recipe": FLOOR,
    "tasks": FLOOR | {"adapters", "checkpoints", "recipe"},
    "integrations": {"errors", "extras", "optim"},
    "training": FLOOR | {"adapters", "checkpoints", "optim", "recipe", "tasks"},
    "merging": FLOOR | {"adapters", "checkpoints", "recipe"},
    "probing": FLOOR | {"checkpoints", "recipe"},
    "reporting": FLOOR | {"checkpoints", "recipe"},
}
ALLOWED["experiment"] = {*ALLOWED} - {"integrations"}
ALLOWED["cli"] = {*ALLOWED} - {"integrations"}
ALLOWED["__main__"] = {"cli"}
"""Room, or module of the package's root → the rooms that it may import, at any depth."""
TABLES = {"emomerge.optim.table", "emomerge.tasks.table"}
"""Tables of names, without torch, that recipes are checked against."""


def imports(node: ast.AST) -> Iterator[str]:
    """The modules that a piece of source imports, also inside functions; not those for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative imports are not used here"
            for alias in child.names:
                yield f"{child.module}.{alias.name}" if f"{child.module}.{alias.name}" in MODULES else str(child.module)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            yield from (name for statement in child.orelse for name in imports(ast.Module([statement], [])))
        else:
            yield from imports(child)


def _dotted(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_dotted(file): file for file in PACKAGE.rglob("*.py")}
GRAPH = {name: {m for m in imports(ast.parse(file.read_text())) if m in MODULES} - {name} for name, file in MODULES.items()}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The groups of modules that import each other, directly or through others."""

    def reachable(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    reach = {name: reachable(name) for name in graph}
    groups = {frozenset(other for other in reach[name] if name in reach[other]) for name in graph if name in reach[name]}
    return sorted(map(set, groups), key=sorted)


def test_no_modules_import_each_other():
    assert circles(GRAPH) == []


def test_a_circle_through_a_third_module_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_from_rooms_below(room):
    assert any(name.split(".")[1:2] == [room] for name in MODULES), f"no such room: {room}"
    for name, imported in GRAPH.items():
        if name.split(".")[1:2] == [room]:
            foreign = {other.split(".")[1] for other in imported - TABLES if "." in other} - ALLOWED[room] - {room}
            assert not foreign, f"{name} imports {foreign}"


def test_every_room_has_its_place_in_the_order():
    assert {name.split(".")[1] for name in MODULES if "." in name} <= ALLOWED.keys()
    assert GRAPH["emomerge"] == set()


LIGHT = [
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "altair",
    "vl_convertsklearn",
]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("emomerge", ["torch", *LIGHT]),
        ("emomerge.cli", ["torch", "pydantic", *LIGHT]),
        ("emomerge.numerics.hashing", ["torch"]),
        ("emomerge.integrations", ["torch"]),
        ("emomerge.recipe", ["torch"]),
        ("emomerge.results", ["torch"]),
        ("emomerge.optim", ["torch"]),
        ("emomerge.optim.table", ["torch"]),
        ("emomerge.optim.sens", ["torch.distributed.tensor", *LIGHT]),
        ("emomerge.adapters", LIGHT),
        ("emomerge.merging", LIGHT),
        ("emomerge.probing", LIGHT),
        ("emomerge.reporting", LIGHT),
        ("emomerge.training", LIGHT),
        ("emomerge.experiment.pipeline", LIGHT),
        ("emomerge.cli.inspection", LIGHT),
    ],
)
def test_an_import_is_light(module, absent):
    code = f"import {module}, sys; print(*({set(absent)} & sys.modules.keys()))"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert shown.split() == []


@pytest.mark.parametrize("package", [emomerge, emomerge.integrations, emomerge.optim])
def test_public_names(package):
    for name in package.__all__:
        assert hasattr(package, name)
    with pytest.raises(AttributeError):
        package.nonsense  # noqa: B018
