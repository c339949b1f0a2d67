"""Basin width: how far the weights can be perturbed before the loss rises by a given amount."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from emomerge.probing import report
from emomerge.probing.perturb import Perturbable
from emomerge.probing.registry import Measurement, metric
from emomerge.probing.sharpness import require_resolved


@metric(
    "basin",
    preset="standard",
    split="whole",
    cost=lambda options, batches: options["bisections"] * options["directions"] * batches,
    report=report.basin,
)
def basin(
    probe: Perturbable,
    rise: float = 0.1,
    bounds: tuple[float, float] = (1e-3, 10.0),
    bisections: int = 12,
    directions: int = 8,
) -> Measurement:
    """Measure the basin width: along each Gaussian direction the largest s with L(θ+sδ) − L(θ) ≤ `rise`.

    It is found by bisection of log s, on the assumptions that the loss crosses the level once between the bounds and that
    divergence lies above the level. Cost: bisections · directions · batches forward passes, and those of
    `Perturbable.center_losses` and `Perturbable.is_swappable`.

    Args:
        probe: the model.
        rise: the level, in nats.
        bounds: of s, as fractions of the base's RMS per tensor.
        bisections: number of halvings of log s; 12 over four decades leave a factor of 1.0023.
        directions: number of directions.

    Returns:
        values (directions,): s; the summary: geometric mean, standard error of log s, and how many widths ended at a bound.

    Raises:
        BadInput: the lower bound is too small for the weights' dtype.
    """
    require_resolved(probe, "basin", "base", bounds[:1])
    weight, middle = probe.unit_weights(), probe.center_losses()
    found = []
    with probe.weight_setter() as set_weights:
        for number in range(directions):
            direction = probe.direction(number)
            low, high = bounds
            for _ in range(bisections):
                s = math.sqrt(low * high)
                loss = probe.losses_at(set_weights, "basin", s, number, probe.along(direction, s))
                low, high = (s, high) if float((loss - middle) @ weight) <= rise else (low, s)
            found.append(low)
    logs = np.log(found)
    step = math.log(bounds[1] / bounds[0]) / 2**bisections
    outside = int(((logs < math.log(bounds[0]) + step / 2) | (logs > math.log(bounds[1]) - 1.5 * step)).sum())
    figures: dict[str, Any] = {"width": float(np.exp(logs.mean())), "log_stderr": None, "rise": rise, "n": directions}
    if directions > 1:
        figures["log_stderr"] = float(logs.std(ddof=1) / math.sqrt(directions))
    if outside:
        figures["finding"] = f"{outside} of {directions} widths lie outside {bounds[0]:g} … {bounds[1]:g}"
    return Measurement(np.array(found), figures)
