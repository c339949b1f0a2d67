"""The JSON schema of recipes, for editors that complete and check YAML, and for the documentation."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel

from emomerge.recipe.sections import Merge, Recipe, Section
from emomerge.tasks.table import TASKS, task_class


def recipe_schema(methods: Iterable[str] = ()) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a recipe. Descriptions are the fields' docstrings.

    Args:
        methods: names of merge methods, which this package does not know.
    """
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    definitions: dict[str, Any] = schema["$defs"]
    tasks = []
    for kind in TASKS:
        section = task_class(kind).section_class
        own = section.model_json_schema(ref_template="#/$defs/{model}")
        definitions.update(own.pop("$defs", {}))
        definitions[section.__name__] = own
        tasks.append({"$ref": f"#/$defs/{section.__name__}"})
    schema["properties"]["task"] = {"oneOf": tasks}
    schema["required"] = [*schema["required"], *({"task"} - set(schema["required"]))]
    definitions.pop("TaskSection", None)
    average = definitions["Runs"]["properties"]["average"]
    average["anyOf"] = [*average["anyOf"], {"enum": ["none", "ema", "lawa"]}]
    if names := sorted(methods):
        definitions["Merge"]["properties"]["method"]["enum"] = names
    sections: dict[str, type[BaseModel]] = {"Merge": Merge}
    sections |= {section.__name__: section for section in _subclasses(Section)}
    for name, described in {**definitions, Recipe.__name__: schema}.items():
        for field, text in _docstrings(sections[name]).items():
            if field in described.get("properties", {}):
                described["properties"][field]["description"] = text
    return schema


def _subclasses(section: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for found in section.__subclasses__():
        yield found
        yield from _subclasses(found)


def _docstrings(section: type[BaseModel]) -> dict[str, str]:
    """Return field → the string literal that follows it in a class, or in the class that it inherits it from."""
    found: dict[str, str] = {}
    for parent in reversed(section.__mro__):
        if not (isinstance(parent, type) and issubclass(parent, BaseModel) and parent.__module__.startswith("emomerge.")):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, after in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
                value = after.value
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    found[field.target.id] = inspect.cleandoc(value.value).replace("\n", " ")
    return found
