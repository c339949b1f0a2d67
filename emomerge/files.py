"""Files that others wrote, parsed into typed values at the border. Whatever is wrong with one becomes a single BadInput."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import TypeAdapter, ValidationError

from emomerge.errors import BadInput

T = TypeVar("T")
JsonObject = dict[str, Any]
LARGEST_TEXT = 100_000_000
"""Bytes. An index of a hundred thousand tensors takes 10 MB."""
LARGEST_YAML, MOST_NODES, DEEPEST = 1_000_000, 100_000, 50
"""Bytes of a YAML text; its nodes with every alias expanded; levels of nesting."""
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null", "merge")}
_NO_TEXT = re.compile(r"[\x00\ud800-\udfff]")
_UNREADABLE = "the file cannot be read"


class _Loader(yaml.SafeLoader):
    """Plain data only: dates stay text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _PLAIN_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_bytes(path: Path, *, largest: int = LARGEST_TEXT) -> bytes:
    """Return the content of a regular file; a pipe or device is refused, because reading it may never end.

    Raises:
        BadInput: it is missing, not a regular file, too large or unreadable.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        found = error.strerror if isinstance(error, OSError) else error
        raise BadInput(_UNREADABLE, where=path, found=found) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
            raise BadInput(_UNREADABLE, where=path, expected="a regular file", found=kind)
        if status.st_size > largest:
            raise BadInput("the file is too large", where=path, expected=f"at most {largest} bytes", found=status.st_size)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(largest)
    except OSError as error:
        raise BadInput(_UNREADABLE, where=path, found=error.strerror) from None
    finally:
        os.close(descriptor)


def require_regular(path: Path) -> None:
    """Raise BadInput if `path` is a pipe or device, or cannot be looked at."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise BadInput(_UNREADABLE, where=path, found=error) from None
    if not stat.S_ISREG(mode):
        raise BadInput(_UNREADABLE, where=path, expected="a regular file")


def read_text(path: Path, *, largest: int = LARGEST_TEXT) -> str:
    """Return the content of a UTF-8 file. Raises BadInput as `read_bytes`, or if it is not UTF-8."""
    return decode(read_bytes(path, largest=largest), where=path)


def decode(data: bytes, *, where: object) -> str:
    """Return UTF-8 text. Raises BadInput if it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput("not UTF-8", where=where, found=error) from None


def parse_json(text: str | bytes, kind: type[T], *, where: object, what: str = "not valid JSON", fix: str | None = None) -> T:
    """Parse JSON into a value of a type, without conversion between JSON types.

    Args:
        text: the JSON.
        kind: the type, such as `dict[str, int]` or a pydantic model.
        where: its origin, for the message.
        what: the diagnosis to report.
        fix: what to do about it.

    Raises:
        BadInput: it is not JSON, nested too deeply, or not of this type.
    """
    try:
        found: T = _adapter(cast("Any", kind)).validate_json(text, strict=True)
        return found
    except ValidationError as error:
        raise explain(error, what=what, where=where, fix=fix) from None
    except UnicodeEncodeError as error:  # a lone surrogate in `text`
        raise BadInput(what, where=where, found=error, fix=fix) from None


def to_json(value: object, *, ascii_only: bool = True) -> str:
    """Return a value as indented JSON; numbers that JSON cannot represent, NaN and infinities, become null."""
    try:
        return json.dumps(value, indent=2, ensure_ascii=ascii_only, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=2, ensure_ascii=ascii_only)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_type(value: object, kind: type[T], *, where: object, what: str, fix: str | None = None) -> T:
    """Return plain data as a value of a type; see `parse_json`. Raises BadInput if it is of another type."""
    try:
        found: T = _adapter(cast("Any", kind)).validate_python(value, strict=True)
        return found
    except ValidationError as error:
        raise explain(error, what=what, where=where, fix=fix) from None


def read_json(path: Path, kind: type[T], *, what: str = "not valid JSON", fix: str | None = None) -> T:
    """Parse a JSON file; see `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path), kind, where=path, what=what, fix=fix)


def read_json_or(path: Path, kind: type[T], default: T) -> T:
    """Return the content of a JSON file, or `default` if it is missing or damaged: for notes that can be made again."""
    try:
        return read_json(path, kind)
    except BadInput:
        return default


def explain(error: ValidationError, *, what: str, where: object, fix: str | None = None) -> BadInput:
    """Return the first problem of a validation as a BadInput."""
    first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(map(str, first["loc"]))
    value = first["input"]
    found = f", found {value!r}" if isinstance(value, (int, float)) or (isinstance(value, str) and first["loc"]) else ""
    return BadInput(what, where=f"{where}, {field}" if field else where, found=f"{first['msg']}{found}", fix=fix)


def read_yaml(path: Path, *, what: str) -> Any:
    """Parse a YAML file; see `read_bytes` and `parse_yaml`."""
    return parse_yaml(read_text(path, largest=LARGEST_YAML), what=what, where=path)


def parse_yaml(text: str, *, what: str, where: object) -> Any:
    """Parse YAML into plain data: mappings, lists, text, numbers, booleans and null.

    Args:
        text: the YAML.
        what: the diagnosis to report.
        where: its origin, for the message.

    Raises:
        BadInput: it is not YAML, holds other types, refers to itself, or is too large once its aliases are expanded.
    """
    if len(text) > LARGEST_YAML:
        raise BadInput(what, where=where, expected=f"at most {LARGEST_YAML} characters", found=len(text))
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _weigh(node, {}, 0)
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        found = "nested too deeply" if isinstance(error, RecursionError) else error
        raise BadInput(what, where=where, found=found) from None


def _weigh(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Return the number of nodes with every alias expanded. Raises ValueError beyond the limits."""
    if node.tag not in _PLAIN_TAGS:
        raise ValueError(f"a value of the type {node.tag.removeprefix('tag:yaml.org,2002:')[:60]} is not supported")
    if depth > DEEPEST:
        raise ValueError(f"nested more than {DEEPEST} levels deep")
    if (weight := known.get(id(node), 0)) < 0:
        raise ValueError("a value that contains itself")
    if weight == 0:
        known[id(node)] = -1
        if isinstance(node, yaml.ScalarNode) and _NO_TEXT.search(node.value):
            raise ValueError("a NUL or half of a surrogate pair in a text")
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        weight = known[id(node)] = 1 + sum(_weigh(child, known, depth + 1) for child in children)
        if weight > MOST_NODES:
            raise ValueError(f"more than {MOST_NODES} values once its aliases are expanded")
    return weight


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
