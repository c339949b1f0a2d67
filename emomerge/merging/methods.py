"""The merge methods: one function each, on one tensor, reading as its formula.

Notation: τ_t = θ_t − θ₀ are the task vectors of N runs, S = Σ_t τ_t, τ̄ = S/N; a method gives τ_m, and the merge is
θ₀ + scale·τ_m. `deltas` (runs, *shape) stacks the τ_t of one tensor; `weights` (runs,) has mean 1 unless a method says
otherwise. Sums over runs are loops in the order of the runs, so that no result depends on how the work is split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
Votes = Annotated[int, Field(ge=0)]
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
    chosen: tuple[int, ...] = (best,)
    lowest = losses[best]
    for run in others:
        candidate = (*chosen, run)
        loss = vectors.loss_of(lambda _, deltas: greedy_soup(deltas, chosen=candidate), "greedy-soup")  # noqa: B023
        if loss <= lowest:
            chosen, lowest = candidate, loss
    return {"chosen": chosen, "members": tuple(vectors.labels[run] for run in chosen)}


@merge_method("greedy-soup", source="Wortsman et al. 2022", elementwise=True, first_pass=choose_members)
def greedy_soup(deltas: Tensor, *, chosen: tuple[int, ...]) -> Tensor:
    """The plain mean of the runs that a greedy search by held-out loss picks."""
    return run_sum(deltas[run] for run in chosen) / len(chosen)


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

    def thresholds(stream: Callable[[], Iterable[Tensor]], ranks: list[int], numel: int) -> Tensor:
        return kth_magnitude(stream, ranks, numel=numel, dtype=vectors.dtype).unsqueeze(1)

    runs, total = len(vectors), vectors.numel
    if trim == "tensor":
        sizes = {name: vectors.base.info(name).numel for name in vectors.names}
        return {name: thresholds(partial(vectors.pieces, name), [rank(d)] * runs, d) for name, d in sizes.items()}
    ranks = [rank(total)] * runs
    if trim == "touched":
        moved = torch.zeros(runs, dtype=torch.int64)
        for _, deltas in vectors.all_pieces():
            moved = moved.to(deltas.device) + deltas.count_nonzero(dim=1)
        ranks = [min(total - d + rank(d), total) for d in moved.tolist()]
    one_for_all = thresholds(lambda: (deltas for _, deltas in vectors.all_pieces()), ranks, total)
    return dict.fromkeys(vectors.names, one_for_all)


def trimmed(deltas: Tensor, threshold: Tensor) -> Tensor:
    """τ̂_t: the elements that reach their run's threshold (runs, 1), zero elsewhere."""
    return torch.where(deltas.abs() >= threshold.to(deltas.device), deltas, 0)


def ties_advice(report: dict[str, Any]) -> list[str]:
    """A global threshold that is zero trims nothing."""
    density, kept = report["params"]["density"], report.get("mask_density")
    if report["params"]["trim"] != "global" or not kept or max(kept.values()) >= density - 1 / report["elements"]:
        return []
    return [
        f"ties trimmed nothing: no run moved more than the {density:.0%} of the weights that it may keep, "
        "and the sign is elected by all of them; trim: touched keeps that share of the weights that moved"
    ]


@merge_method("ties", source="Yadav et al. 2023", elementwise=True, first_pass=trim_and_elect, advice=ties_advice)
def ties(
    deltas: Tensor,
    name: str,
    *,
    thresholds: Mapping[str, Tensor],
    majority: int,
    aggregate: Literal["mean", "sum"] = "mean",
) -> tuple[Tensor, Tensor]:
    """Trim each τ_t to its largest elements, elect a sign sgn(Σ_t τ̂_t), and average (or add) the τ̂_t that have it.

    Where the τ̂_t cancel, the sign that most coordinates elected decides; a draw of these counts as minus, as published.
    """
    kept = trimmed(deltas, thresholds[name])
    total = run_sum(kept)
    positive = (total > 0) | ((total == 0) & (majority > 0))
    agreeing = torch.where(positive, kept > 0, kept < 0)
    merged = run_sum(torch.where(agreeing, kept, 0))
    if aggregate == "mean":
        merged = merged / agreeing.sum(dim=0).clamp(min=1)
    return merged, kept != 0


