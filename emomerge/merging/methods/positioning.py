"""Multiple positioning: treat the runs as positions around one minimum and search for it in the space that they span.

    θ = θ₀ + Σ_t c_t τ_t,  c = argmin L(c),  L the held-out loss

L is a black box that can be evaluated a few dozen times. Its gradient and Hessian in the span come from a quadratic fitted
to the measured losses within a trust region (Powell 2006; Conn, Gould and Toint 2000, chapter 9). The fit uses coordinates
u in which distances are distances between weights; otherwise long task vectors, and runs that agree, would mask the
differences between the others:

    c = c₀ + Bu,  BᵀGB = l²·I,  G = [⟨τ_s, τ_t⟩],  c₀ the best start, l = ‖Σ_t c₀_t τ_t‖

Five coefficients can overfit: with fewer than about 500 validation rows the merge may be worse on new data than its best
run (benchmarks/multi_positioning.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from emomerge.merging.native import StoredTensor
from emomerge.merging.registry import merge_method, provides
from emomerge.merging.vectors import TaskVectors
from emomerge.numerics.sums import weighted_sum
from emomerge.numerics.threads import one_thread

if TYPE_CHECKING:
    from emomerge.merging.diagnostics import Figures

Evaluations = Annotated[int, Field(ge=0, description="held-out losses to measure at most, beyond those of the runs")]

RADIUS = 0.2
"""Initial radius of the trust region, in units of the length of the start's task vector."""
COLLINEAR = 1e-4
"""Directions with a smaller share of the start's energy are dropped: coefficients in the hundreds would amplify rounding."""
RIDGE = 1e-3
"""Ridge on the Hessian of the fit: directions without evidence of curvature count as flat."""
MIN_GAIN = 2e-3
"""Smallest predicted gain, as a share of the loss, that is worth another evaluation: less is lost in what validation rows
differ from others (benchmarks/multi_positioning.py)."""


class Quadratic(NamedTuple):
    """m(u) = m(0) + gᵀu + ½uᵀHu."""

    g: Tensor
    h: Tensor

    def gain(self, u: Tensor) -> float:
        """m(0) − m(u)."""
        return -float(self.g @ u + u @ self.h @ u / 2)


class Search:
    """The coefficients whose loss is known, and a function that measures further ones."""

    def __init__(self, loss: Callable[[Tensor], float]) -> None:
        self.loss = loss
        self.points: list[Tensor] = []
        self.losses: list[float] = []

    def record(self, c: Tensor, loss: float) -> None:
        """Record the loss at coefficients."""
        self.points.append(c)
        self.losses.append(loss)

    def measure(self, c: Tensor) -> float:
        """Measure, record and return the loss at coefficients."""
        self.record(c, self.loss(c))
        return self.losses[-1]

    @property
    def lowest(self) -> float:
        """The lowest loss so far."""
        return min(self.losses)

    @property
    def best(self) -> Tensor:
        """The coefficients with the lowest loss, the first ones in case of ties."""
        return self.points[self.losses.index(self.lowest)]


@provides("coefficients", "start", "measured_loss", "evaluations_used", "predicted_loss")
def choose_coefficients(vectors: TaskVectors, *, evaluations: Evaluations = 40) -> dict[str, Any]:
    """Search for the c with the lowest held-out loss, starting from the best run, or from the mean if that is better.

    Args:
        vectors: the runs' task vectors.
        evaluations: held-out losses to measure at most, beyond those of the runs and of the mean.

    Returns:
        dict: `coefficients` of the runs; `start`, a run or "mean"; `measured_loss` of the coefficients, and their
        `predicted_loss`, None if no quadratic led there; `evaluations_used`, beyond those of the runs.

    Raises:
        BadInput: there is no held-out loss, or that of a run is not finite.
    """
    known, runs = vectors.run_losses("positioning"), len(vectors)

    def loss(c: Tensor) -> float:
        coefficients = tuple(c.tolist())
        rule, weights = partial(_sum, coefficients), dict(enumerate(coefficients))
        return vectors.loss_of(rule, "positioning", weights=weights)

    search = Search(loss)
    for c, run_loss in zip(torch.eye(runs, dtype=torch.float64), known, strict=True):
        search.record(c, run_loss)
    if runs > 1:
        search.measure(torch.full((runs,), 1 / runs, dtype=torch.float64))
    start = (*vectors.labels, "mean")[search.losses.index(search.lowest)]
    predicted = descend(search, axes(vectors.inner_products(), search.best), evaluations)
    found = {"coefficients": tuple(search.best.tolist()), "start": start, "measured_loss": search.lowest}
    return {**found, "evaluations_used": len(search.losses) - runs, "predicted_loss": predicted}


def _sum(coefficients: tuple[float, ...], name: str, deltas: Tensor) -> Tensor:
    return positioning(deltas, coefficients=coefficients)


