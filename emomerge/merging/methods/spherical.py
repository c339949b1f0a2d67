"""Averages on the sphere: directions and lengths are averaged separately.

The points are the task vectors (`origin: base`) or the runs' weights θ_t themselves (`origin: zero`). Each merge is a
combination Σ c_t x_t whose coefficients follow from the inner products of the points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from emomerge.merging.registry import merge_method, provides
from emomerge.merging.settings import PerTensor
from emomerge.numerics.sums import gram, run_sum, weighted_sum

Origin = Annotated[
    Literal["base", "zero"], Field(description="what the points are: task vectors (base) or the runs' weights (zero)")
]
VectorKind = Literal["tensor", "row", "column", "filter"]
"""A vector is the whole tensor, a slice along its last or its first dimension, or all elements at one index of the first
dimension."""
Along = Annotated[
    Literal["tensor", "row", "column"],
    Field(description="what is interpolated: whole tensors, or vectors along the last (row) or first (column) dimension"),
]

FilterWise = Annotated[bool, Field(description="one t for each index of the first dimension instead of one per tensor")]
Position = Annotated[float, Field(allow_inf_nan=False, description="0 is the first run, 1 the second")]

COLLINEAR = 0.9995
"""slerp is linear if |cos| exceeds this."""


def products(rows: Sequence[Tensor], base: Tensor | None, shape: tuple[int, ...], along: VectorKind = "tensor") -> Tensor:
    """Return the inner products (vectors, runs, runs) of the points: τ_t, or θ_t if a `base` is given."""

    def vectors(x: Tensor) -> Tensor:
        if along == "tensor" or not shape:
            return x.view(1, -1)
        return {"row": x.view(-1, shape[-1]), "column": x.view(shape[0], -1).mT, "filter": x.view(shape[0], -1)}[along]

    return gram([vectors(row) for row in rows], None if base is None else vectors(base))


def expand(factors: Tensor, offset: int, n: int, shape: tuple[int, ...], along: VectorKind) -> Tensor:
    """Expand one factor per vector (…, vectors) to the n elements from `offset` on (…, n)."""
    if factors.shape[-1] == 1:
        return factors
    place = torch.arange(offset, offset + n, device=factors.device)
    stride = math.prod(shape) // shape[0]
    vector = {"row": place // shape[-1], "column": place % stride, "filter": place // stride}[along]
    return factors[..., vector]


def combined(deltas: Tensor, base: Tensor, coefficients: Tensor, origin: Origin) -> Tensor:
    """Return Σ_t c_t x_t, x_t = τ_t or θ_t, as a task vector; coefficients are (runs, n) or (runs, 1)."""
    if origin == "base":
        return weighted_sum(deltas, coefficients)
    return weighted_sum(base + deltas, coefficients) - base


def cosines(inner: Tensor) -> Tensor:
    """Return cosines from inner products (…, runs, runs); 0 for a vector of length zero."""
    norms = inner.diagonal(dim1=-2, dim2=-1).sqrt()
    lengths = norms.unsqueeze(-1) * norms.unsqueeze(-2)
    return torch.where(lengths > 0, inner / lengths, 0).clamp(-1, 1)


# ---------------------------------------------------------------------------------------------------------- model-stock


@provides("t")
def stock_ratio(rows: Sequence[Tensor], shape: tuple[int, ...], *, filter_wise: FilterWise = False) -> dict[str, Any]:
    """Return t = N·c/(1+(N−1)c) of each vector, c the mean cosine of two runs; 0 at the pole, 1 for a single run."""
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
    return expand(t, offset, deltas.shape[1], shape, "filter") * (run_sum(deltas) / len(deltas))


# ---------------------------------------------------------------------------------------------------------------- slerp


def great_circle(cosine: Tensor, t: Tensor | float, straight: Tensor) -> Tensor:
    """Return the coefficients (2, vectors) sin((1−t)Ω)/sin Ω and sin(tΩ)/sin Ω; 1−t and t where `straight`."""
    angle = torch.where(straight, 0, cosine).acos()
    first = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / angle.sin())
    second = torch.where(straight, t, (t * angle).sin() / angle.sin())
    return torch.stack([first, second])


@provides("coefficients")
def slerp_coefficients(
    rows: Sequence[Tensor], base: Tensor, shape: tuple[int, ...], *, t: PerTensor[Position] = 0.5, origin: Origin = "base"
) -> dict[str, Any]:
    """Return the coefficients of both points."""
    cosine = cosines(products(rows, base if origin == "zero" else None, shape))[:, 0, 1]
    return {"coefficients": great_circle(cosine, t, cosine.abs() > COLLINEAR).to(rows[0].dtype)}


@merge_method("slerp", source="Shoemake 1985", elementwise=True, exact_runs=2, tensor_pass=slerp_coefficients)
def slerp(deltas: Tensor, base: Tensor, *, coefficients: Tensor, origin: Origin = "base") -> Tensor:
    """sin((1−t)Ω)/sin Ω·x₁ + sin(tΩ)/sin Ω·x₂, Ω the angle of the two runs; a line where |cos Ω| > 0.9995."""
    return combined(deltas, base, coefficients, origin)


@provides("coefficients")
def nuslerp_coefficients(
    rows: Sequence[Tensor],
    weights: Tensor,
    base: Tensor,
    shape: tuple[int, ...],
    *,
    along: Along = "tensor",
    origin: Origin = "base",
) -> dict[str, Any]:
    """Return the coefficients of both points, for each vector."""
    whole = run_sum(weights)
    t = torch.where(whole.abs() < 1e-6, 0.5, weights[1] / whole).double()
    cosine = cosines(products(rows, base if origin == "zero" else None, shape, along))[:, 0, 1]
    return {"coefficients": great_circle(cosine, t, 1 - cosine.square() <= 1e-12).to(rows[0].dtype)}


@merge_method(
    "nuslerp", source="mergekit", elementwise=True, relative_weights=False, exact_runs=2, tensor_pass=nuslerp_coefficients
)
def nuslerp(
    deltas: Tensor,
    base: Tensor,
    weights: Tensor,
    offset: int,
    shape: tuple[int, ...],
    *,
    coefficients: Tensor,
    along: Along = "tensor",
    origin: Origin = "base",
) -> Tensor:
    """slerp at t = w₂/(w₁+w₂), of whole tensors or of the vectors along their last (row) or first (column) dimension."""
    return combined(deltas, base, expand(coefficients, offset, deltas.shape[1], shape, along), origin)


# -------------------------------------------------------------------------------------------------- karcher, multislerp


@provides("coefficients")
def karcher_mean(
    rows: Sequence[Tensor],
    weights: Tensor,
    base: Tensor,
    shape: tuple[int, ...],
    *,
    origin: Origin = "base",
    max_iter: Annotated[int, Field(ge=0, description="largest number of steps of the gradient descent")] = 100,
    tol: Annotated[float, Field(gt=0, description="length of a step that ends the descent")] = 1e-7,
) -> dict[str, Any]:
    """Return the coefficients of all points."""
    inner = products(rows, base if origin == "zero" else None, shape)[0].cpu()
    return {"coefficients": karcher_coefficients(inner, weights.cpu().double(), max_iter, tol).to(rows[0]).unsqueeze(1)}


@merge_method("karcher", source="Karcher 1977; Grove and Karcher 1973", elementwise=True, tensor_pass=karcher_mean)
def karcher(deltas: Tensor, base: Tensor, weights: Tensor, *, coefficients: Tensor, origin: Origin = "base") -> Tensor:
    """The direction with the least mean squared angle to the runs', at their mean length (Karcher mean)."""
    return combined(deltas, base, coefficients, origin)


