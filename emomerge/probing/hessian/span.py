"""The Hessian restricted to the span of a few directions, such as the runs' task vectors; exact, without sampling."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emomerge.probing.hessian.product import STEP, Array, Curvature, Method, curvature
from emomerge.probing.hessian.vectors import dots, norm, project_out
from emomerge.probing.perturb import Perturbable

DEPENDENT = 1e-5
"""A direction is dependent if less than this share of its norm lies outside the span of the previous ones."""


@dataclass(frozen=True)
class SpanHessian:
    """QᵀHQ, for Q the Gram–Schmidt orthonormalisation of k directions, of rank r ≤ k."""

    units: Array
    """QᵀH_bQ of every batch, symmetrised, (batches, r, r)."""
    coordinates: Array
    """The directions in the basis Q, (k, r)."""
    weight: Array
    """Weights of the batches, summing to one."""
    asymmetry: float
    """‖A − Aᵀ‖/‖A‖ of A = QᵀHQ before symmetrisation: the error of the products."""
    disagreement: float | None
    """See `Curvature`; the largest of all products."""

    @property
    def matrix(self) -> Array:
        """QᵀHQ, (r, r)."""
        return np.tensordot(self.weight, self.units, axes=1)

    def summary(self) -> dict[str, Any]:
        """Return rank, eigenvalues (descending), trace, τ̂ᵀHτ̂ of every direction, and errors of the products."""
        lengths = np.linalg.norm(self.coordinates, axis=1)
        along = np.einsum("ki,ij,kj->k", self.coordinates, self.matrix, self.coordinates)
        curved = [float(a / x**2) if x > 0 else None for a, x in zip(along, lengths, strict=True)]
        finite = np.isfinite(self.matrix).all()
        return {
            "rank": len(self.matrix),
            "eigenvalues": np.linalg.eigvalsh(self.matrix)[::-1].tolist() if finite else None,
            "trace": float(np.trace(self.matrix)) if finite else None, "along": curved if finite else None,
            "asymmetry": self.asymmetry if finite else None, "disagreement": self.disagreement,
        }  # fmt: skip


def in_span(
    probe: Perturbable, directions: Sequence[Mapping[str, Tensor]], *, hvp: Method = "finite-difference"
) -> SpanHessian:
    """Return the exact Hessian in the span of directions.

    Cost: 2 to 5 products for each independent direction (ε and ε/2 must agree); `autograd`: 1. One ledger row each.
    Memory: a vector of the parameters' size for each direction.

    Args:
        probe: the model.
        directions: parameter name → tensor. Missing tensors are 0; parameters that are not perturbed are ignored.
        hvp: how Hessian-vector products are computed.
    """
    rows: list[dict[str, Any]] = []
    with curvature(probe, hvp) as matrix:
        basis, coordinates = orthonormal(matrix, directions)
        metric = f"hessian in span {hvp} {_digest(basis)}"
        for number, vector in enumerate(basis):
            rows.append(probe.ledger.ask(partial(_column, matrix, vector, basis), **probe.ledger_key(metric, 0.0, number, 0)))
    if not rows:
        return SpanHessian(np.zeros((1, 0, 0)), coordinates, np.ones(1), 0.0, None)
    units = np.array([row["units"] for row in rows]).transpose(1, 2, 0)  # (batches, against, column)
    weight = np.array(rows[0]["weight"])
    whole = np.tensordot(weight, units, axes=1)
    size = float(np.linalg.norm(whole))
    worst = [row["disagreement"] for row in rows if row["disagreement"] is not None]
    return SpanHessian(
        units=(units + units.transpose(0, 2, 1)) / 2, coordinates=coordinates, weight=weight,
        asymmetry=float(np.linalg.norm(whole - whole.T)) / size if size else 0.0, disagreement=max(worst, default=None),
    )  # fmt: skip


def orthonormal(matrix: Curvature, directions: Sequence[Mapping[str, Tensor]]) -> tuple[list[Tensor], Array]:
    """Return orthonormal vectors (size,) that span the directions, and the directions' coordinates (k, r)."""
    basis: list[Tensor] = []
    lengths: list[Tensor] = []
    for direction in directions:
        vector = matrix.flat([direction.get(n, torch.zeros_like(p)) for n, p in matrix.parameters.items()])
        rest, length = vector.clone(), norm(vector)
        project_out(rest, basis)
        outside = norm(rest)
        if outside > DEPENDENT * length:
            basis.append(rest.div_(outside))
        lengths.append(dots(basis, vector).cpu() if basis else torch.zeros(0, dtype=torch.float64))
    padded = [torch.nn.functional.pad(row, (0, len(basis) - len(row))) for row in lengths]
    return basis, torch.stack(padded).numpy()


def _column(matrix: Curvature, vector: Tensor, basis: Sequence[Tensor]) -> dict[str, Any]:
    matrix.step = STEP[matrix.dtype]
    units = matrix.agreed(vector, basis)[1]
    return {"units": units.tolist(), "weight": matrix.weights.tolist(), "disagreement": matrix.disagreement}


def _digest(vectors: Sequence[Tensor]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for vector in vectors:
        total.update(vector.cpu().view(torch.uint8).numpy().data)
    return total.hexdigest()
