"""Methods based on the singular vectors of matrices; other tensors get the mean."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from emomerge.merging.methods.averages import mean
from emomerge.merging.registry import merge_method
from emomerge.numerics.sums import weighted_sum
from emomerge.numerics.threads import one_thread


class Svd(NamedTuple):
    """u (rows, rank), s (rank,), v (columns, rank): the part of u·diag(s)·vᵀ above rounding error."""

    u: Tensor
    s: Tensor
    v: Tensor


def svd(matrix: Tensor) -> Svd:
    """Return the singular values above max(shape)·eps·σ₁, and their vectors."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((s > max(matrix.shape) * torch.finfo(s.dtype).eps * s[:1]).count_nonzero())
    return Svd(u[:, :rank], s[:rank], vh[:rank].mT)


@merge_method("tsv", source="Gargiulo et al. 2025")
def tsv(deltas: Tensor, weights: Tensor) -> Tensor:
    """Σ_t of each run's first ⌊min(shape)/N⌋ singular triples, the vectors of all runs orthonormalized together.

    [U₁ … U_N] and [V₁ … V_N] are replaced by their nearest orthonormal matrices.
    """
    if deltas.ndim != 3:
        return mean(deltas, weights)
    with one_thread():
        parts = [svd(weight * delta) for weight, delta in zip(weights, deltas, strict=True)]
        k = max(1, min(deltas.shape[1:]) // len(deltas))
        u = torch.cat([part.u[:, :k] for part in parts], dim=1)
        v = torch.cat([part.v[:, :k] for part in parts], dim=1)
        s = torch.cat([part.s[:k] for part in parts])
        return (orthonormal(u) * s) @ orthonormal(v).mT


def orthonormal(vectors: Tensor) -> Tensor:
    """Return the nearest orthonormal columns (Procrustes): P·Qᵀ of the SVD P·diag(σ)·Qᵀ."""
    p, _, q = svd(vectors)
    return p @ q.mT


@merge_method("iso-c", source="Marczak et al. 2025")
def iso_c(deltas: Tensor, weights: Tensor) -> Tensor:
    """σ̄·U·Vᵀ of Σ_t w_t τ_t = U·diag(σ)·Vᵀ, σ̄ the mean of σ: equal length in every direction that the runs use."""
    if deltas.ndim != 3:
        return mean(deltas, weights)
    with one_thread():
        u, s, v = svd(weighted_sum(deltas, weights))
        return s.mean() * (u @ v.mT) if len(s) else torch.zeros_like(deltas[0])