def karcher_coefficients(inner: Tensor, weights: Tensor, max_iter: int, tol: float) -> Tensor:
    """Descend the gradient on the sphere in the span of the points, from their normalized mean, until a step is below `tol`.

    Directions m = Σ_t c_t u_t are represented by their coefficients c (runs,). Antipodes are ignored: their mean is not unique.
    """
    norms, cosine = inner.diagonal().sqrt(), cosines(inner)
    moved = norms > 0
    alpha = torch.where(moved, weights, 0)
    if not alpha.any():
        return torch.zeros_like(alpha)
    alpha = alpha / alpha.sum()

    def length(c: Tensor) -> Tensor:
        return (c * (cosine * c).sum(1)).sum().clamp(min=0).sqrt()

    c = alpha / length(alpha) if length(alpha) >= tol else torch.where(moved.cumsum(0) == 1, moved.double(), 0)
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
    return torch.where(moved, scale * c / norms, 0)


@provides("coefficients")
def multislerp_coefficients(
    rows: Sequence[Tensor], weights: Tensor, base: Tensor, shape: tuple[int, ...], *, origin: Origin = "base"
) -> dict[str, Any]:
    """Return the coefficients of all points."""
    inner = products(rows, base if origin == "zero" else None, shape)[0].cpu()
    norms, alpha = inner.diagonal().sqrt(), weights.cpu().double() / len(weights)
    length = (alpha * (cosines(inner) * alpha).sum(1)).sum().clamp(min=0).sqrt()
    directed = torch.where(norms > 0, alpha / norms, 0) * (alpha * norms).sum() / length
    return {"coefficients": (directed if length >= 1e-8 else alpha).to(rows[0]).unsqueeze(1)}


@merge_method("multislerp", source="mergekit", elementwise=True, tensor_pass=multislerp_coefficients)
def multislerp(deltas: Tensor, base: Tensor, weights: Tensor, *, coefficients: Tensor, origin: Origin = "base") -> Tensor:
    """The mean direction Σ w_t u_t/‖Σ w_t u_t‖ at the mean length Σ w_t‖x_t‖; the plain mean where directions cancel.

    mergekit adds one step in the tangent space at that direction, which is always zero: Σ w_t (u_t − ⟨u_t, m⟩m) has no
    component orthogonal to m.
    """
    return combined(deltas, base, coefficients, origin)
