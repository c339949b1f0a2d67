"""Average-case sharpness: the mean rise of the loss under Gaussian perturbations of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from emomerge.errors import BadInput
from emomerge.probing import report
from emomerge.probing.perturb import Ball, Perturbable, SetWeights, Weights
from emomerge.probing.registry import Array, Measurement, Options, direction_indices, metric

MIN_COSINE = 0.99
"""A perturbation is resolved by the weights' dtype if, after rounding, it keeps this cosine with the intended one."""


def _cost(options: Options, batches: int) -> float:
    return 2 * len(options["radii"]) * len(direction_indices(options["directions"])) * batches


@metric(
    "gaussian",
    preset="quick",
    options=lambda probe: {"radii": probe.radii, "directions": probe.directions},
    split="directions",
    cost=_cost,
    report=report.gaussian,
)
def gaussian(
    probe: Perturbable,
    radii: Sequence[float] = (0.01, 0.03, 0.1),
    directions: int | Sequence[int] = 16,
) -> Measurement:
    """Measure antithetic average-case sharpness, [L(θ+sδ) + L(θ−sδ)]/2 − L(θ), in the base-RMS ball.

    The pair cancels the first-order term, which would hide the curvature wherever the gradient is not zero. Divergence is
    kept as NaN or infinity, never imputed. Cost: 2 · radii · directions · batches forward passes, and those of
    `Perturbable.center_losses` and `Perturbable.is_swappable`.

    Args:
        probe: the model.
        radii: s, as fractions of the base's RMS per tensor.
        directions: number of Gaussian directions δ, or the indices of particular ones.

    Returns:
        values (radii, directions, units) in nats; the summary by radius.

    Raises:
        BadInput: a radius is too small for the weights' dtype.
    """
    return _average(probe, "gaussian", "base", radii, directions)


@metric(
    "adaptive",
    preset="standard",
    options=lambda probe: {"radii": probe.adaptive_radii, "directions": probe.directions},
    split="directions",
    cost=_cost,
    report=report.adaptive,
)
def adaptive(
    probe: Perturbable,
    radii: Sequence[float] = (0.05, 0.1, 0.2),
    directions: int | Sequence[int] = 16,
) -> Measurement:
    """Measure average-case sharpness relative to each weight's own magnitude: `gaussian` with δ = |w| ⊙ z.

    Secondary, because it rewards models with small weights. It is invariant to rescalings of weights that keep the function,
    and a zero weight stays zero. Same cost as `gaussian`.
    """
    return _average(probe, "adaptive", "own", radii, directions)


def _average(
    probe: Perturbable,
    name: str,
    ball: Ball,
    radii: Sequence[float],
    directions: int | Sequence[int],
) -> Measurement:
    middle = probe.center_losses()
    realised = require_resolved(probe, name, ball, radii)
    with probe.weight_setter() as set_weights:
        along = [_along(probe, set_weights, name, ball, radii, number) for number in direction_indices(directions)]
    found = [[both - middle for both in of_radius] for of_radius in zip(*along, strict=True)]
    values, weight = np.array(found), probe.unit_weights()
    by_radius = {
        f"{r:g}": {**summary(v, weight, r), "realised": kept} for r, v, kept in zip(radii, values, realised, strict=True)
    }
    return Measurement(values, by_radius, weight)


def _along(
    probe: Perturbable, set_weights: SetWeights, name: str, ball: Ball, radii: Sequence[float], number: int
) -> list[Array]:
    """Return [L(θ+sδ) + L(θ−sδ)]/2 along one direction for every radius, each (units,)."""
    direction, found = probe.direction(number, ball), []
    for radius in radii:
        keys = [probe.ledger_key(name, radius, number, batch) for batch in range(len(probe.batches))]
        rows = probe.ledger.ask_all(partial(_both_sides, probe, set_weights, direction, radius), keys)
        up, down = (np.concatenate([row[side] for row in rows]) for side in ("up", "down"))
        found.append((up + down) / 2)
    return found


def _both_sides(
    probe: Perturbable, set_weights: SetWeights, direction: Weights, radius: float, batches: Sequence[int]
) -> list[dict[str, list[float]]]:
    sides = []
    for factor in (radius, -radius):
        set_weights(probe.along(direction, factor))
        sides.append([losses for losses, _ in probe.evaluate_all(batches)])
    return [{"up": up, "down": down} for up, down in zip(*sides, strict=True)]


def require_resolved(probe: Perturbable, name: str, ball: Ball, radii: Sequence[float]) -> list[dict[str, float]]:
    """Return what rounding to the weights' dtype leaves of each radius: `norm`, relative to the intended one, and `cosine`.

    Raises:
        BadInput: so little is left that the measurement would be one of rounding errors.
    """

    def evaluate(missing: Sequence[int]) -> list[dict[str, float]]:
        found = probe.realised(probe.direction(0, ball), [radii[position] for position in missing])
        return [{"norm": norm, "cosine": cosine} for norm, cosine in found]

    rows = probe.ledger.ask_all(evaluate, [probe.ledger_key(f"{name} realised", radius, 0, 0) for radius in radii])
    for radius, row in zip(radii, rows, strict=True):
        if not row["cosine"] >= MIN_COSINE:
            dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in probe.parameters.values()})
            raise BadInput(
                "the radius is below what the weights' dtype resolves", where=f"radius {radius:g} in {', '.join(dtypes)}",
                expected=f"a cosine of at least {MIN_COSINE} between the rounded and the intended perturbation",
                found=f"{row['cosine']:.3f}", fix="load the model in float32, or take larger radii",
            )  # fmt: skip
    return [{"norm": row["norm"], "cosine": row["cosine"]} for row in rows]


def summary(values: Array, weight: Array, radius: float) -> dict[str, Any]:
    """Return the mean over directions of the weighted sharpness, its standard error, and the number of directions.

    Args:
        values: (directions, units).
        weight: (units,), summing to one.
        radius: named in a remark on divergence.
    """
    per_direction = values @ weight
    diverged = int((~np.isfinite(per_direction)).sum())
    if diverged:
        finding = f"diverged at radius {radius:g} in {diverged} of {len(per_direction)} directions"
        return {"mean": None, "stderr": None, "n": len(per_direction), "finding": finding}
    error = float(per_direction.std(ddof=1) / np.sqrt(len(per_direction))) if len(per_direction) > 1 else None
    return {"mean": float(per_direction.mean()), "stderr": error, "n": len(per_direction)}
