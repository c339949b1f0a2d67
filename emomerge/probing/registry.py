"""The metrics by name: what `emomerge.probe` can measure, and which preset measures it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Preset: TypeAlias = Literal["quick", "standard", "full"]
PRESETS: tuple[Preset, ...] = ("quick", "standard", "full")
"""Each measures what those before it measure, and more."""


@dataclass(frozen=True)
class Measurement:
    """What a metric found."""

    values: Array
    """In full, for paired statistics; the metric's docstring gives the shape."""
    summary: Any
    """For the reader: numbers, texts, and lists and mappings of them, ready for JSON. A figure that does not exist is None."""


Function = TypeVar("Function", bound=Callable[..., Measurement])


@dataclass(frozen=True)
class Metric:
    """A measurement of a Perturbable."""

    function: Callable[..., Measurement]
    preset: Preset
    """The smallest preset that holds it."""
    needs: tuple[str, ...]
    """Arguments beside the Perturbable that have no default: of `base` and `others`."""


METRICS: dict[str, Metric] = {}


def metric(name: str, *, preset: Preset, needs: tuple[str, ...] = ()) -> Callable[[Function], Function]:
    """Register a function (probe, **needs, **options with defaults) → Measurement under a name."""

    def register(function: Function) -> Function:
        METRICS[name] = Metric(function, preset, needs)
        return function

    return register


def preset_metrics(preset: Preset) -> list[str]:
    """Names of the metrics of a preset."""
    return [name for name, metric in METRICS.items() if PRESETS.index(metric.preset) <= PRESETS.index(preset)]
