"""The rooms' order and the weight of importing them, checked on the sources and in a fresh interpreter."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import emomerge
import emomerge.integrations
import emomerge.optim

PACKAGE = Path(emomerge.__file__).parent
FLOOR = {"errors", "extras", "numerics", "checkpoints", "native", "results", "controls"}
ALLOWED = {
    "numerics": {"errors"},
    "checkpoints": FLOOR,
    "optim": FLOOR,
    "tasks": FLOOR | {"adapters", "recipe"},
    "integrations": {"errors", "optim"},
    "training": FLOOR | {"recipe", "optim", "tasks"},
    "adapters": FLOOR,
    "merging": FLOOR | {"adapters"},
    "probing": FLOOR,
    "reporting": FLOOR,
}


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_from_rooms_to_its_left(room):
    for file in (PACKAGE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "emomerge":
                names = [node.module] if "." in node.module else [f"emomerge.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.startswith("emomerge.")]
            for name in names:
                assert name.split(".")[1] in ALLOWED[room] | {room}, f"{file.name} imports {name}"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import emomerge", "torch"),
        ("import emomerge.cli", "torch"),
        ("import emomerge.numerics.hashing", "torch"),
        ("import emomerge.integrations", "torch"),
        ("import emomerge.optim", "torch"),
        ("import emomerge.optim.table", "torch"),
        ("import emomerge.optim.sens", "transformers"),
        ("import emomerge.optim.sens", "torch.distributed.tensor"),
        ("import emomerge.recipe", "torch"),
        ("import emomerge.experiment.pipeline", "transformers"),
        ("import emomerge.experiment.pipeline", "peft"),
        ("import emomerge.experiment.pipeline", "altair"),
    ],
)
def test_what_an_import_does_not_pull_in(statement, absent):
    code = f"{statement}, sys; assert {absent!r} not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("package", [emomerge, emomerge.integrations, emomerge.optim])
def test_public_names(package):
    for name in package.__all__:
        assert hasattr(package, name)
    with pytest.raises(AttributeError):
        package.nonsense  # noqa: B018
