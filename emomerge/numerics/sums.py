"""Sums in an order that does not depend on pieces, thread count or device: runs in sequence, elements in fixed rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations_with_replacement

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

ROW = 4096
"""Elements per row; a row is always summed as a whole."""
PIECE = 32 * ROW
"""Elements processed at a time: they fit in the cache, and float32 counts up to 2²⁴ exactly."""
INNER_PIECE = 2**22
"""Elements that `inner` converts to float64 at a time on an accelerator; on the CPU PIECE, since memory is slower."""


def exact_sum(values: Iterable[float]) -> float:
    """Return `math.fsum`; NaN where it raises, because the sum overflows or adds opposite infinities."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        return math.nan


def run_sum(terms: Iterable[Tensor]) -> Tensor:
    """Return Σ_t x_t, one run after the other."""
    first, *rest = terms
    total = first.clone()
    for term in rest:
        total += term
    return total


def weighted_sum(deltas: Tensor, weights: Iterable[Tensor | float]) -> Tensor:
    """Return Σ_t w_t τ_t."""
    return run_sum(weight * delta for weight, delta in zip(weights, deltas, strict=True))


def row_sums(values: Tensor) -> Tensor:
    """Return the sums (…, rows) of rows of ROW elements in the last dimension, padded with zeros."""
    rows: Tensor = pad(values, (0, -values.shape[-1] % ROW)).unflatten(-1, (-1, ROW))
    return rows.sum(-1)


def double(x: Tensor) -> Tensor:
    """Return the tensor in float64, on its own device if that supports float64, else on the CPU."""
    return (x.cpu() if x.device.type == "mps" else x).double()  # MPS has no float64


def inner(a: Tensor, b: Tensor) -> float:
    """Return Σ a·b in float64."""
    sums: list[float] = []
    piece = PIECE if a.device.type == "cpu" else INNER_PIECE
    for x, y in zip(a.detach().flatten().split(piece), b.detach().flatten().split(piece), strict=True):
        sums += row_sums(double(x) * double(y)).tolist()
    return float(np.sum(sums))


def square_sum(tensor: Tensor) -> float:
    """Return Σ x² in float64."""
    return inner(tensor, tensor)


def squared_row_lengths(values: Tensor) -> list[float]:
    """Return Σ x² of each row of ROW elements of a flat tensor, and of the remainder; norms are taken in its own dtype."""
    whole, rest = values.split([len(values) - len(values) % ROW, len(values) % ROW])
    lengths = torch.cat([torch.linalg.vector_norm(rows, dim=1) for rows in (whole.view(-1, ROW), rest.view(1, -1))])
    squares: list[float] = lengths.double().square().tolist()
    return squares


def sum_of_row_norms(matrix: Tensor, power: int) -> float:
    """Return Σ ‖row‖ᵖ over the rows of a matrix, in float64; `math.fsum` makes it independent of the order of the rows."""
    return exact_sum(torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float64).pow(power).tolist())


def total(values: Tensor) -> Tensor:
    """Return the sum over the last dimension in float64: of rows, then of rows of their sums."""
    values = values.double()
    while values.shape[-1] > 1:
        row = min(ROW, values.shape[-1])
        values = pad(values, (0, -values.shape[-1] % row)).unflatten(-1, (-1, row)).sum(-1)
    return values.sum(-1)


def gram(rows: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
    """Return the inner products of the runs' vectors, in float64.

    Args:
        rows: the vectors of each run, (vectors, n).
        base: added to each run's vectors, (vectors, n).

    Returns:
        Tensor: (vectors, runs, runs).
    """
    vectors, n = rows[0].shape
    height = max(1, PIECE // max(1, n))
    products = rows[0].new_zeros(vectors, len(rows), len(rows), dtype=torch.float64)
    for top in range(0, vectors, height):
        for left in range(0, n, PIECE):
            block = slice(top, top + height), slice(left, left + PIECE)
            wide = [row[block].double() if base is None else (base[block] + row[block]).double() for row in rows]
            for i, j in combinations_with_replacement(range(len(rows)), 2):
                products[block[0], i, j] += total(wide[i] * wide[j])
    return products + products.triu(1).mT
