"""TALL-masks: localize the weights that matter to each run, then keep those that enough runs agree on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from emomerge.errors import BadInput
from emomerge.merging.methods.ties import ties, trim_and_elect
from emomerge.merging.native import StoredTensor
from emomerge.merging.registry import merge_method, provides
from emomerge.merging.vectors import TaskVectors
from emomerge.numerics.sums import weighted_sum

if TYPE_CHECKING:
    from emomerge.merging.diagnostics import Figures

Lambda = Annotated[
    Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"],
    Field(description="λ of the masks; the larger, the fewer weights; auto: chosen for each run by held-out loss"),
]
Votes = Annotated[int, Field(ge=0, description="number of runs whose masks must agree on a weight")]
Reference = Annotated[
    Literal["mean", "sum", "ties"],
    Field(description="task vector R that the masks are measured against and applied to"),
]

LAMBDAS = (0.2, 0.3, 0.4, 0.5, 0.6)
"""The candidates for `lambda: auto`."""


def reference_vector(deltas: Tensor, weights: Tensor, reference: Reference, survey: Mapping[str, Any]) -> Tensor:
    """Return R: the (weighted) mean τ̄, the sum S = N·τ̄, or TIES(20 %, sum)."""
    if reference == "ties":
        return ties(deltas, torch.ones_like(weights), 0, **survey)[0]
    total = weighted_sum(deltas, weights)
    return total if reference == "sum" else total / len(deltas)


def ties_of_a_fifth(vectors: TaskVectors) -> dict[str, Any]:
    """Return the arguments with which `ties` sums the largest 20 %."""
    density = dict.fromkeys(vectors.names, (0.2,) * len(vectors))
    found = trim_and_elect(vectors, density=density, aggregate="sum")
    return {key: value for key, value in found.items() if key in ("cut", "elect", "aggregate", "majority")}


def mask_of(deltas: Tensor, reference: Tensor, lambda_: Tensor | float) -> Tensor:
    """Return the mask of a run, the weights that matter to it: |τ_t| > λ·|R − τ_t|, strictly."""
    return deltas.abs() > lambda_ * (reference - deltas).abs()


@provides("votes", "survey", "lambdas")
def choose_lambdas(
    vectors: TaskVectors, *, lambda_: Lambda = 0.4, reference: Reference = "mean", k: Votes = 2
) -> dict[str, Any]:
    """Return λ of each run; `auto`: the λ whose reconstruction θ₀ + mask_t ⊙ R has the lowest held-out loss."""
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
            return torch.where(mask_of(deltas[run], r, candidate), r, 0)

        return vectors.loss_of(reconstruction, "lambda: auto")

    return {**found, "lambdas": tuple(min(LAMBDAS, key=partial(loss, run)) for run in range(runs))}


def tall_mask_advice(report: dict[str, Any]) -> list[str]:
    """Warn about masks that remove the weights on which all runs agree, the strongest signal of runs on one task."""
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
    stored: StoredTensor, weights: Tensor, figures: Figures, *, lambdas: tuple[float, ...], votes: int, reference: Reference
) -> tuple[Tensor, bool] | None:
    """Compiled version; does not support a reference that is itself a merge."""
    if reference == "ties":
        return None
    options = (votes, reference == "mean")
    return stored.merge("tall-mask", weights, numbers=torch.tensor(lambdas), options=options, figures=figures), True


def localize(
    deltas: Tensor, weights: Tensor, *, lambdas: tuple[float, ...], survey: Mapping[str, Any], reference: Reference
) -> tuple[Tensor, Tensor]:
    """Return R and the mask of each run."""
    r = reference_vector(deltas, weights, reference, survey)
    return r, mask_of(deltas, r, deltas.new_tensor(lambdas).unsqueeze(1))


@merge_method(
    "tall-mask",
    source="Wang et al. 2024",
    elementwise=True,
    native=tall_mask_native,
    tuned=True,
    incremental=True,
    localize=localize,
    first_pass=choose_lambdas,
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
    r, masks = localize(deltas, weights, lambdas=lambdas, survey=survey, reference=reference)
    return torch.where(masks.sum(dim=0) >= votes, r, 0), masks
