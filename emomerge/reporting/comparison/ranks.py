"""Ranks with intervals, from paired differences of losses on the same rows.

The intervals of all pairwise differences hold together with 95 % probability: their half-width is c·s, with s the bootstrap's
standard deviation of a difference, and c the 95 % quantile of the largest |difference − estimate|/s over all pairs. A model's
rank is at best 1 + the number of models that are lower beyond doubt, and at worst the number of models less those that are
higher beyond doubt (Mogstad, Romano, Shaikh and Wilhelm 2024, "Inference for ranks").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
DRAWS = 2000


@dataclass(frozen=True)
class Ranking:
    """Models in the order that they were given in.

    Attributes:
        mean: (models,) weighted mean losses.
        rank: (models,) by mean loss, from 1; equal losses share a rank.
        low, high: (models,) bounds of the ranks' intervals.
        half: (models, models) half-widths of the intervals of pairwise differences.
    """

    mean: Array
    rank: NDArray[np.int64]
    low: NDArray[np.int64]
    high: NDArray[np.int64]
    half: Array

    def difference(self, model: int, other: int) -> tuple[float, float, float]:
        """Return the mean loss of a model minus that of another, and the bounds of its interval."""
        estimate, half = float(self.mean[model] - self.mean[other]), float(self.half[model, other])
        return estimate, estimate - half, estimate + half


def rank_models(losses: Sequence[Sequence[float]], weights: Sequence[float]) -> Ranking:
    """Rank models by mean loss.

    Args:
        losses: (models, units) finite mean losses of the same groups of rows.
        weights: (units,).
    """
    table, weight = np.asarray(losses, float), np.asarray(weights, float)
    models, units = table.shape
    rng = np.random.default_rng(20240229)
    drawn = rng.multinomial(units, np.full(units, 1 / units), DRAWS) * weight
    drawn /= drawn.sum(axis=1, keepdims=True)
    mean = table @ weight / weight.sum()
    noise = drawn @ table.T - mean  # (draws, models)
    covariance = noise.T @ noise / DRAWS
    variance = np.maximum(covariance.diagonal()[:, None] + covariance.diagonal() - 2 * covariance, 0)
    spread = np.sqrt(np.where(variance < 1e-24 * max(float(np.abs(mean).max()) ** 2, 1e-300), 0, variance))
    largest = np.zeros(DRAWS)
    for model in range(models):
        found = np.abs(noise[:, model : model + 1] - noise)
        with np.errstate(divide="ignore", invalid="ignore"):
            largest = np.maximum(largest, np.where(spread[model] > 0, found / spread[model], 0).max(axis=1))
    half = _student(float(np.quantile(largest, 0.95)), float(weight.sum() ** 2 / (weight**2).sum())) * spread
    if units == 1:
        half = np.full_like(half, np.inf)
    difference = mean[:, None] - mean
    higher = ((difference - half) > 0).sum(axis=1)  # how many others are lower beyond doubt
    lower = ((difference + half) < 0).sum(axis=1)
    rank = 1 + (difference > 0).sum(axis=1)
    return Ranking(mean, rank, 1 + higher, models - lower, half)


def _student(z: float, n: float) -> float:
    """Return √(n/(n−1)) times the quantile of Student's t with n − 1 degrees of freedom where the normal one is z.

    A bootstrap of n units is too sure of itself (Hesterberg 2015). The expansion is that of Cornish and Fisher.
    """
    v = max(n - 1, 1.0)
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    return float(np.sqrt(n / v)) * t
