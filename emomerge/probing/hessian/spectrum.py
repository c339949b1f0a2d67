"""Stochastic Lanczos: extreme eigenvalues of the Hessian, its spectral density, and a sketch for the trace, from one run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from emomerge.probing.hessian.product import Array, Curvature, Method, curvature
from emomerge.probing.hessian.vectors import combine, norm, project_out
from emomerge.probing.perturb import Perturbable

Ends = Literal["both", "largest"]
CLUSTER = 30.0
"""One eigenvector holds about 1/size of the square of a random vector; a Ritz value with this many times that share stands
for a cluster of eigenvalues."""


@dataclass(frozen=True)
class Extreme:
    """An extreme eigenvalue: the Rayleigh quotient uᵀHu of its Ritz vector, ‖u‖ = 1."""

    value: float
    residual: float
    """‖Hu − value·u‖: an eigenvalue lies this near, up to errors of the products; always λmax ≥ value ≥ λmin."""
    units: tuple[float, ...]
    """uᵀH_b·u of every batch; their weighted mean is `value`. To first order the eigenvalue changes like this mean when batches
    are resampled, which allows paired comparisons of models."""


@dataclass(frozen=True)
class Lanczos:
    """A Lanczos run from one random vector."""

    name: str
    """Its name in the ledger."""
    alpha: tuple[float, ...]
    """Diagonal of the tridiagonal T = QᵀHQ."""
    beta: tuple[float, ...]
    """Off-diagonal of T; the last entry is the norm of the residual that the next step would start from."""
    largest: Extreme
    smallest: Extreme | None
    weight: tuple[float, ...]
    """Weights of the batches, summing to one."""
    step: float
    """ε that λmax was measured with."""
    disagreement: float | None
    """See `Curvature`."""
    trace_units: tuple[float, ...]
    """tr(QᵀH_bQ) of every batch."""
    trace_tensors: Mapping[str, float]
    """Parameter name → its part of the trace in the span of Q; they add up to tr T."""
    basis: Callable[[], list[Tensor]] = field(repr=False, compare=False)
    """Returns the orthonormal Q, rows (size,); computes it again if the run came from a ledger."""

    def quadrature(self) -> tuple[Array, Array]:
        """Return nodes θ and weights (steps,) of Gauss quadrature: Σ w_i·f(θ_i) ≈ tr f(H)/size (Golub and Welsch 1969)."""
        nodes, vectors = _ritz(self.alpha, self.beta)
        return nodes, vectors[0] ** 2

    def summary(self) -> dict[str, Any]:
        """Return λmax, λmin, their residuals, and how they were measured."""
        ends = {"largest": self.largest, "smallest": self.smallest}
        return {
            **{name: finite(end.value) for name, end in ends.items() if end},
            **{f"{name}_residual": finite(end.residual) for name, end in ends.items() if end},
            "steps": len(self.alpha), "step": self.step, "disagreement": self.disagreement,
        }  # fmt: skip


def lanczos(
    probe: Perturbable,
    steps: int = 30,
    *,
    number: int = 0,
    tolerance: float = 0.0,
    ends: Ends = "both",
    hvp: Method = "finite-difference",
    only: Sequence[str] | None = None,
) -> Lanczos:
    """Run Lanczos' method with full reorthogonalisation, for λmax, λmin and the spectral density. One ledger row.

    T is computed by one-sided differences (see `Curvature.shorten`), whose error only tilts its Ritz vectors. λmax and λmin
    are Rayleigh quotients of central differences at the Ritz vectors, with an error of second order in the tilt. They use
    twice the ε of T and have to agree with T.

    Cost in gradients of all batches: `steps` + 1 + 2 for each end, or up to 10 if its ε has to be halved; `autograd`: a
    product for each step and each end.
    Memory: `steps` + 1 vectors of the parameters' size, and a gradient for every batch; fewer steps or `only` reduce it.

    Args:
        probe: the model.
        steps: maximum number of Lanczos steps.
        number: index of the random vector to start from; several make the density smoother.
        tolerance: stop as soon as the error of the wanted ends is below this share of max |λ| and none of them stands for a
            cluster of eigenvalues (such as the many near 0, beyond which λmin may still hide). The error is the smaller of
            the residual r and r²/gap (Kato 1949), the gap being that to the next Ritz value less its residual. 0: take all
            steps.
        ends: which ends are wanted; `largest` saves the product for λmin.
        hvp: how Hessian-vector products are computed.
        only: names of parameters; the run is on their diagonal block.

    Raises:
        BadInput: no parameters, or `autograd` where the model has no double backward.
    """

    @cache
    def run() -> tuple[dict[str, Any], list[Tensor]]:
        with curvature(probe, hvp, only) as matrix:
            return _run(matrix, steps, number, tolerance, ends)

    block = "" if only is None else f" of {' '.join(sorted(only))}"
    metric = f"krylov {hvp} {steps} {tolerance:g} {ends}{block}"
    row = probe.ledger.ask(lambda: run()[0], **probe.ledger_key(metric, 0.0, number, 0))
    return Lanczos(
        name=f"{metric} #{number}", alpha=tuple(row["alpha"]), beta=tuple(row["beta"]),
        largest=_extreme(row["largest"]), smallest=row["smallest"] and _extreme(row["smallest"]),
        weight=tuple(row["weight"]), step=row["step"], disagreement=row["disagreement"],
        trace_units=tuple(row["trace_units"]), trace_tensors=row["trace_tensors"], basis=lambda: run()[1],
    )  # fmt: skip


def by_module(names: Sequence[str]) -> dict[str, list[str]]:
    """Return module name → names of its parameters."""
    modules: dict[str, list[str]] = {}
    for name in names:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    return modules


def blockwise(
    probe: Perturbable, steps: int = 30, *, tolerance: float = 0.05, hvp: Method = "finite-difference"
) -> dict[str, Lanczos]:
    """Return module name → Lanczos run on its diagonal block of the Hessian. Cost: a `lanczos` per module, for λmax only."""
    return {
        module: lanczos(probe, steps, tolerance=tolerance, ends="largest", hvp=hvp, only=names)
        for module, names in by_module([*probe.parameters]).items()
    }


def density(runs: Sequence[Lanczos], points: int = 201, width: float = 0.01) -> dict[str, list[float]] | None:
    """Return the spectral density as a curve: the mean over runs of Gauss quadrature, each node smoothed by a normal density.

    Args:
        runs: runs from different `number`s.
        points: number of points of the curve.
        width: standard deviation of the normal densities, as a fraction of the width of the spectrum.

    Returns:
        `nodes` and `weights` of all runs, weights summing to one; `eigenvalue` and `density` of the curve, of integral one.
        None if a run diverged.
    """
    rules = [run.quadrature() for run in runs]
    nodes, weights = np.concatenate([n for n, _ in rules]), np.concatenate([w for _, w in rules]) / len(rules)
    if not np.isfinite(nodes).all():
        return None
    sigma = width * (np.ptp(nodes) or abs(nodes[0]) or 1.0)
    grid = np.linspace(nodes.min() - 4 * sigma, nodes.max() + 4 * sigma, points)
    curve = np.exp(-(((grid[:, None] - nodes) / sigma) ** 2) / 2) @ weights / (sigma * math.sqrt(2 * math.pi))
    return {"nodes": nodes.tolist(), "weights": weights.tolist(), "eigenvalue": grid.tolist(), "density": curve.tolist()}


def _run(matrix: Curvature, steps: int, number: int, tolerance: float, ends: Ends) -> tuple[dict[str, Any], list[Tensor]]:
    """Return the ledger row, and Q."""
    basis: list[Tensor] = []
    alpha: list[float] = []
    beta: list[float] = []
    lengths: list[float] = []
    units, tensors = np.zeros(len(matrix.probe.batches)), torch.zeros(len(matrix.sizes), dtype=torch.float64)
    residual = matrix.draw("lanczos", number)
    length = norm(residual)
    for _ in range(min(steps, matrix.size)):
        basis.append(residual.div_(length))
        residual, part = matrix.product(basis[-1], basis[-1:], one_sided=True)
        alpha.append(float(part[:, 0] @ matrix.weights))
        units += part[:, 0]
        tensors += 2 * matrix.sums(basis[-1], residual)
        lengths.append(norm(residual))
        matrix.shorten(lengths)
        project_out(residual, basis)
        length = norm(residual)
        beta.append(length)
        negligible = torch.finfo(matrix.dtype).eps * max(map(abs, alpha))
        if not length > negligible or (tolerance and _error(alpha, beta, ends, matrix.size) <= tolerance):
            break  # without a tolerance the error may underflow to 0 before the last step
    for j, row in enumerate(_tridiagonal(alpha, beta)):
        near = slice(max(j - 1, 0), j + 2)
        tensors -= matrix.sums(basis[j], combine(basis[near], torch.from_numpy(row[near])))
    smallest = _end(matrix, basis, residual, alpha, beta, 0) if ends == "both" else None
    matrix.shorten(lengths)
    return {
        "alpha": alpha, "beta": beta, "weight": matrix.weights.tolist(),
        "largest": _end(matrix, basis, residual, alpha, beta, -1), "smallest": smallest,
        "step": matrix.step, "disagreement": matrix.disagreement,
        "trace_units": units.tolist(), "trace_tensors": dict(zip(matrix.parameters, tensors.tolist(), strict=True)),
    }, basis  # fmt: skip


def _end(
    matrix: Curvature, basis: Sequence[Tensor], residual: Tensor, alpha: Sequence[float], beta: Sequence[float], index: int
) -> dict[str, Any]:
    nodes, vectors = _ritz(alpha, beta)
    vector = combine(basis, torch.from_numpy(vectors[:, index]))
    vector.div_(norm(vector))
    matrix.step *= 2
    known = vector * float(nodes[index]) + residual * float(vectors[-1, index])
    product, part = matrix.agreed(vector, [vector], scale=float(np.abs(nodes).max()), known=known)
    value = float(part[:, 0] @ matrix.weights)
    return {"value": value, "residual": norm(product.sub_(vector, alpha=value)), "units": part[:, 0].tolist()}


def _extreme(row: Mapping[str, Any]) -> Extreme:
    return Extreme(row["value"], row["residual"], tuple(row["units"]))


def _error(alpha: Sequence[float], beta: Sequence[float], ends: Ends, size: int) -> float:
    """Return the largest error of the wanted ends relative to max |λ|; ∞ while one of them stands for a cluster."""
    nodes, vectors = _ritz(alpha, beta)
    residuals, shares = beta[-1] * np.abs(vectors[-1]), vectors[0] ** 2
    worst = 0.0
    for end, inner in [(-1, -2), (0, 1)][: 2 if ends == "both" else 1]:
        if shares[end] * size > CLUSTER:
            return math.inf
        gap = abs(nodes[end] - nodes[inner]) - residuals[inner] if len(nodes) > 1 else 0.0
        worst = max(worst, residuals[end] * min(1.0, residuals[end] / gap if gap > 0 else 1.0))
    return float(worst / np.abs(nodes).max())


def _ritz(alpha: Sequence[float], beta: Sequence[float]) -> tuple[Array, Array]:
    """Return eigenvalues (steps,), ascending, and eigenvectors (steps, steps) of T; NaN if T is not finite."""
    matrix = _tridiagonal(alpha, beta)
    if not np.isfinite(matrix).all():
        return np.full(len(alpha), np.nan), np.full(matrix.shape, np.nan)
    values, vectors = np.linalg.eigh(matrix)
    return values, vectors


def _tridiagonal(alpha: Sequence[float], beta: Sequence[float]) -> Array:
    beside = beta[: len(alpha) - 1]
    return np.diag(alpha) + np.diag(beside, 1) + np.diag(beside, -1)


def finite(value: float) -> float | None:
    """Return the value, or None if it diverged."""
    return value if math.isfinite(value) else None
