"""Sums that no piece, thread count or device splits differently."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations_with_replacement

import torch
from torch import Tensor
from torch.nn.functional import pad

ROW = 4096
"""Elements that are always added together."""
PIECE = 2**17
"""Elements widened to float64 at a time."""


def run_sum(terms: Iterable[Tensor]) -> Tensor:
    """Σ_t x_t, one run after the other."""
    first, *rest = terms
    total = first.clone()
    for term in rest:
        total += term
    return total


def weighted_sum(deltas: Tensor, weights: Iterable[Tensor | float]) -> Tensor:
    """Σ_t w_t τ_t."""
    return run_sum(weight * delta for weight, delta in zip(weights, deltas, strict=True))


def total(values: Tensor) -> Tensor:
    """The sum over the last dimension in float64: of rows, then of rows of their sums."""
    values = values.double()
    while values.shape[-1] > 1:
        row = min(ROW, values.shape[-1])
        values = pad(values, (0, -values.shape[-1] % row)).unflatten(-1, (-1, row)).sum(-1)
    return values.sum(-1)


def gram(rows: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
    """Inner products of the runs' vectors, in float64.

    Args:
        rows: of each run (vectors, n).
        base: (vectors, n), which is added to each.

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
