"""Functions of training share a context instead of long parameter lists."""

import ast
from pathlib import Path

import pytest

import emomerge.training

FOLDER = Path(emomerge.training.__file__).parent
MOST = 6


def parameters(function):
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [argument.arg for argument in named if argument.arg not in ("self", "cls")]


@pytest.mark.parametrize("file", sorted(FOLDER.rglob("*.py")), ids=lambda file: str(file.relative_to(FOLDER)))
def test_no_function_has_more_than_six_parameters(file):
    functions = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef | ast.Lambda)]
    assert not [getattr(f, "name", "lambda") for f in functions if len(parameters(f)) > MOST]
