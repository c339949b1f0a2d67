"""What the package advises, collected from its source, and helpers of the scenarios that follow it."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from _pytest.mark import ParameterSet
from click.testing import CliRunner, Result
from safetensors.torch import save_file

import emomerge
from emomerge.cli import main

Scenario = Callable[[Path], None]
W = torch.arange(4.0).view(2, 2) + 1


class Scenarios(dict[str, Scenario]):
    """The scenarios of a file by the advice that they follow."""

    def follows(self, *advice: str) -> Callable[[Scenario], Scenario]:
        """Register a scenario for the advice that it follows, as the source gives it, with `{}` for what is filled in."""

        def register(scenario: Scenario) -> Scenario:
            self.update(dict.fromkeys(advice, scenario))
            return scenario

        return register

    def each(self) -> list[ParameterSet]:
        """Return each scenario once, for pytest."""
        return [pytest.param(scenario, id=scenario.__name__.strip("_")) for scenario in dict.fromkeys(self.values())]


class _Module:
    """The texts that the expressions of a module can give."""

    def __init__(self, name: str, tree: ast.Module) -> None:
        self.name, self.tree = name, tree
        self.functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        self.calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        self.classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}

    def advice(self) -> Iterator[str]:
        """Yield every text that is passed as `fix`."""
        for scope in [self.tree, *(node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef))]:
            for call in _own_calls(scope):
                for keyword in call.keywords:
                    if keyword.arg == "fix":
                        yield from self.texts(keyword.value, scope)

    def texts(self, node: ast.expr, scope: ast.AST) -> Iterator[str]:
        """Yield the texts of an expression: those of its branches, of the assignments to a name, of a function's results."""
        match node:
            case ast.Constant(value=str() as text):
                yield text
            case ast.JoinedStr(values=parts):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
            case ast.IfExp(body=yes, orelse=no):
                yield from (*self.texts(yes, scope), *self.texts(no, scope))
            case ast.BoolOp(values=values):
                for value in values:
                    yield from self.texts(value, scope)
            case ast.BinOp(left=left, right=right):
                yield from (one + other for one in self.texts(left, scope) for other in self.texts(right, scope))
            case ast.Name(id=name):
                yield from self._of_name(name, scope)
            case ast.Attribute(attr=name):
                yield from self._of_field(name)
            case ast.Call(func=ast.Name(id=name)):
                for module in _modules():
                    if (function := module.functions.get(name)) is not None:
                        for each in ast.walk(function):
                            if isinstance(each, ast.Return) and each.value is not None:
                                yield from module.texts(each.value, function)

    def _of_name(self, name: str, scope: ast.AST) -> Iterator[str]:
        for place in (scope, self.tree):
            for node in ast.walk(place) if place is scope else self.tree.body:
                if isinstance(node, ast.Assign):
                    for target in node.targets:
                        yield from self._of_target(target, node.value, name, place)
                elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
                    yield from self.texts(node.value, place)
                elif isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names) and name.isupper():
                    for module in _modules():
                        if module is not self and module.name == node.module:
                            yield from module._of_name(name, module.tree)
        if isinstance(scope, ast.FunctionDef):
            arguments = [argument.arg for argument in scope.args.args]
            if name in arguments:  # what the callers in this module pass by position
                for call in self.calls:
                    if (
                        isinstance(call.func, ast.Name)
                        and call.func.id == scope.name
                        and len(call.args) > arguments.index(name)
                    ):
                        yield from self.texts(call.args[arguments.index(name)], self.tree)

    def _of_target(self, target: ast.expr, value: ast.expr, name: str, place: ast.AST) -> Iterator[str]:
        if isinstance(target, ast.Name) and target.id == name:
            yield from self.texts(value, place)
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Subscript) and isinstance(value.value, ast.Name):
            for entry in self._entries(value.value.id):  # a table of tuples
                yield from self._of_target(target, entry, name, place)
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for each, its in zip(target.elts, value.elts, strict=True):
                yield from self._of_target(each, its, name, place)

    def _entries(self, table: str) -> Iterator[ast.expr]:
        """Yield the values of a dict of this module."""
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and table in map(ast.unparse, node.targets):
                yield from node.value.values

    def _of_field(self, name: str) -> Iterator[str]:
        """Yield what is given for a field of a named tuple of this module."""
        for owner, node in self.classes.items():
            fields = [
                each.target.id for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
            ]
            if name in fields:
                for call in self.calls:
                    if isinstance(call.func, ast.Name) and call.func.id == owner and len(call.args) > fields.index(name):
                        yield from self.texts(call.args[fields.index(name)], self.tree)


def _own_calls(scope: ast.AST) -> Iterator[ast.Call]:
    """Yield the calls in a module outside its functions, or in a function outside those within it."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.Call):
            yield node
        if not isinstance(node, ast.FunctionDef):
            yield from _own_calls(node)


@cache
def _modules() -> tuple[_Module, ...]:
    package = Path(emomerge.__file__).parent
    names = {".".join(file.relative_to(package.parent).with_suffix("").parts): file for file in package.rglob("*.py")}
    return tuple(_Module(name, ast.parse(file.read_text())) for name, file in names.items())


def all_advice() -> set[str]:
    """Return every text that the package passes as `fix`, directly or through variables, constants, tables and functions."""
    return {text for module in _modules() for text in module.advice()}


def run(*arguments: object) -> Result:
    """Give a command."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """Give a command that is refused; return what it says."""
    result = run(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    return result.output.strip().splitlines()[-1]


def works(*arguments: object) -> str:
    """Give a command that succeeds; return what it says."""
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def model(folder: Path, **tensors: torch.Tensor) -> Path:
    """Write a model of a few tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"{name}.weight": tensor.clone() for name, tensor in (tensors or {"a": W}).items()}, folder / "model.safetensors"
    )
    return folder


def adapter(folder: Path, module: str = "a", *, a: torch.Tensor | None = None, **config: object) -> Path:
    """Write a PEFT LoRA of rank 1 over one module."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [module], **config})
    )
    names = {"lora_A": torch.ones(1, 2) if a is None else a, "lora_B": torch.ones(2, 1)}
    save_file({f"base_model.model.{module}.{n}.weight": t for n, t in names.items()}, folder / "adapter_model.safetensors")
    return folder
