"""Averages on the sphere: directions are averaged as directions, lengths as lengths.

The points are the task vectors (`origin: base`) or the runs' weights θ_t themselves (`origin: zero`). All of these are
combinations Σ c_t x_t whose coefficients follow from the inner products of the points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from emomerge.errors import BadInput
from emomerge.merging.registry import Finite, merge_method
from emomerge.merging.settings import PerTensor
from emomerge.merging.vectors import TaskVectors
from emomerge.numerics.sums import gram, run_sum, weighted_sum

Origin = Literal["base", "zero"]
Along = Literal["tensor", "row", "column", "filter"]
"""What one vector is: the tensor, what lies along its last dimension or its first, or what has one place in the first."""

COLLINEAR = 0.9995
"""Where |cos| exceeds it, slerp is the straight line."""


def products(rows: Sequence[Tensor], base: Tensor | None, shape: tuple[int, ...], along: Along = "tensor") -> Tensor:
    """Inner products (vectors, runs, runs) of the points: of τ_t, or with a `base` of θ_t."""

    def vectors(x: Tensor) -> Tensor:
        if along == "tensor" or not shape:
            return x.view(1, -1)
        return {"row": x.view(-1, shape[-1]), "column": x.view(shape[0], -1).mT, "filter": x.view(shape[0], -1)}[along]

    return gram([vectors(row) for row in rows], None if base is None else vectors(base))


def spread(factors: Tensor, offset: int, n: int, shape: tuple[int, ...], along: Along) -> Tensor:
    """Factors (…, vectors) for the elements from a place on (…, n)."""
    if factors.shape[-1] == 1:
        return factors
    place = torch.arange(offset, offset + n, device=factors.device)
    stride = math.prod(shape) // shape[0]
    vector = {"row": place // shape[-1], "column": place % stride, "filter": place // stride}[along]
    return factors[..., vector]


def combined(deltas: Tensor, base: Tensor, coefficients: Tensor, origin: Origin) -> Tensor:
    """Σ_t c_t x_t as a task vector, of x_t = τ_t or θ_t; coefficients (runs, n) or (runs, 1)."""
    if origin == "base":
        return weighted_sum(deltas, coefficients)
    return weighted_sum(base + deltas, coefficients) - base


def cosines(inner: Tensor) -> Tensor:
    """Of vectors whose inner products (…, runs, runs) are given; 0 with a vector of length zero."""
    norms = inner.diagonal(dim1=-2, dim2=-1).sqrt()
    lengths = norms.unsqueeze(-1) * norms.unsqueeze(-2)
    return torch.where(lengths > 0, inner / lengths, 0).clamp(-1, 1)


# ---------------------------------------------------------------------------------------------------------- model-stock


def stock_ratio(rows: Sequence[Tensor], shape: tuple[int, ...], *, filter_wise: bool = False) -> dict[str, Any]:
    """t = N·c/(1+(N−1)c) of each vector, c the mean cosine of two runs; 0 at the pole, and 1 for a single run."""
    runs = len(rows)
    if runs == 1:
        return {"t": rows[0].new_ones(1)}
    cosine = cosines(products(rows, None, shape, "filter" if filter_wise and len(shape) > 1 else "tensor"))
    c = cosine.triu(1).sum(dim=(1, 2)) / math.comb(runs, 2)
    whole = 1 + (runs - 1) * c
    return {"t": torch.where(whole > 1e-6, runs * c / whole, 0).to(rows[0].dtype)}


@merge_method("model-stock", source="Jang et al. 2024", elementwise=True, tensor_pass=stock_ratio)
def model_stock(deltas: Tensor, offset: int, shape: tuple[int, ...], *, t: Tensor) -> Tensor:
    """t·τ̄, t = N·c/(1+(N−1)c), c the mean cosine of two runs, for each tensor (or each row of it, `filter_wise`)."""
    return spread(t, offset, deltas.shape[1], shape, "filter") * (run_sum(deltas) / len(deltas))


# ---------------------------------------------------------------------------------------------------------------- slerp


def need_two_runs(vectors: TaskVectors) -> dict[str, Any]:
    """A great circle goes through two points."""
    if len(vectors) != 2:
        raise BadInput("slerp is of two runs", found=len(vectors), fix="use karcher or multislerp for more")
    return {}


def great_circle(cosine: Tensor, t: Tensor | float, straight: Tensor) -> Tensor:
    """The coefficients (2, vectors) sin((1−t)Ω)/sin Ω and sin(tΩ)/sin Ω; 1−t and t where it is `straight`."""
    angle = torch.where(straight, 0, cosine).acos()
    first = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / angle.sin())
    second = torch.where(straight, t, (t * angle).sin() / angle.sin())
    return torch.stack([first, second])


def through_two(
    rows: Sequence[Tensor], base: Tensor, shape: tuple[int, ...], *, t: PerTensor[Finite] = 0.5, origin: Origin = "base"
) -> dict[str, Any]:
    """slerp's coefficients."""
    cosine = cosines(products(rows, base if origin == "zero" else None, shape))[:, 0, 1]
    return {"coefficients": great_circle(cosine, t, cosine.abs() > COLLINEAR).to(rows[0].dtype)}


