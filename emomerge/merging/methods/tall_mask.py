"""TALL-masks: localize what matters to each run, keep what enough runs agree on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from emomerge.errors import BadInput
from emomerge.merging.methods.ties import ties, trim_and_elect
from emomerge.merging.native import Source
from emomerge.merging.registry import merge_method
from emomerge.merging.vectors import TaskVectors
from emomerge.numerics.sums import weighted_sum

if TYPE_CHECKING:
    from emomerge.merging.diagnostics import Figures

Lambda = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Votes = Annotated[int, Field(ge=0)]
Reference = Literal["mean", "sum", "ties"]

LAMBDAS = (0.2, 0.3, 0.4, 0.5, 0.6)
"""What λ: auto chooses from."""


def reference_vector(deltas: Tensor, weights: Tensor, reference: Reference, survey: Mapping[str, Any]) -> Tensor:
    """R: the (weighted) mean τ̄, the sum S = N·τ̄, or TIES(20 %, sum)."""
    if reference == "ties":
        return ties(deltas, torch.ones_like(weights), 0, **survey)[0]
    total = weighted_sum(deltas, weights)
    return total if reference == "sum" else total / len(deltas)


def ties_of_a_fifth(vectors: TaskVectors) -> dict[str, Any]:
    """What `ties` needs to know for a sum of the largest 20 %."""
    density = dict.fromkeys(vectors.names, (0.2,) * len(vectors))
    found = trim_and_elect(vectors, density=density, aggregate="sum")
    return {key: value for key, value in found.items() if key in ("cut", "elect", "aggregate", "majority")}


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
    survey = ties_of_a_fifth(vectors) if reference == "ties" else {}
    found = {"votes": min(k, runs), "survey": survey}
    if lambda_ != "auto":
        return {**found, "lambdas": (lambda_,) * runs}

    def loss(run: int, candidate: float) -> float:
        def reconstruction(name: str, deltas: Tensor) -> Tensor:
            r = reference_vector(deltas, vectors.weights_for(name, deltas), reference, survey)
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


def tall_mask_native(
    source: Source, weights: Tensor, figures: Figures, *, lambdas: tuple[float, ...], votes: int, reference: Reference
) -> tuple[Tensor, bool] | None:
    """Compiled, but for the reference that is itself a merge."""
    if reference == "ties":
        return None
    options = (votes, reference == "mean")
    return source.merge("tall-mask", weights, numbers=torch.tensor(lambdas), options=options, figures=figures), True


@merge_method(
    "tall-mask",
    source="Wang et al. 2024",
    elementwise=True,
    native=tall_mask_native,
    tuned=True,
    first_pass=settle_lambdas,
    advice=tall_mask_advice,
)
def tall_mask(
    deltas: Tensor,
    weights: Tensor,
    *,
    lambdas: tuple[float, ...],
    votes: int,
    survey: Mapping[str, Any],
    reference: Reference = "mean",
) -> tuple[Tensor, Tensor]:
    """keep ⊙ R where at least k masks |τ_t| > λ·|R − τ_t| agree; R is the runs' mean, sum or TIES."""
    r = reference_vector(deltas, weights, reference, survey)
    masks = localize(deltas, r, deltas.new_tensor(lambdas).unsqueeze(1))
    return torch.where(masks.sum(dim=0) >= votes, r, 0), masks
