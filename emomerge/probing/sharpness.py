"""Average-case sharpness: how much the loss rises, in the mean, when the weights are shaken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from emomerge.probing.perturb import Move, Perturbable


def center(probe: Perturbable) -> NDArray[np.float64]:
    """Loss at the model itself, (units,): every group of rows of every batch."""
    return np.concatenate([_at_center(probe, batch)["loss"] for batch in range(len(probe.batches))])


def weights(probe: Perturbable) -> NDArray[np.float64]:
    """Weight of every unit, summing to one, (units,)."""
    found = np.concatenate([_at_center(probe, batch)["weight"] for batch in range(len(probe.batches))])
    total: float = found.sum()
    return found / total


def gaussian(
    probe: Perturbable,
    radii: Sequence[float] = (0.01, 0.03, 0.1),
    directions: int = 16,
    on_direction: Callable[[int], None] = lambda number: None,
) -> NDArray[np.float64]:
    """Antithetic average-case sharpness [L(θ+sδ) + L(θ−sδ)]/2 − L(θ) in the base-RMS ball.

    The pair cancels the first-order term, which at a point that is no minimum would drown the curvature. A divergence
    is kept as NaN or infinity, never imputed. Cost: 2 · radii · directions · batches forward passes.

    Args:
        probe: the model.
        radii: s, as fractions of the base's RMS per tensor.
        directions: how many Gaussian directions δ.
        on_direction: called with the number of each direction when it is done.

    Returns:
        (radii, directions, units), in nats.
    """
    middle = [np.array(_at_center(probe, batch)["loss"]) for batch in range(len(probe.batches))]
    found: list[list[NDArray[np.float64]]] = [[] for _ in radii]
    with probe.moved() as move:
        for number in range(directions):
            direction = cache(partial(probe.direction, number))  # drawn only if some row of it is not known yet
            for r, radius in enumerate(radii):
                units = []
                for batch in range(len(probe.batches)):
                    evaluate = partial(_both_sides, probe, move, direction, radius, batch)
                    row = probe.ledger.ask(evaluate, **key(probe, "gaussian", radius, number, batch))
                    units.append((np.array(row["up"]) + np.array(row["down"])) / 2 - middle[batch])
                found[r].append(np.concatenate(units))
            on_direction(number)
    return np.array(found)


def _both_sides(
    probe: Perturbable, move: Move, direction: Callable[[], Mapping[str, Tensor]], radius: float, batch: int
) -> dict[str, list[float]]:
    move(direction(), radius)
    up, _ = probe.evaluate(batch)
    move(direction(), -radius)
    down, _ = probe.evaluate(batch)
    return {"up": up, "down": down}


def summary(values: NDArray[np.float64], weight: NDArray[np.float64]) -> dict[str, Any]:
    """Mean over directions of the weighted sharpness, its standard error, and how many directions there were.

    Args:
        values: (directions, units).
        weight: (units,), summing to one.
    """
    per_direction = values @ weight
    if not np.isfinite(per_direction).all():
        return {"mean": None, "stderr": None, "n": len(per_direction)}
    error = float(per_direction.std(ddof=1) / np.sqrt(len(per_direction))) if len(per_direction) > 1 else None
    return {"mean": float(per_direction.mean()), "stderr": error, "n": len(per_direction)}


def _at_center(probe: Perturbable, batch: int) -> dict[str, Any]:
    def evaluate() -> dict[str, list[float]]:
        training = probe.model.training
        probe.model.eval()
        loss, weight = probe.evaluate(batch)
        probe.model.train(training)
        return {"loss": loss, "weight": weight}

    return probe.ledger.ask(evaluate, **key(probe, "loss", 0.0, None, batch))


def key(probe: Perturbable, metric: str, radius: float, direction: int | None, batch: int) -> dict[str, Any]:
    """The ledger's key of one evaluation."""
    return {
        "model": probe.model_hash, "data": probe.data_hash, "metric": metric,
        "radius": radius, "direction": direction, "batch": batch,
    }  # fmt: skip
