"""The registry of metrics: how each is called, run from a recipe, spread over workers, costed and reported."""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError

from emomerge import recipe
from emomerge.errors import BadInput
from emomerge.results import Column, Estimate, Role

Array: TypeAlias = NDArray[np.float64]
Options: TypeAlias = Mapping[str, Any]
Preset: TypeAlias = Literal["quick", "standard", "full"]
Models: TypeAlias = Literal["every", "pair", "merge"]
Others: TypeAlias = Literal["best", "runs"]
Split: TypeAlias = Literal["directions", "whole"]

PRESETS: tuple[Preset, ...] = typing.get_args(Preset)
"""Each measures everything that the ones before it measure."""
BACKWARD = 3
"""Cost of a forward and a backward pass in forward passes."""


@dataclass(frozen=True)
class Measurement:
    """The result of a metric for one model.

    Attributes:
        values: all values, for paired statistics; the metric's docstring gives the shape.
        summary: numbers, strings, and lists and mappings of them, ready for JSON. None stands for a value that does not exist.
        weights: weights of the last axis of `values`, summing to one; None if models cannot be compared in pairs.
        series: name → part of `values` that the verdict compares; by default all of them under the metric's name.
    """

    values: Array
    summary: Any
    weights: Array | None = None
    series: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What a report shows of one measurement.

    Attributes:
        figures: columns of the tables, and the model's estimate for each.
        row: fields of `ArtefactRow` besides the estimates, as plain data.
        results: fields of `Results`, as plain data.
    """

    figures: Sequence[tuple[Column, Estimate]] = ()
    row: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)


Function = TypeVar("Function", bound=Callable[..., Measurement])


def _no_options(probe: recipe.Probe) -> Options:
    return {}


def _plain_report(name: str, meaning: str, summary: Any, model: str) -> Report:
    """Report a number as a column of its own, and anything else among the details of the model."""
    if summary is None or isinstance(summary, (int, float)):
        return Report([(Column(key=name, title=name, meaning=meaning), Estimate(mean=summary))])
    return Report(row={"details": {name: summary}})


@dataclass(frozen=True)
class Metric:
    """A registered metric.

    Attributes:
        name: its name in presets, recipes and ledgers.
        function: (Perturbable, base=, others=, **options) → Measurement.
        preset: the smallest preset that contains it; None if it is measured on request only.
        base: whether the function takes the base's weights as `base`.
        others: whether it takes other models' weights as `others`, and which a recipe gives it: the best single run, or all
            runs of the first training seed.
        models: the models of a recipe that it is measured of: every model on its own, the merge and the best run, or the
            merge alone.
        roles: roles of the models that it is measured of. Without any a recipe does not run it, since reports contain its
            figure anyway.
        options: the recipe's `probe` section → options of the function.
        parts: number of batches that a recipe's rows are cut into; None: the recipe's own batches.
        split: how workers share it: by direction (the function takes `directions`, a number of directions or a list of
            indices), as a whole, or not at all because it is cheap.
        cost: (options, batches) → cost in forward passes of one batch; a forward with a backward pass counts as three.
        report: (summary, name of the model) → columns and estimates.
        sample: positions among the recipe's directions of those that it is measured in; None: all.
        middle: whether it is measured at the middle one of the recipe's radii only.
    """

    name: str
    function: Callable[..., Measurement]
    preset: Preset | None
    base: bool
    others: Others | None
    models: Models
    roles: tuple[Role, ...]
    options: Callable[[recipe.Probe], Options]
    parts: int | None
    split: Split | None
    cost: Callable[[Options, int], float] | None
    report: Callable[[Any, str], Report]
    sample: tuple[int, ...] | None = None
    middle: bool = False

    @property
    def needs(self) -> set[str]:
        """Names of the required arguments besides the Perturbable."""
        return {name for name, needed in (("base", self.base), ("others", self.others)) if needed}

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """Option → default; callbacks are no options."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty and not p.name.startswith("on_")}

    def options_of(self, probe: recipe.Probe) -> dict[str, Any]:
        """Return the options that a recipe's `probe` section gives the metric.

        Raises:
            BadInput: `probe.options` names an option that the metric does not have, or gives it a value of another type.
        """
        given = probe.options.get(self.name, {})
        where = f"probe.options.{self.name}"
        hints = typing.get_type_hints(self.function)
        checked = {}
        for option, value in given.items():
            if option not in self.defaults:
                raise unknown("the metric has no such option", where, option, self.defaults)
            try:
                adapter: TypeAdapter[Any] = TypeAdapter(hints[option], config=ConfigDict(arbitrary_types_allowed=True))
                checked[option] = adapter.validate_python(value)
            except ValidationError as error:
                fault = error.errors()[0]
                raise BadInput(fault["msg"], where=f"{where}.{option}", found=repr(fault["input"])) from None
        options = {**self.options(probe), **checked}
        if self.sample is not None:
            directions = direction_indices(options["directions"])
            options["directions"] = [directions[position] for position in self.sample if position < len(directions)]
        if self.middle:
            options["radii"] = [middle_of(options["radii"])]
        return options

    def directions(self, probe: recipe.Probe) -> int | None:
        """Return in how many directions a recipe measures it, or None if it has no directions that workers could share."""
        return len(direction_indices(self.options_of(probe)["directions"])) if self.split == "directions" else None

    def looks_at(self, role: Role) -> bool:
        """Return whether it is measured of models of a role, each on its own."""
        return self.models == "every" and role in self.roles

    def in_few(self, probe: recipe.Probe) -> Metric:
        """Return the metric in few directions at one radius, for artefacts that the verdict does not compare in sharpness."""
        directions = self.directions(probe) or 0
        if directions == probe.few(directions):
            return self
        return replace(self, sample=tuple(range(probe.few(directions))), middle="radii" in self.defaults)

    def passes(self, options: Options, batches: int) -> float:
        """Return the cost of measuring one model with some options, in forward passes."""
        return 0.0 if self.cost is None else self.cost({**self.defaults, **options}, batches)


