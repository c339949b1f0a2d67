"""Arithmetic of flat parameter vectors: float64 sums over blocks of fixed length, independent of the number of threads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from emomerge.numerics.sums import double, square_sum

BLOCK = 1 << 14
"""Elements per block, few enough for torch to sum them on one thread."""


def dots(rows: Sequence[Tensor], vector: Tensor) -> Tensor:
    """Return ⟨row, vector⟩ of every row, (rows,) float64."""
    total = torch.zeros(len(rows), dtype=torch.float64, device=double(vector[:0]).device)
    for block, some in _blocks(rows, len(vector)):
        total += (some * double(vector[block])).sum(dim=1)
    return total


def norm(vector: Tensor) -> float:
    """Return ‖v‖₂."""
    return math.sqrt(square_sum(vector))


def combine(rows: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """Return Σ c_i row_i in the rows' dtype; coefficients (rows,) float64."""
    result = torch.empty_like(rows[0])
    for block, some in _blocks(rows, len(result)):
        result[block] = (some * coefficients.to(some.device)[:, None]).sum(dim=0)
    return result


def project_out(vector: Tensor, rows: Sequence[Tensor]) -> None:
    """Set vector to (I − QQᵀ)·vector in place, for orthonormal rows Q. Done twice, which is enough (Kahan and Parlett)."""
    if not rows:
        return
    first = dots(rows, vector)
    second = torch.zeros_like(first)
    for block, some in _blocks(rows, len(vector)):
        vector[block] = rest = double(vector[block]) - (some * first[:, None]).sum(dim=0)
        second += (some * rest).sum(dim=1)
    for block, some in _blocks(rows, len(vector)):
        vector[block] = double(vector[block]) - (some * second[:, None]).sum(dim=0)


def _blocks(rows: Sequence[Tensor], length: int) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, length, BLOCK):
        block = slice(start, start + BLOCK)
        yield block, double(torch.stack([row[block] for row in rows]))
