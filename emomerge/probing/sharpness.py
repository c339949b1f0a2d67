"""Average-case sharpness: how much the loss rises, in the mean, when the weights are shaken; and how far they can be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from emomerge.errors import BadInput
from emomerge.probing.perturb import Ball, Perturbable, Place, Weights
from emomerge.probing.registry import Array, Measurement, metric

RESOLVED = 0.99
"""A perturbation counts as resolved by the weights' dtype if rounding leaves this cosine with what was intended."""


def center(probe: Perturbable) -> Array:
    """Loss at the model itself, (units,): every group of rows of every batch."""
    return np.concatenate([_at_center(probe, batch)["loss"] for batch in range(len(probe.batches))])


def weights(probe: Perturbable) -> Array:
    """Weight of every unit, summing to one, (units,)."""
    found = np.concatenate([_at_center(probe, batch)["weight"] for batch in range(len(probe.batches))])
    total: float = found.sum()
    return found / total


@metric("gaussian", preset="quick")
def gaussian(
    probe: Perturbable,
    radii: Sequence[float] = (0.01, 0.03, 0.1),
    directions: int | Sequence[int] = 16,
    on_direction: Callable[[int], None] = lambda number: None,
) -> Measurement:
    """Antithetic average-case sharpness [L(θ+sδ) + L(θ−sδ)]/2 − L(θ) in the base-RMS ball.

    The pair cancels the first-order term, which at a point that is no minimum would drown the curvature. A divergence
    is kept as NaN or infinity, never imputed. Cost: 2 · radii · directions · batches forward passes, and those of
    `center` and `Perturbable.is_swappable`.

    Args:
        probe: the model.
        radii: s, as fractions of the base's RMS per tensor.
        directions: how many Gaussian directions δ, or the numbers of those that are wanted.
        on_direction: called with the number of each direction when it is done.

    Returns:
        values (radii, directions, units), in nats; the summary by radius.

    Raises:
        BadInput: a radius is below what the weights' dtype resolves.
    """
    return _average(probe, "gaussian", "base", radii, directions, on_direction)


@metric("adaptive", preset="standard")
def adaptive(
    probe: Perturbable,
    radii: Sequence[float] = (0.05, 0.1, 0.2),
    directions: int | Sequence[int] = 16,
    on_direction: Callable[[int], None] = lambda number: None,
) -> Measurement:
    """`gaussian` in the ball of each weight's own size: δ = |w| ⊙ z. Secondary: it rewards models whose weights are small.

    It is invariant to scalings of weights that keep the function, and a zero weight stays zero. Costs what `gaussian` does.
    """
    return _average(probe, "adaptive", "own", radii, directions, on_direction)


def _average(
    probe: Perturbable,
    name: str,
    ball: Ball,
    radii: Sequence[float],
    directions: int | Sequence[int],
    on_direction: Callable[[int], None],
) -> Measurement:
    middle = [np.array(_at_center(probe, batch)["loss"]) for batch in range(len(probe.batches))]
    realised = [require_resolved(probe, name, ball, radius) for radius in radii]
    found: list[list[Array]] = [[] for _ in radii]
    with probe.placed() as place:
        for number in range(directions) if isinstance(directions, int) else directions:
            direction = probe.direction(number, ball)
            for r, radius in enumerate(radii):
                units = []
                for batch in range(len(probe.batches)):
                    evaluate = partial(_both_sides, probe, place, direction, radius, batch)
                    row = probe.ledger.ask(evaluate, **key(probe, name, radius, number, batch))
                    units.append((np.array(row["up"]) + np.array(row["down"])) / 2 - middle[batch])
                found[r].append(np.concatenate(units))
            on_direction(number)
    values, weight = np.array(found), weights(probe)
    return Measurement(
        values, {f"{r:g}": {**summary(v, weight, r), "realised": e} for r, v, e in zip(radii, values, realised, strict=True)}
    )


def _both_sides(probe: Perturbable, place: Place, direction: Weights, radius: float, batch: int) -> dict[str, list[float]]:
    place(probe.along(direction, radius))
    up, _ = probe.evaluate(batch)
    place(probe.along(direction, -radius))
    down, _ = probe.evaluate(batch)
    return {"up": up, "down": down}