METRICS: dict[str, Metric] = {}


def metric(
    name: str,
    *,
    preset: Preset | None = None,
    base: bool = False,
    others: Others | None = None,
    models: Models = "every",
    roles: tuple[Role, ...] = typing.get_args(Role),
    options: Callable[[recipe.Probe], Options] = _no_options,
    parts: int | None = None,
    split: Split | None = None,
    cost: Callable[[Options, int], float] | None = None,
    report: Callable[[Any, str], Report] | None = None,
) -> Callable[[Function], Function]:
    """Register a function (Perturbable, **needs, **options with defaults) → Measurement as a metric.

    See `Metric` for the arguments. Without `report`, a summary that is a number becomes a column titled with the metric's name
    and explained by the first line of the function's docstring; any other summary goes to the `details` of results.json.
    """

    def register(function: Function) -> Function:
        meaning = (function.__doc__ or name).strip().splitlines()[0].rstrip(".")
        METRICS[name] = Metric(
            name, function, preset, base, others, models, roles, options, parts, split, cost,
            report or partial(_plain_report, name, meaning),
        )  # fmt: skip
        return function

    return register


def preset_metrics(preset: Preset) -> list[str]:
    """Return the names of a preset's metrics."""
    held = PRESETS[: PRESETS.index(preset) + 1]
    return [name for name, metric in METRICS.items() if metric.preset in held]


def recipe_metrics(probe: recipe.Probe, only: Sequence[str] | None = None) -> tuple[list[Metric], list[Metric]]:
    """Return the metrics that a recipe asks for: those of every model, and those of the models that are compared closely.

    Args:
        probe: the recipe's `probe` section.
        only: names of metrics to measure of every model, in place of those of the recipe.

    Raises:
        BadInput: an unknown metric, one that every report contains anyway, or an option that a metric does not have.
    """
    for name in probe.options:
        find(name, "probe.options")
    wanted = [*preset_metrics(probe.preset), *(find(name, "probe.metrics").name for name in probe.metrics)]
    chosen = [find(name, "--metric").name for name in only] if only else wanted
    for name in [*probe.metrics, *(only or ())]:
        if not METRICS[name].roles:
            raise BadInput("every report contains this metric", where=name, fix="leave it out")
    close = [metric for name, metric in METRICS.items() if name in chosen and metric.roles]
    for found in close:
        found.options_of(probe)
    return [found for found in close if only or found.preset == PRESETS[0]], close


def find(name: str, where: str) -> Metric:
    """Return a metric by name.

    Raises:
        BadInput: there is none of this name.
    """
    if name not in METRICS:
        raise unknown("no such metric", where, name, METRICS)
    return METRICS[name]


def unknown(message: str, where: str, name: str, known: Iterable[str]) -> BadInput:
    """Return an error about a name that is none of the known ones."""
    near = difflib.get_close_matches(name, list(known), 1, 0.7)
    return BadInput(
        message, where=where, found=name, expected=", ".join(known), fix=f"did you mean {near[0]}?" if near else None
    )


def direction_indices(directions: int | Sequence[int]) -> Sequence[int]:
    """Return the indices of directions, given as such or as their number."""
    return range(directions) if isinstance(directions, int) else directions


def middle_of(radii: Sequence[float]) -> float:
    """Return the radius that is shown where only one is: the middle one, of an even number the larger."""
    return sorted(radii)[len(radii) // 2]