@merge_method("slerp", source="Shoemake 1985", elementwise=True, first_pass=need_two_runs, tensor_pass=through_two)
def slerp(deltas: Tensor, base: Tensor, *, coefficients: Tensor, origin: Origin = "base") -> Tensor:
    """sin((1−t)Ω)/sin Ω·x₁ + sin(tΩ)/sin Ω·x₂, Ω the angle of the two runs; a line where |cos Ω| > 0.9995."""
    return combined(deltas, base, coefficients, origin)


def by_weight(
    rows: Sequence[Tensor],
    weights: Tensor,
    base: Tensor,
    shape: tuple[int, ...],
    *,
    along: Literal["tensor", "row", "column"] = "tensor",
    origin: Origin = "base",
) -> dict[str, Any]:
    """nuslerp's coefficients, of each vector."""
    whole = run_sum(weights)
    t = torch.where(whole.abs() < 1e-6, 0.5, weights[1] / whole).double()
    cosine = cosines(products(rows, base if origin == "zero" else None, shape, along))[:, 0, 1]
    return {"coefficients": great_circle(cosine, t, 1 - cosine.square() <= 1e-12).to(rows[0].dtype)}


@merge_method(
    "nuslerp", source="mergekit", elementwise=True, relative_weights=False, first_pass=need_two_runs, tensor_pass=by_weight
)
def nuslerp(
    deltas: Tensor,
    base: Tensor,
    weights: Tensor,
    offset: int,
    shape: tuple[int, ...],
    *,
    coefficients: Tensor,
    along: Literal["tensor", "row", "column"] = "tensor",
    origin: Origin = "base",
) -> Tensor:
    """slerp at t = w₂/(w₁+w₂), of whole tensors or of each vector along the last dimension (row) or the first (column)."""
    return combined(deltas, base, spread(coefficients, offset, deltas.shape[1], shape, along), origin)


# -------------------------------------------------------------------------------------------------- karcher, multislerp


def towards_all(
    rows: Sequence[Tensor],
    weights: Tensor,
    base: Tensor,
    shape: tuple[int, ...],
    *,
    origin: Origin = "base",
    max_iter: Annotated[int, Field(ge=0)] = 100,
    tol: Annotated[float, Field(gt=0)] = 1e-7,
) -> dict[str, Any]:
    """karcher's coefficients."""
    inner = products(rows, base if origin == "zero" else None, shape)[0].cpu()
    return {"coefficients": karcher_coefficients(inner, weights.cpu().double(), max_iter, tol).to(rows[0]).unsqueeze(1)}


@merge_method("karcher", source="Karcher 1977; Grove and Karcher 1973", elementwise=True, tensor_pass=towards_all)
def karcher(deltas: Tensor, base: Tensor, weights: Tensor, *, coefficients: Tensor, origin: Origin = "base") -> Tensor:
    """The point of the sphere with the least squared angle to the runs' directions, as long as the runs on average."""
    return combined(deltas, base, coefficients, origin)


def karcher_coefficients(inner: Tensor, weights: Tensor, max_iter: int, tol: float) -> Tensor:
    """Gradient descent on the sphere in the span of the points, from their normalised mean; steps below `tol` end it.

    Directions m = Σ_t c_t u_t are kept as their coefficients c (runs,); antipodes, where no mean is unique, are left out.
    """
    norms, cosine = inner.diagonal().sqrt(), cosines(inner)
    live = norms > 0
    alpha = torch.where(live, weights, 0)
    if not alpha.any():
        return torch.zeros_like(alpha)
    alpha = alpha / alpha.sum()

    def length(c: Tensor) -> Tensor:
        return (c * (cosine * c).sum(1)).sum().clamp(min=0).sqrt()

    c = alpha / length(alpha) if length(alpha) >= tol else torch.where(live.cumsum(0) == 1, live.double(), 0)
    for _ in range(max_iter):
        dots = (cosine * c).sum(1).clamp(-1, 1)
        angle = dots.acos()
        pull = alpha * torch.where(angle.sin() > 1e-9, angle / angle.sin(), 0)
        step = pull - (pull * dots).sum() * c
        size = length(step)
        if size < tol:
            break
        c = size.cos() * c + size.sin() / size * step
        c = c / length(c)
    scale = (weights / weights.sum() * norms).sum()
    return torch.where(live, scale * c / norms, 0)


def mean_direction(
    rows: Sequence[Tensor], weights: Tensor, base: Tensor, shape: tuple[int, ...], *, origin: Origin = "base"
) -> dict[str, Any]:
    """multislerp's coefficients."""
    inner = products(rows, base if origin == "zero" else None, shape)[0].cpu()
    norms, alpha = inner.diagonal().sqrt(), weights.cpu().double() / len(weights)
    length = (alpha * (cosines(inner) * alpha).sum(1)).sum().clamp(min=0).sqrt()
    directed = torch.where(norms > 0, alpha / norms, 0) * (alpha * norms).sum() / length
    return {"coefficients": (directed if length >= 1e-8 else alpha).to(rows[0]).unsqueeze(1)}


@merge_method("multislerp", source="mergekit", elementwise=True, tensor_pass=mean_direction)
def multislerp(deltas: Tensor, base: Tensor, weights: Tensor, *, coefficients: Tensor, origin: Origin = "base") -> Tensor:
    """The mean direction Σ w_t u_t/‖Σ w_t u_t‖ at the mean length Σ w_t‖x_t‖; the plain mean where directions cancel.

    mergekit adds one step in the tangent space at that direction, which is zero: Σ w_t (u_t − ⟨u_t, m⟩m) has no part
    across m.
    """
    return combined(deltas, base, coefficients, origin)