def require_resolved(probe: Perturbable, name: str, ball: Ball, radius: float) -> dict[str, float]:
    """What rounding to the weights' dtype leaves of a radius: `norm`, a fraction of the intended one, and `cosine` with it.

    Raises:
        BadInput: so little that the figure would be about rounding.
    """

    def evaluate() -> dict[str, float]:
        norm, cosine = probe.realised(probe.direction(0, ball), radius)
        return {"norm": norm, "cosine": cosine}

    row = probe.ledger.ask(evaluate, **key(probe, f"{name} realised", radius, 0, 0))
    if not row["cosine"] >= RESOLVED:
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in probe.parameters.values()})
        raise BadInput(
            "the radius is below what the weights' dtype resolves", where=f"radius {radius:g} in {', '.join(dtypes)}",
            expected=f"a cosine of at least {RESOLVED} between the rounded and the intended perturbation",
            found=f"{row['cosine']:.3f}", fix="load the model in float32, or take larger radii",
        )  # fmt: skip
    return {"norm": row["norm"], "cosine": row["cosine"]}


def summary(values: Array, weight: Array, radius: float) -> dict[str, Any]:
    """Mean over directions of the weighted sharpness, its standard error, and how many directions there were.

    Args:
        values: (directions, units).
        weight: (units,), summing to one.
        radius: names the place of a divergence.
    """
    per_direction = values @ weight
    diverged = int((~np.isfinite(per_direction)).sum())
    if diverged:
        finding = f"diverged at radius {radius:g} in {diverged} of {len(per_direction)} directions"
        return {"mean": None, "stderr": None, "n": len(per_direction), "finding": finding}
    error = float(per_direction.std(ddof=1) / np.sqrt(len(per_direction))) if len(per_direction) > 1 else None
    return {"mean": float(per_direction.mean()), "stderr": error, "n": len(per_direction)}


@metric("basin", preset="standard")
def basin(
    probe: Perturbable,
    rise: float = 0.1,
    bounds: tuple[float, float] = (1e-3, 10.0),
    bisections: int = 12,
    directions: int = 8,
) -> Measurement:
    """Basin width: along each Gaussian direction the largest s with L(θ+sδ) − L(θ) ≤ `rise`, by bisection of log s.

    The loss is taken to cross the level once between the bounds, and a divergence to lie above it. Cost: bisections ·
    directions · batches forward passes, and those of `center` and `is_swappable`.

    Args:
        probe: the model.
        rise: the level, in nats.
        bounds: of s, as fractions of the base's RMS per tensor.
        bisections: each halves log s; 12 of four decades leave a factor of 1.0023.
        directions: how many.

    Returns:
        values (directions,): s; the summary: mean and standard error of log s, its bounds, and how many ended at one.

    Raises:
        BadInput: the lower bound is below what the weights' dtype resolves.
    """
    require_resolved(probe, "basin", "base", bounds[0])
    weight, middle = weights(probe), center(probe)
    found = []
    with probe.placed() as place:
        for number in range(directions):
            direction = probe.direction(number)
            low, high = bounds
            for _ in range(bisections):
                s = math.sqrt(low * high)
                loss = losses(probe, place, "basin", s, number, probe.along(direction, s))
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


def losses(probe: Perturbable, place: Place, metric: str, radius: float, number: int | None, there: Weights) -> Array:
    """Loss at other weights, (units,): one ledger row a batch."""
    found = []
    for batch in range(len(probe.batches)):

        def evaluate(batch: int = batch) -> dict[str, list[float]]:
            place(there)
            return {"loss": probe.evaluate(batch)[0]}

        found.append(probe.ledger.ask(evaluate, **key(probe, metric, radius, number, batch))["loss"])
    return np.concatenate(found)


def _at_center(probe: Perturbable, batch: int) -> dict[str, Any]:
    def evaluate() -> dict[str, list[float]]:
        with probe.evaluating():
            loss, weight = probe.evaluate(batch)
        return {"loss": loss, "weight": weight}

    return probe.ledger.ask(evaluate, **key(probe, "loss", 0.0, None, batch))


def key(probe: Perturbable, metric: str, radius: float, direction: int | None, batch: int) -> dict[str, Any]:
    """The ledger's key of one evaluation."""
    return {
        "model": probe.model_hash, "data": probe.data_hash, "metric": metric,
        "radius": radius, "direction": direction, "batch": batch,
    }  # fmt: skip
