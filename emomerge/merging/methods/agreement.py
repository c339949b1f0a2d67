"""Weights by agreement: the nearer a run points to the mean of the others, the more it counts.

The runs of one task share what the data ask for and differ by the noise of their optimizers and batches, so that a run that
points away from the others carries mostly noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emomerge.merging.registry import merge_method, provides
from emomerge.merging.vectors import TaskVectors
from emomerge.numerics.sums import weighted_sum

CANCELLED = 1e-12
"""The sum of the other runs counts as zero below this share of Σ_t ‖τ_t‖²: what is left of it is rounding."""


@provides("shares")
def agreement_shares(vectors: TaskVectors) -> dict[str, Any]:
    """Return each run's share of max(0, cos(τ_t, Σ_{s≠t} τ_s)); equal shares if no run agrees with the others."""
    g = vectors.inner_products()
    own, others = g.diagonal(), g.sum(dim=1) - g.diagonal()
    squared = g.sum() - own - 2 * others  # ‖Σ_{s≠t} τ_s‖²
    cancelled = squared <= CANCELLED * own.sum()
    cosines = torch.where(cancelled | (own == 0), 0, others / (squared.clamp(min=0) * own).sqrt())
    agreed: list[float] = cosines.clamp(min=0).tolist()
    whole = sum(agreed)
    return {"shares": tuple(cosine / whole if whole > 0 else 1 / len(agreed) for cosine in agreed)}


@merge_method("agreement", source="emomerge", elementwise=True, first_pass=agreement_shares)
def agreement(deltas: Tensor, *, shares: tuple[float, ...]) -> Tensor:
    """Σ_t w_t τ_t, w_t ∝ max(0, cos(τ_t, Σ_{s≠t} τ_s)) over all tensors, Σ_t w_t = 1."""
    return weighted_sum(deltas, shares)
