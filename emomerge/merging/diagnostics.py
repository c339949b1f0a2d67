"""Diagnostics of a merge: norms, cosines, sign agreement, shares of kept weights.

Counts are exact. Other sums are taken in float64 over rows of a fixed length, independently of the number of threads, and
combined with `math.fsum`, which is exact in any order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from emomerge.numerics.sums import PIECE, exact_sum, row_sums, run_sum


class Figures:
    """Sums over the elements of a tensor, or of several, for N runs.

    `products[i, j]` = Σ x_i·x_j, where x_0 … x_{N−1} are the τ_t, followed by τ_m, the mean τ̄, and τ̄ where τ_m ≠ 0.
    """

    def __init__(self, runs: int) -> None:
        merged, mean, kept = range(runs, runs + 3)
        pairs = [
            *combinations_with_replacement(range(runs), 2),
            (merged, merged),
            (merged, mean),
            (mean, mean),
            (kept, kept),
        ]
        self.products: dict[tuple[int, int], list[float]] = {pair: [] for pair in pairs}
        self.signs = torch.zeros(runs, runs, dtype=torch.int64)
        """Elements that two runs move in the same direction, minus those that they move in opposite directions."""
        self.shared = torch.zeros(runs, runs, dtype=torch.int64)
        """Elements that both runs move."""
        self.masked = torch.zeros(runs, dtype=torch.int64)
        """Elements in each run's mask."""
        self.moved = 0
        """Elements that any run moves."""
        self.kept = 0
        """Elements that the merge moves."""

    def add(self, deltas: Tensor, merged: Tensor, masks: Tensor | None) -> None:
        """Add a tensor or a piece of it: deltas (runs, *shape), merged (*shape), masks (runs, *shape) or None."""
        pieces = deltas.reshape(len(deltas), -1).split(PIECE, dim=1), merged.flatten().split(PIECE)
        for some_deltas, some_merged in zip(*pieces, strict=True):
            self._add(some_deltas, some_merged)
        if masks is not None:
            self.masked += masks.reshape(len(masks), -1).sum(dim=1).cpu()

    def add_sums(self, products: Tensor, counts: Tensor) -> None:
        """Add sums from kernels.c: products (pieces, pairs) of some pieces, with their counts."""
        for sums, new in zip(self.products.values(), products.T.tolist(), strict=True):
            sums += new
        runs = len(self.masked)
        masked, signs, shared, rest = counts.split([runs, runs * runs, runs * runs, 2])
        self.signs += signs.view(runs, runs)
        self.shared += shared.view(runs, runs)
        self.masked += masked
        self.moved += int(rest[0])
        self.kept += int(rest[1])

    def _add(self, deltas: Tensor, merged: Tensor) -> None:
        mean = run_sum(deltas) / len(deltas)
        x = torch.cat([deltas, torch.stack([merged, mean, torch.where(merged != 0, mean, 0)])]).double()
        partial = torch.stack([row_sums(x[i] * x[j]) for i, j in self.products])
        for sums, new in zip(self.products.values(), partial.tolist(), strict=True):
            sums.append(exact_sum(new))
        signs, moves = deltas.sign(), (deltas != 0).to(deltas.dtype)
        self.signs += (signs @ signs.T).to("cpu", torch.int64)
        self.shared += (moves @ moves.T).to("cpu", torch.int64)
        self.moved += int(deltas.any(dim=0).count_nonzero())
        self.kept += int(merged.count_nonzero())

    def join(self, others: Iterable[Figures]) -> Figures:
        """Add other figures to these; return self."""
        for other in others:
            for pair, sums in other.products.items():
                self.products[pair] += sums
            self.signs += other.signs
            self.shared += other.shared
            self.masked += other.masked
            self.moved += other.moved
            self.kept += other.kept
        return self


def describe(figures: Figures, labels: Sequence[str], elements: int, *, masking: bool) -> dict[str, Any]:
    """Return the diagnostics as JSON-compatible data; undefined values, such as a cosine with a zero vector, are None.

    Args:
        figures: figures of the whole task vectors.
        labels: the runs' names.
        elements: number of elements of a task vector; densities are shares of it.
        masking: whether the method gives each run a mask.
    """
    runs = len(labels)
    merged, mean, kept = range(runs, runs + 3)
    products = {pair: exact_sum(sums) for pair, sums in figures.products.items()}
    norms = [math.sqrt(products[run, run]) for run in range(runs)]
    agreeing = ((figures.shared + figures.signs) // 2).tolist()
    shared = figures.shared.tolist()

    def cosine(i: int, j: int) -> float | None:
        i, j = min(i, j), max(i, j)
        value = ratio(products[i, j], math.sqrt(products[i, i]) * math.sqrt(products[j, j]))
        return None if value is None else max(-1.0, min(value, 1.0))

    report: dict[str, Any] = {
        "elements": elements,
        "lambda_crit": 1 / (runs - 1) if runs > 1 else None,
        "moved_density": ratio(figures.moved, elements),
        "kept_density": ratio(figures.kept, elements),
        "kept_energy": ratio(products[kept, kept], products[mean, mean]),
        "cosine_to_mean": cosine(merged, mean),
        "merged_norm": finite_or_none(math.sqrt(products[merged, merged])),
        "mean_norm": finite_or_none(math.sqrt(products[mean, mean])),
        "run_norms": dict(zip(labels, map(finite_or_none, norms), strict=True)),
        "cosines": [[cosine(i, j) for j in range(runs)] for i in range(runs)],
        "sign_agreement": [[ratio(agreeing[i][j], shared[i][j]) for j in range(runs)] for i in range(runs)],
    }
    if masking:
        densities = [ratio(count, elements) for count in figures.masked.tolist()]
        report["mask_density"] = dict(zip(labels, densities, strict=True))
    return report


def ratio(part: float, whole: float) -> float | None:
    """Return part/whole; None if whole is zero or either is not finite."""
    return finite_or_none(part / whole) if whole else None


def finite_or_none(value: float) -> float | None:
    """Return a number that JSON can represent, or None."""
    return value if math.isfinite(value) else None
