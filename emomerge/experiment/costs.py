"""What artefacts cost to make: the training of everything that they were made of or chosen from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Cost(NamedTuple):
    """The cost of training."""

    examples: int
    """Rows passed forward and backward: steps × rows of a step."""
    cpu_seconds: float | None
    """CPU time of all threads; None if it is unknown, as for runs of earlier versions."""


def total(costs: Iterable[Cost]) -> Cost:
    """Return the sum of costs."""
    every = list(costs)
    seconds = [cost.cpu_seconds for cost in every if cost.cpu_seconds is not None]
    return Cost(sum(cost.examples for cost in every), sum(seconds) if len(seconds) == len(every) else None)
