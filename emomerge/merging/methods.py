"""The merge methods: one function each, on one tensor, reading as its formula.

Notation: τ_t = θ_t − θ₀ are the task vectors of N runs, S = Σ_t τ_t, τ̄ = S/N; a method gives τ_m, and the merge is
θ₀ + scale·τ_m. `deltas` (runs, *shape) stacks the τ_t of one tensor; `weights` (runs,) has mean 1 unless a method says
otherwise. Sums over runs are loops in the order of the runs, so that no result depends on how the work is split.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from emomerge.errors import BadInput
from emomerge.merging.registry import merge_method
from emomerge.merging.thresholds import kth_magnitude
from emomerge.merging.vectors import TaskVectors

Density = Annotated[float, Field(gt=0, le=1)]
Lambda = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Trim = Literal["global", "tensor", "touched"]
Reference = Literal["mean", "sum", "ties"]

LAMBDAS = (0.2, 0.3, 0.4, 0.5, 0.6)
"""What λ: auto chooses from."""


def run_sum(terms: Iterable[Tensor]) -> Tensor:
    """Σ_t x_t, one run after the other."""
    first, *rest = terms
    total = first.clone()
    for term in rest:
        total += term
    return total


def weighted_sum(deltas: Tensor, weights: Tensor) -> Tensor:
    """Σ_t w_t τ_t."""
    return run_sum(weight * delta for weight, delta in zip(weights, deltas, strict=True))


@merge_method("task-arithmetic", source="Ilharco et al. 2023", elementwise=True, relative_weights=False)
def task_arithmetic(deltas: Tensor, weights: Tensor) -> Tensor:
    """Σ_t w_t τ_t, with w_t as given (1 by default, negative to forget)."""
    return weighted_sum(deltas, weights)


@merge_method("mean", source="Wortsman et al. 2022; Ramé et al. 2022", elementwise=True)
def mean(deltas: Tensor, weights: Tensor) -> Tensor:
    """Σ_t w_t τ_t / Σ_t w_t."""
    return weighted_sum(deltas, weights) / len(deltas)


# ---------------------------------------------------------------------------------------------------------- greedy-soup


def choose_members(vectors: TaskVectors) -> dict[str, Any]:
    """From the best run on, add each run with which the mean is no worse on held-out data."""
    vectors.need_loss("greedy-soup")
    losses = vectors.run_losses("greedy-soup")
    best, *others = sorted(range(len(vectors)), key=losses.__getitem__)
    members, lowest = (best,), losses[best]
    for run in others:
        candidate = (*members, run)
        loss = vectors.loss_of(lambda _, deltas, soup=candidate: greedy_soup(deltas, members=soup))
        if loss <= lowest:
            members, lowest = candidate, loss
    return {"members": members}


@merge_method("greedy-soup", source="Wortsman et al. 2022", elementwise=True, first_pass=choose_members)
def greedy_soup(deltas: Tensor, *, members: tuple[int, ...]) -> Tensor:
    """The plain mean of the runs that a greedy search by held-out loss picks."""
    return run_sum(deltas[run] for run in members) / len(members)


# ----------------------------------------------------------------------------------------------------------------- ties


def trim_and_elect(
    vectors: TaskVectors, *, density: Density = 0.2, trim: Trim = "global", preset: Literal["paper"] = "paper"
) -> dict[str, Any]:
    """By tensor name the magnitude (runs, 1) that an element must reach, and the sign that most coordinates elect."""
    thresholds = trim_thresholds(vectors, density, trim)
    balance = torch.zeros((), dtype=torch.float64)
    for name, deltas in vectors.all_pieces():
        elected = run_sum(trimmed(deltas, thresholds[name])).sign()
        balance = balance + elected.sum(dtype=torch.float64)
    return {"thresholds": thresholds, "majority": int(balance.sign())}


def trim_thresholds(vectors: TaskVectors, density: float, trim: Trim) -> Mapping[str, Tensor]:
    """The (d − ⌊d·K⌋)-th smallest |τ_t|, K the density; the smallest of all where that is the 0-th.

    d counts the elements of the task vector (`global`), of each tensor (`tensor`), or those the run moved (`touched`).
    """

    def rank(d: int) -> int:
        return max(d - int(d * density), 1)

    runs, total = len(vectors), vectors.numel
    if trim == "tensor":
        sizes = {name: vectors.base.info(name).numel for name in vectors.names if vectors.base.info(name).numel}
        return {
            name: vectors.kth_magnitude([rank(d)] * runs, partial(vectors.pieces, name), numel=d)
            for name, d in sizes.items()
        }
    if trim == "touched":
        still = [total - moved for moved in vectors.count_moved()]
        ranks = [min(zeros + rank(total - zeros), total) for zeros in still]
    else:
        ranks = [rank(total)] * runs
    pieces = (lambda: (deltas for _, deltas in vectors.all_pieces()))
    return dict.fromkeys(vectors.names, kth_magnitude(pieces, ranks, numel=total, dtype=vectors.dtype).unsqueeze(1))


def trimmed(deltas: Tensor, threshold: Tensor) -> Tensor:
    """τ̂_t: the elements that reach their run's threshold (runs, 1), zero elsewhere."""
    return torch.where(deltas.abs() >= threshold, deltas, 0)


def ties_advice(report: dict[str, Any]) -> list[str]:
    """A global threshold that is zero trims nothing."""
    params, density = report["params"], report["density"]
    if params["trim"] != "global" or max(density["mask"].values()) >= params["density"]:
        return []
    return [
        f"ties trimmed nothing: no run moved as much as density {params['density']:g} of the weights, so every weight that "
        "moved was kept; use trim: touched to keep that share of the weights that moved"
    ]