# ------------------------------------------------------------------------------------------------------------ tall-mask


def reference_vector(deltas: Tensor, weights: Tensor, name: str, reference: Reference, survey: Mapping[str, Any]) -> Tensor:
    """R: the (weighted) mean τ̄, the sum S = N·τ̄, or TIES(20 %, sum)."""
    if reference == "ties":
        return ties(deltas, name, aggregate="sum", **survey)[0]
    total = weighted_sum(deltas, weights)
    return total if reference == "sum" else total / len(deltas)


def localize(deltas: Tensor, reference: Tensor, lambda_: Tensor | float) -> Tensor:
    """The weights that matter to a run: |τ_t| > λ·|R − τ_t|, strictly."""
    return deltas.abs() > lambda_ * (reference - deltas).abs()


def settle_lambdas(
    vectors: TaskVectors, *, lambda_: Lambda | Literal["auto"] = 0.4, reference: Reference = "mean", k: Votes = 2
) -> dict[str, Any]:
    """λ of each run; `auto` is the λ whose masked reconstruction θ₀ + mask_t ⊙ R has the lowest held-out loss."""
    runs = len(vectors)
    if k > max(runs, 2):
        raise BadInput("more votes than runs", where="`k` of tall-mask", expected=f"0 to {runs}", found=k)
    survey = trim_and_elect(vectors, density=0.2) if reference == "ties" else {}
    found = {"votes": min(k, runs), "survey": survey}
    if lambda_ != "auto":
        return {**found, "lambdas": (lambda_,) * runs}

    def loss(run: int, candidate: float) -> float:
        def reconstruction(name: str, deltas: Tensor) -> Tensor:
            r = reference_vector(deltas, vectors.weights_for(deltas), name, reference, survey)
            return torch.where(localize(deltas[run], r, candidate), r, 0)

        return vectors.loss_of(reconstruction, "lambda: auto")

    return {**found, "lambdas": tuple(min(LAMBDAS, key=partial(loss, run)) for run in range(runs))}


def tall_mask_advice(report: dict[str, Any]) -> list[str]:
    """Runs on one task agree, and a mask that removes what they agree on removes the best of the merge."""
    critical, lambdas = report["lambda_crit"], report["params"]["lambdas"]
    shown = "λ " + ", ".join(f"{value:g}" for value in sorted(set(lambdas)))
    warnings = []
    if report["params"]["reference"] == "sum" and critical is not None and max(lambdas) >= critical:
        warnings.append(
            f"with reference: sum and {shown} a weight on which all runs agree is removed, because λ ≥ λ_crit = "
            f"1/(N−1) = {critical:.3g}; use reference: mean or a λ below {critical:.3g}"
        )
    if (energy := report["kept_energy"]) is not None and energy < 0.5:
        limit = "" if critical is None else f" (λ_crit = 1/(N−1) = {critical:.3g})"
        warnings.append(
            f"the masks at {shown}{limit} and k {report['params']['votes']} keep only {energy:.0%} of the energy of "
            "the runs' mean; use reference: mean, a smaller λ or a smaller k, and compare with method: mean"
        )
    return warnings


@merge_method(
    "tall-mask",
    source="Wang et al. 2024",
    elementwise=True,
    tuned=True,
    first_pass=settle_lambdas,
    advice=tall_mask_advice,
)
def tall_mask(
    deltas: Tensor,
    weights: Tensor,
    name: str,
    *,
    lambdas: tuple[float, ...],
    votes: int,
    survey: Mapping[str, Any],
    reference: Reference = "mean",
) -> tuple[Tensor, Tensor]:
    """keep ⊙ R where at least k masks |τ_t| > λ·|R − τ_t| agree; R is the runs' mean, sum or TIES."""
    r = reference_vector(deltas, weights, name, reference, survey)
    masks = localize(deltas, r, deltas.new_tensor(lambdas).unsqueeze(1))
    return torch.where(masks.sum(dim=0) >= votes, r, 0), masks
