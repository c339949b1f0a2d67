"""The merge methods on flat task vectors, in the order of the papers: slow, without pieces, passes or laziness.

`taus` are the task vectors (runs, d) of all tensors joined end to end. The tests hold the methods that stream equal to
these, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def total(taus: Tensor) -> Tensor:
    """S = Σ_t τ_t."""
    s = torch.zeros_like(taus[0])
    for tau in taus:
        s = s + tau
    return s


def task_arithmetic(taus: Tensor, weights: Tensor) -> Tensor:
    """Σ_t w_t τ_t."""
    return total(weights[:, None] * taus)


def mean(taus: Tensor, weights: Tensor) -> Tensor:
    """Σ_t w_t τ_t / N, the weights having mean 1."""
    return total(weights[:, None] * taus) / len(taus)


def trim(taus: Tensor, density: float) -> Tensor:
    """Every run's elements from its (d − ⌊d·K⌋)-th smallest magnitude on, zero elsewhere."""
    d = taus.shape[1]
    k = d - int(d * density)
    rows = []
    for tau in taus:
        threshold = tau.abs().kthvalue(k).values if k > 0 else 0.0
        rows.append(torch.where(tau.abs() >= threshold, tau, 0))
    return torch.stack(rows)


def elect(trimmed: Tensor) -> Tensor:
    """The sign of Σ τ̂_t (d,); where that is zero, the sign of the sum of all signs; minus where that is zero too."""
    signs = total(trimmed).sign()
    majority = signs.sum().sign()
    signs = torch.where(signs == 0, majority, signs)
    return torch.where(signs > 0, 1, -1)


def ties(trimmed: Tensor, signs: Tensor, aggregate: Literal["mean", "sum"] = "mean") -> Tensor:
    """The mean, or sum, of the trimmed elements that have the elected sign."""
    agree = trimmed.sign() == signs
    s = total(torch.where(agree, trimmed, 0))
    return s / agree.sum(0).clamp(min=1) if aggregate == "mean" else s


def tall_mask(taus: Tensor, r: Tensor, lambdas: Sequence[float], k: int) -> Tensor:
    """R where at least k runs have |τ_t| > λ_t·|R − τ_t|, zero elsewhere."""
    votes = torch.zeros_like(r)
    for tau, lambda_ in zip(taus, lambdas, strict=True):
        votes = votes + (tau.abs() > lambda_ * (r - tau).abs())
    return torch.where(votes >= k, r, 0)
