"""Reference implementations of the merge methods as published: slow, without pieces, passes or lazy evaluation.

`taus` are the task vectors (runs, d) of all tensors, concatenated. The tests require the streaming methods to match these
bit for bit.
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
    """Σ_t w_t τ_t / N, for weights with a mean of 1."""
    return total(weights[:, None] * taus) / len(taus)


def trim(taus: Tensor, density: float) -> Tensor:
    """The elements of each run whose magnitude is at least its (d − ⌊d·K⌋)-th smallest; zero elsewhere."""
    d = taus.shape[1]
    k = d - int(d * density)
    rows = []
    for tau in taus:
        threshold = tau.abs().kthvalue(k).values if k > 0 else 0.0
        rows.append(torch.where(tau.abs() >= threshold, tau, 0))
    return torch.stack(rows)


def elect(trimmed: Tensor) -> Tensor:
    """The sign of Σ τ̂_t (d,); where this is zero, the sign of the sum of all signs; minus where that is zero too."""
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


# From here on, `taus` (runs, *shape) are the task vectors of one tensor.


def top(tau: Tensor, count: int) -> Tensor:
    """The `count` elements of largest magnitude, the first ones in case of ties; zero elsewhere."""
    order = tau.flatten().abs().sort(descending=True, stable=True).indices
    kept = torch.zeros_like(tau.flatten())
    kept[order[:count]] = tau.flatten()[order[:count]]
    return kept.view_as(tau)


def consensus(
    kept: Tensor,
    weights: Tensor,
    elect: Literal["sum", "weighted", "count"] = "sum",
    aggregate: Literal["mean", "count", "sum", "max"] = "mean",
) -> Tensor:
    """The merge of the elements that have the elected sign (plus where the election is a draw)."""
    w = weights.view(-1, *[1] * (kept.ndim - 1))
    votes = {"sum": kept, "weighted": w * kept, "count": kept.sign()}[elect]
    agree = votes.sign() == torch.where(total(votes) >= 0, 1, -1)
    chosen = torch.where(agree, w * kept, 0)
    if aggregate == "max":
        return chosen.gather(0, chosen.abs().max(dim=0, keepdim=True).indices)[0]
    s = total(chosen)
    share = {"mean": total(torch.where(agree, w, 0)), "count": total(agree.to(s)), "sum": torch.ones_like(s)}[aggregate]
    return s / torch.where(share == 0, 1, share)


def kept_at_random(taus: Tensor, chances: Tensor, density: float) -> Tensor:
    """DARE: τ_t/K where a uniform random number in [0, 1) is below the density K; zero elsewhere."""
    return torch.where(chances < density, taus, 0) / density


def magprune(tau: Tensor, chances: Tensor, density: float, epsilon: float) -> Tensor:
    """DELLA: row by row, element by element; the probability grows linearly with the rank."""
    rows, out = (tau if tau.ndim > 1 else tau.view(1, -1)).flatten(1), []
    for row, chance in zip(rows, chances.reshape(rows.shape), strict=True):
        order = row.abs().argsort(stable=True).tolist()
        for i in range(len(row)):
            height = row.new_tensor(order.index(i)) / (len(row) - 1) if len(row) > 1 else 0.5
            p = (density - epsilon) + height * (2 * epsilon)
            out.append(row[i] / p if chance[i] < p else row[i] * 0)
    return torch.stack(out).view_as(tau)


def breadcrumbs(tau: Tensor, density: float, gamma: float) -> Tensor:
    """The ⌊K·n⌋ elements that precede the ⌊γ·n⌋ largest in ascending order, or as many of these as are needed."""
    n = tau.numel()
    count, top_count = int(density * n), int(gamma * n)
    first = min(n, count + top_count)
    return top(tau, first) - top(tau, first - count)


def sce(taus: Tensor, density: float) -> Tensor:
    """Select by variance, calculate weights by energy, erase minority signs."""
    mean = total(taus) / len(taus)
    variance = total((taus - mean) ** 2) / len(taus)
    chosen = (
        top(variance, int(int((variance != 0).sum()) * density)) != 0
        if density < 1
        else torch.ones_like(mean, dtype=torch.bool)
    )
    kept = torch.where(chosen, taus, 0)
    energy = kept.double().square().reshape(len(kept), -1).sum(1)
    return consensus(kept, (energy / energy.sum() if energy.any() else torch.ones_like(energy)).to(taus))


def model_stock(taus: Tensor) -> Tensor:
    """t·τ̄ with t of the mean cosine over pairs."""
    n, x = len(taus), taus.double().reshape(len(taus), -1)
    norm = x.norm(dim=1)
    pairs = [(i, j) for i in range(n) for j in range(i)]
    c = sum(float(x[i] @ x[j] / (norm[i] * norm[j])) if norm[i] * norm[j] > 0 else 0.0 for i, j in pairs) / max(len(pairs), 1)
    return n * c / (1 + (n - 1) * c) * taus.double().mean(0) if pairs else taus[0].double()


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """From a (t = 0) to b (t = 1) along the great circle."""
    cosine = (a.double().flatten() @ b.double().flatten() / (a.double().norm() * b.double().norm())).clamp(-1, 1)
    if cosine.abs() > 0.9995:
        return (1 - t) * a.double() + t * b.double()
    angle = cosine.acos()
    merged: Tensor = ((1 - t) * angle).sin() / angle.sin() * a.double() + (t * angle).sin() / angle.sin() * b.double()
    return merged


def karcher(taus: Tensor, weights: Tensor, steps: int = 200) -> Tensor:
    """Follow the weighted mean of the logarithm maps until it vanishes; then as long as the points are on average."""
    x, w = taus.double().reshape(len(taus), -1), weights.double() / weights.double().sum()
    norm = x.norm(dim=1, keepdim=True)
    u = x / norm
    m = (w[:, None] * u).sum(0)
    m = m / m.norm()
    for _ in range(steps):
        dots = (u @ m).clamp(-1, 1)
        logs = (dots.acos() / (1 - dots**2).sqrt().clamp(min=1e-12))[:, None] * (u - dots[:, None] * m)
        step = (w[:, None] * logs).sum(0)
        length = step.norm()
        m = length.cos() * m + torch.sinc(length / torch.pi) * step
    merged: Tensor = (w * norm[:, 0]).sum() * m
    return merged.view_as(taus[0])


def multislerp(taus: Tensor, weights: Tensor) -> Tensor:
    """The direction of the weighted mean of directions, at the weighted mean length."""
    x, w = taus.double().reshape(len(taus), -1), weights.double() / weights.double().sum()
    norm = x.norm(dim=1, keepdim=True)
    m = (w[:, None] * x / norm).sum(0)
    merged: Tensor = (w * norm[:, 0]).sum() * m / m.norm()
    return merged.view_as(taus[0])


def fisher(taus: Tensor, information: Tensor, weights: Tensor) -> Tensor:
    """Σ w F τ / Σ w F."""
    w = weights.view(-1, *[1] * (taus.ndim - 1))
    return total(w * information * taus) / total(w * information)


def tsv(taus: Tensor) -> Tensor:
    """Σ over the runs of their first ⌊min(shape)/N⌋ singular triples, whitened by P·Qᵀ of all vectors side by side."""
    k = min(taus.shape[1:]) // len(taus)
    u, s, vh = torch.linalg.svd(taus.double(), full_matrices=False)
    sides = [torch.cat([x[:, :k] for x in side], dim=1) for side in (u, vh.mT)]
    left, right = (p @ qh for p, _, qh in (torch.linalg.svd(side, full_matrices=False) for side in sides))
    merged: Tensor = left @ torch.diag(s[:, :k].flatten()) @ right.mT
    return merged


def iso_c(taus: Tensor) -> Tensor:
    """U·Vᵀ of the sum, times the mean of its singular values."""
    u, s, vh = torch.linalg.svd(total(taus.double()), full_matrices=False)
    merged: Tensor = s.mean() * (u @ vh)
    return merged


def positioning(taus: Tensor, centre: Tensor, hessian: Tensor) -> Tensor:
    """The point of the τ_t's span with the lowest ½(τ − centre)ᵀH(τ − centre): the normal equations of the coefficients."""
    x = taus.double()
    coefficients: Tensor = torch.linalg.solve(x @ hessian.double() @ x.T, x @ hessian.double() @ centre.double())
    return coefficients @ x
