"""Read a recipe from YAML, apply `--set` overrides, and explain the first error in one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from emomerge.errors import BadInput
from emomerge.files import parse_yaml, read_yaml
from emomerge.recipe.sections import Recipe
from emomerge.recipe.validation import UNKNOWN_KEY, UNKNOWN_NAME, nearest


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        path: a YAML file. Code that the task names is also looked for in its folder.
        overrides: `key.sub=value`, with the value in YAML; list items are addressed by number.

    Raises:
        BadInput: the file is missing or is not a YAML mapping, or a field is wrong; for an unknown key the message suggests
            the nearest known one.
    """
    file = Path(path)
    if not file.exists():
        raise BadInput("no such recipe", where=file, fix="start from one with `emomerge init`")
    data = read_yaml(file, what="the recipe is not YAML")
    if not isinstance(data, dict):
        raise BadInput("a recipe is a mapping of keys", where=file, found=type(data).__name__)
    for override in overrides:
        _apply(data, override)
    recipe = parse_recipe(data, source=str(file))
    return recipe.model_copy(update={"task": recipe.task.beside(file.parent)})


def parse_recipe(data: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Return the recipe that plain data describe.

    Args:
        data: keys and values as YAML gives them.
        source: name of the data in error messages.

    Raises:
        BadInput: a field is wrong; the message names it.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise _explain(error, source) from None


def _apply(data: dict[str, Any], override: str) -> None:
    """Set one `key.sub=value` in the plain data."""
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise BadInput("--set takes key.sub=value", found=repr(override))
    value = parse_yaml(text, what="not a value in YAML", where=f"--set {key}")
    *parents, last = key.split(".")
    node: Any = data
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            node = node[_index(part, node, override)]
        elif isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            raise BadInput("--set reaches into a plain value", where=".".join(parents[:depth]), found=repr(override))
    if isinstance(node, list):
        node[_index(last, node, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise BadInput("--set reaches into a plain value", where=".".join(parents), found=repr(override))


def _index(part: str, items: list[Any], override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise BadInput("--set names no item of the list", where=override, expected=f"a number below {len(items)}")
    return int(part)


def _explain(error: ValidationError, source: str) -> BadInput:
    """Describe the first problem of a validation in one line."""
    problems = error.errors(include_url=False)
    # An unknown key is often a misspelt required one, and then explains why that is missing.
    first = next((p for p in problems if p["type"] == UNKNOWN_KEY), problems[0])
    field = ".".join(str(part) for part in first["loc"] if part != "[key]")
    where = f"`{field}` in {source}" if field else source
    if first["type"] == UNKNOWN_KEY:
        known = first["ctx"]["known"]
        others = f"known keys: {', '.join(known)}"
        return BadInput("unknown recipe key", where=where, fix=nearest(first["loc"][-1], known) or others)
    if first["type"] == "missing":
        return BadInput("recipe key missing", where=where)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return BadInput("recipe value not usable", where=where, fix=message)
    found = None if isinstance(first["input"], (dict, list, BaseModel)) else repr(first["input"])
    fix = nearest(first["input"], first["ctx"]["known"]) if first["type"] == UNKNOWN_NAME else None
    expected = message[:1].lower() + message[1:]
    return BadInput("recipe value not usable", where=where, expected=expected, found=found, fix=fix)
