"""Numbers that may vary between tensors and between runs, as written in recipes and in mergekit's YAML.

A setting is a number; a gradient, which is a list of numbers spread evenly over the layers and interpolated; or a list of
entries `{filter, value}`. The first entry applies whose filter is part of the tensor's name. For a parameter that may vary
between runs, entries may also name a `run`, by its name or by its number from 1.
"""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_serializer

from emomerge.errors import BadInput

T = TypeVar("T")
EACH_TENSOR, EACH_RUN = "each tensor", "each run"

PerTensor = Annotated[T, EACH_TENSOR]
"""A parameter of a method that may vary between tensors."""
PerRun = Annotated[T | Sequence[T], EACH_RUN]
"""A parameter that may also vary between runs: the method gets a tuple with one number per run."""

_LAYER = re.compile(r"(?:(.*?)\.)??(\d+)(?:\.|$)")
"""Pattern of a layer's stack and number."""

Setting = Any
"""A validated setting, as plain data: float | list[float] | {filter, run, value} | list of these."""


class Entry(BaseModel, Generic[T]):
    """`value`, a number or a gradient, for tensors whose name contains `filter`."""

    model_config = ConfigDict(extra="forbid")

    filter: str | None = None
    value: Annotated[
        Annotated[T, Tag("number")] | Annotated[list[T], Field(min_length=1), Tag("gradient")],
        Discriminator(lambda value: _shape(value)),
    ]

    @model_serializer
    def _plain(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value is not None}


class RunEntry(Entry[T], Generic[T]):
    """An entry that may apply to one run only, by its name or by its number from 1."""

    run: int | str | None = None


def setting_of(number: Any, *, each_run: bool = False, or_word: Any = None) -> Any:
    """Return the pydantic type of a setting.

    Args:
        number: type of a single number.
        each_run: whether entries may name a run.
        or_word: a Literal type that is accepted as well.
    """
    entry: Any = RunEntry if each_run else Entry
    one = number if or_word is None else number | or_word
    kinds = {"number": one, "gradient": Annotated[list[number], Field(min_length=1)]}
    kinds |= {"entry": entry[number], "entries": list[entry[number]]}
    tagged = [Annotated[kind, Tag(tag)] for tag, kind in kinds.items()]
    return Annotated[reduce(operator.or_, tagged), Discriminator(_shape)]


def _shape(value: Any) -> Literal["number", "gradient", "entry", "entries"]:
    """Return the intended kind of setting, so that errors refer to that kind."""
    if isinstance(value, Mapping | BaseModel):
        return "entry"
    if isinstance(value, list | tuple):
        return "entries" if any(isinstance(item, Mapping | BaseModel) for item in value) else "gradient"
    return "number"


def resolve(
    setting: Setting, names: Iterable[str], runs: Sequence[str] = ("",), *, default: float | None = None, what: str
) -> dict[str, tuple[float, ...]]:
    """Resolve a setting to one number per run for each tensor.

    Args:
        setting: validated by a type from `setting_of`.
        names: the tensors; a gradient is spread over their layers.
        runs: the runs' names.
        default: the number to use if no entry matches.
        what: name of the parameter, for error messages.

    Raises:
        BadInput: a filter that no tensor matches, an unknown run, or no number for a tensor.
    """
    names = list(names)
    if isinstance(setting, int | float):
        return dict.fromkeys(names, (float(setting),) * len(runs))
    _check_entries(setting, names, runs, what)
    positions = layer_positions(names)
    resolved = {}
    for name in names:
        found = [_number(setting, name, run, positions[name]) for run in enumerate(runs, start=1)]
        numbers = tuple(number for each in found if (number := default if each is None else each) is not None)
        if len(numbers) < len(runs):
            raise BadInput(f"{what} has no number for a tensor", where=name, fix="end it with an entry without filter")
        resolved[name] = numbers
    return resolved


def constant(resolved: Mapping[str, T]) -> T | None:
    """Return the value that all tensors share; None if they differ, or if there are none."""
    values = list(resolved.values())
    return values[0] if values and all(value == values[0] for value in values) else None


def layer_positions(names: Iterable[str]) -> dict[str, float]:
    """Return the position of each tensor in its stack of layers, from 0 to 1; 0 outside a stack, 1 in a stack of one layer.

    The first number among the parts of a name is the layer, and the parts before it are the stack:
    `model.layers.3.mlp.up.weight` is layer 3 of `model.layers`.
    """
    found: dict[str, tuple[str, int] | None] = {}
    last: dict[str, int] = defaultdict(int)
    for name in names:
        match = _LAYER.match(name)
        found[name] = None if match is None else (match[1] or "", int(match[2]))
        if match is not None:
            last[match[1] or ""] = max(last[match[1] or ""], int(match[2]))
    return {
        name: 0.0 if place is None else place[1] / last[place[0]] if last[place[0]] else 1.0 for name, place in found.items()
    }


def layer_count(names: Iterable[str]) -> int:
    """Return the number of layers of the longest stack."""
    return max((int(match[2]) + 1 for match in map(_LAYER.match, names) if match is not None), default=0)


def _number(setting: Setting, name: str, run: tuple[int, str], position: float) -> float | None:
    """Return the number for a tensor and a run, or None if no entry matches."""
    if isinstance(setting, int | float):
        return float(setting)
    if isinstance(setting, Mapping):
        setting = [setting]
    if isinstance(setting[0], int | float):
        return _interpolated(setting, position)
    for entry in setting:
        if _matches(entry.get("filter"), name) and entry.get("run") in (None, *run):
            return _number(entry["value"], name, run, position)
    return None


def _interpolated(gradient: Sequence[float], position: float) -> float:
    scaled = position * (len(gradient) - 1)
    left = int(scaled)
    right, share = min(left + 1, len(gradient) - 1), scaled - left
    return (1 - share) * gradient[left] + share * gradient[right]


def _matches(pattern: str | None, name: str) -> bool:
    return pattern in (None, "*") or str(pattern) in name


def _check_entries(setting: Setting, names: Sequence[str], runs: Sequence[str], what: str) -> None:
    """Raise BadInput for an entry that can never apply."""
    entries = [setting] if isinstance(setting, Mapping) else [item for item in setting if isinstance(item, Mapping)]
    for entry in entries:
        pattern, run = entry.get("filter"), entry.get("run")
        if not any(_matches(pattern, name) for name in names):
            raise BadInput("a filter that matches no tensor's name", where=what, found=repr(pattern))
        if run is not None and run not in (*range(1, len(runs) + 1), *runs):
            raise BadInput("an entry for a run that is not merged", where=what, found=repr(run), expected=", ".join(runs))
