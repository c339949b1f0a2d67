"""Losses of single rows for the example results."""

from __future__ import annotations

import numpy as np

from emomerge.results import HeldOut, Results

UNITS = 60


def with_losses(results: Results, shift: float, *, noise: float = 0.01, rows: str = "r", labels: str | None = "l", **update):
    """The results with losses of single rows: a common difficulty of the rows, an own noise, and a shift of every model."""
    hard = np.random.default_rng(0).exponential(0.3, UNITS)
    rng = np.random.default_rng(round(shift * 1e6) + 1)
    losses = {}
    for artefact in results.artefacts:
        own = hard + (artefact.loss("test") or 0) + shift + noise * rng.standard_normal(UNITS)
        losses[artefact.name] = tuple(own.tolist())
    weights = tuple(float(1 + unit % 3) for unit in range(UNITS))
    return results.model_copy(update={"held_out": HeldOut(rows=rows, labels=labels, weights=weights, losses=losses), **update})
