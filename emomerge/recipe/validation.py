"""Checks that pydantic lacks: unknown keys with a suggestion, and sections chosen by `kind` from an open table."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

UNKNOWN_KEY, UNKNOWN_NAME = "unknown_key", "unknown_name"
"""Types of the errors made here; their context holds the `known` alternatives."""


def unknown_key(key: object, known: Iterable[str]) -> ValidationError:
    """Return the error for a key that a section does not have."""
    kind = PydanticCustomError(UNKNOWN_KEY, "unknown key", {"known": sorted(known)})
    return _at((str(key),), kind, key)


def unknown_name(value: object, known: Iterable[str], *at: str, task: str | None = None) -> ValidationError:
    """Return the error for a value that is none of the names known, or known for a task.

    `at` is the path to the value from where the error is raised.
    """
    names = list(known)
    message = f"one of {', '.join(map(repr, names))}" + (f" for the task {task}" if task else "")
    return _at(at, PydanticCustomError(UNKNOWN_NAME, "{message}", {"message": message, "known": names}), value)


def wrong_value(message: str, *at: str) -> ValidationError:
    """Return the error for a value that does not go with others; `at` is the path to it from where it is raised."""
    return _at(at, PydanticCustomError("value_error", "{message}", {"message": message}), None)


def nearest(name: object, known: Iterable[str]) -> str | None:
    """Return "did you mean `x`?" for the known name that is closest, None if none is close."""
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean `{near[0]}`?" if near else None


def name_in(names: Iterable[str]) -> AfterValidator:
    """Return a validator for strings that must be one of these names."""

    def check(name: str) -> str:
        if name not in names:
            raise unknown_name(name, names)
        return name

    return AfterValidator(check)


def by_kind(value: Any, kinds: Iterable[str], section_of: Callable[[str], type[BaseModel]]) -> Any:
    """Return the section that a mapping with `kind` describes.

    Args:
        value: plain data, or a section already validated, which is returned unchanged.
        kinds: the known kinds.
        section_of: returns the section's class for a kind.

    Raises:
        ValidationError: no mapping, no such kind, or a field of the section is wrong.
    """
    if isinstance(value, BaseModel):
        return value
    if not isinstance(value, Mapping):
        raise _at((), PydanticCustomError("no_section", "a mapping with `kind`"), value)
    if "kind" not in value:
        raise _at(("kind",), "missing", value)
    kind = value["kind"]
    if not isinstance(kind, str) or kind not in kinds:
        raise unknown_name(kind, kinds, "kind")
    return section_of(kind).model_validate(value)


def one_of(*sections: type[BaseModel], optional: bool = False) -> BeforeValidator:
    """Return a validator that chooses among sections by their literal `kind`; `optional` also accepts None."""
    choices = {kind: section for section in sections for kind in get_args(section.model_fields["kind"].annotation)}
    return BeforeValidator(lambda value: None if optional and value is None else by_kind(value, choices, choices.__getitem__))


def _at(at: tuple[str, ...], kind: str | PydanticCustomError, found: object) -> ValidationError:
    return ValidationError.from_exception_data("recipe", [InitErrorDetails(type=kind, loc=at, input=found)])