@one_thread()
def axes(g: Tensor, start: Tensor) -> Tensor:
    """Return B (runs, dimensions): orthogonal axes of the span, as long as the start's task vector if that is not zero."""
    energies, directions = torch.linalg.eigh(g)
    energy = float(start @ g @ start) or float(g.diagonal().mean())
    moving = energies > COLLINEAR * energy
    b: Tensor = directions[:, moving] * (energy / energies[moving]).sqrt()
    return b


def descend(search: Search, b: Tensor, evaluations: int, *, min_gain: float = MIN_GAIN) -> float | None:
    """Search for a lower loss: at c₀ ± r·b_i, then, while it pays off, at the quadratic's minimum in ‖u − u_best‖ ≤ r.

    The radius r grows or shrinks depending on how well the gain was predicted.

    Returns:
        float | None: the predicted loss of the best coefficients; None if no quadratic led there.
    """
    radius, predicted, start = RADIUS, None, search.best
    corners = [start + sign * radius * axis for axis in b.T for sign in (1, -1)]
    for corner in corners[:evaluations]:
        search.measure(corner)
    for _ in range(evaluations - len(corners) if corners else 0):
        best, lowest = search.best, search.lowest
        model = fit(search, b, radius)
        step = lowest_within(model, 1.0)
        gain = model.gain(step)
        if gain <= min_gain * abs(lowest):
            break
        gained = lowest - search.measure(best + radius * (b @ step))
        if gained > 0:
            predicted = lowest - gain
        if gained < 0.1 * gain:
            radius /= 2
        elif gained > 0.5 * gain and step.norm() > 0.9:
            radius *= 2
    return predicted


@one_thread()
def fit(search: Search, b: Tensor, radius: float) -> Quadratic:
    """Fit a quadratic of (u − u_best)/r to the losses, weighted towards the nearest ones, with a ridge on H."""
    finite = [i for i, loss in enumerate(search.losses) if math.isfinite(loss)]
    u = (torch.stack([search.points[i] for i in finite]) - search.best) @ torch.linalg.pinv(b).T / radius
    losses = u.new_tensor([search.losses[i] for i in finite]) - search.lowest
    n = u.shape[1]
    i, j = torch.triu_indices(n, n)
    terms = torch.cat([torch.ones_like(u[:, :1]), u, u[:, i] * u[:, j]], dim=1)
    weight = 1 / (1 + (u.norm(dim=1) / 2) ** 4)
    ridge = torch.cat([u.new_zeros(1), u.new_full((n,), RIDGE**2), u.new_full((len(i),), RIDGE)]).sqrt()
    equations = torch.cat([weight.unsqueeze(1) * terms, ridge.diag()])
    values = torch.cat([weight * losses, torch.zeros_like(ridge)])
    solution = torch.linalg.lstsq(equations, values.unsqueeze(1), driver="gelsd").solution.squeeze(1)
    h = u.new_zeros(n, n)
    h[i, j] = solution[1 + n :]
    return Quadratic(solution[1 : 1 + n], h + h.T)


@one_thread()
def lowest_within(model: Quadratic, radius: float) -> Tensor:
    """Minimize m(u) over ‖u‖ ≤ radius: u = −(H + λI)⁻¹g with the least λ ≥ 0 for which H + λI is positive and u fits."""
    curvatures, directions = torch.linalg.eigh(model.h)
    slopes = directions.T @ model.g
    low = max(0.0, -float(curvatures[0]))
    high = low + max(float(slopes.norm()) / radius, torch.finfo(slopes.dtype).tiny)
    for _ in range(100):
        middle = (low + high) / 2
        short = (slopes / (curvatures + middle)).norm() <= radius
        low, high = (low, middle) if short else (middle, high)
    u: Tensor = -(directions @ (slopes / (curvatures + high)))
    return u


def positioning_advice(report: dict[str, Any]) -> list[str]:
    """Warn if the merge is just one of its runs."""
    params = report["params"]
    if sorted(params["coefficients"]) != [0.0] * (len(report["runs"]) - 1) + [1.0]:
        return []
    run = report["runs"][params["coefficients"].index(1.0)]
    return [f"no combination of the runs was better on held-out data than run {run}; the merge is that run"]


def positioning_native(stored: StoredTensor, figures: Figures, *, coefficients: tuple[float, ...]) -> tuple[Tensor, bool]:
    """Compiled version."""
    return stored.merge("linear", torch.tensor(coefficients), figures=figures), False


@merge_method(
    "positioning",
    source="muooon 2026; Powell 2006",
    elementwise=True,
    native=positioning_native,
    needs_loss=True,
    first_pass=choose_coefficients,
    advice=positioning_advice,
)
def positioning(deltas: Tensor, *, coefficients: tuple[float, ...]) -> Tensor:
    """Σ_t c_t τ_t with the c found by a search on held-out loss, which starts from the best run or the mean."""
    return weighted_sum(deltas, deltas.new_tensor(coefficients))
