"""Read a recipe from YAML, apply `--set` overrides, and explain the first error in one line."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from emomerge.errors import BadInput, Note
from emomerge.files import parse_yaml, read_yaml
from emomerge.recipe.sections import Find, Recipe
from emomerge.recipe.validation import UNKNOWN_KEY, UNKNOWN_NAME, nearest


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        path: a YAML file. Relative paths in it start from its folder; where there is nothing, from the working directory.
        overrides: `key.sub=value`, with the value in YAML; list items are addressed by number. Relative paths in them start
            from the working directory first.

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
    overriding = [_apply(data, override) for override in overrides]
    return parse_recipe(data, source=str(file)).located(_finder(file.parent, {str(text) for text in overriding}))


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


def _finder(folder: Path, overriding: Container[str]) -> Find:
    """Return the function that finds the files a recipe in `folder` names; see `load_recipe`."""

    def find(name: str) -> tuple[str, str] | None:
        given, here, there = Path(name).expanduser(), folder.resolve(), Path.cwd()
        if given.is_absolute() or not name:
            return None
        places = (there, here) if name in overriding else (here, there)
        place = next((place for place in places if _exists(place / given)), None)
        if place is None:
            return None
        if place == there != here and name not in overriding:
            warnings.warn(f"{name} is not in {folder}, beside the recipe: the one in the working directory is used", Note, 2)
        # Earlier versions hashed the path to a function's file, and other names as they are.
        return str(place / given), str(folder / given) if given.suffix == ".py" and place == here else name

    return find


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a NUL, for a name
        return False


def _apply(data: dict[str, Any], override: str) -> Any:
    """Set one `key.sub=value` in the plain data and return the value."""
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
    return value


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
