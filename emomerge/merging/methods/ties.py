"""TIES: trim the task vectors, elect a sign for each element, merge the values with that sign. Three published variants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from emomerge.errors import BadInput
from emomerge.merging.native import AGGREGATE, ELECT, StoredTensor
from emomerge.merging.registry import merge_method, provides
from emomerge.merging.settings import PerRun, constant
from emomerge.merging.thresholds import Cut, kth_magnitude, largest
from emomerge.merging.vectors import TaskVectors, blocks
from emomerge.numerics.sums import PIECE, run_sum

if TYPE_CHECKING:
    from emomerge.merging.diagnostics import Figures

Density = Annotated[float, Field(gt=0, le=1, description="share of each task vector's elements to keep")]
Preset = Annotated[
    Literal["paper", "mergekit", "peft"],
    Field(description="the implementation to follow; trim, elect, draw and aggregate override its parts"),
]
Trim = Annotated[
    Literal["global", "tensor", "touched"],
    Field(description="apply the density to the whole task vector, to each tensor, or to the weights that the run moved"),
]
Elect = Annotated[
    Literal["sum", "weighted", "count"],
    Field(description="elect the sign of the sum of values, of their weighted sum, or of most values"),
]
Draw = Annotated[
    Literal["majority", "plus"],
    Field(description="sign where the election is a draw: the one that most elements elected, or plus"),
]
Aggregate = Annotated[
    Literal["mean", "count", "sum", "max"],
    Field(description="of the values that have the elected sign: weighted mean, sum / number, sum, or largest"),
]


class Variant(NamedTuple):
    """One implementation's interpretation of the paper."""

    trim: Trim
    at_least: int
    """Minimum number of elements of a tensor that `trim: tensor` keeps."""
    elect: Elect
    draw: Draw
    """With `majority`, a tie between elements that elected plus and minus counts as minus."""
    aggregate: Aggregate
    """Over the runs with the elected sign: Σ w τ̂ / Σ w, Σ w τ̂ / their number, Σ w τ̂, or the largest w τ̂."""


PRESETS = {
    "paper": Variant("global", 1, "sum", "majority", "mean"),
    "mergekit": Variant("tensor", 1, "weighted", "plus", "mean"),
    "peft": Variant("tensor", 0, "sum", "plus", "count"),
}


@provides(*Variant._fields, "cut", "majority")
def trim_and_elect(
    vectors: TaskVectors,
    *,
    density: Mapping[str, tuple[float, ...]],
    preset: Preset = "paper",
    trim: Trim | None = None,
    elect: Elect | None = None,
    draw: Draw | None = None,
    aggregate: Aggregate | None = None,
) -> dict[str, Any]:
    """Resolve the variant; find the cut, if it applies to all tensors at once, and the majority sign."""
    given: dict[str, Any] = {"trim": trim, "elect": elect, "draw": draw, "aggregate": aggregate}
    variant = PRESETS[preset]._replace(**{part: value for part, value in given.items() if value is not None})
    found: dict[str, Any] = {**variant._asdict(), "cut": None, "majority": 1}
    if variant.trim != "tensor":
        found["cut"] = cut_globally(vectors, _one_density(density, variant.trim, len(vectors)), variant.trim)
    if variant.draw == "majority":
        balance = torch.zeros((), dtype=torch.float64)
        for name in vectors.names:
            if found["cut"] and (stored := vectors.stored(name)):
                balance = balance + balance_native(
                    stored, vectors.weights_for(name, torch.empty(0)), found["cut"], variant.elect
                )
                continue
            rows = vectors.rows(name) or []
            cut = found["cut"] or cut_tensor(rows, density=density[name], cut=None, at_least=variant.at_least)["cut"]
            for offset, deltas in blocks(rows, PIECE) if rows else ():
                votes = ballots(trimmed(deltas, offset, cut), vectors.weights_for(name, deltas), variant.elect)
                balance = balance + run_sum(votes).sign().sum(dtype=torch.float64)
        found["majority"] = int(balance.sign())
    return found


def cut_globally(vectors: TaskVectors, densities: Sequence[float], trim: Trim) -> Cut:
    """Cut each τ_t at its (d − ⌊d·K⌋)-th smallest magnitude, K the density; at the smallest of all if that is the 0-th.

    d is the number of elements of the task vector (`global`), or of those that the run moved (`touched`).
    """

    def pieces() -> Iterable[Tensor]:
        return (deltas for _, deltas in vectors.all_pieces())

    counts = torch.full((len(vectors),), vectors.numel)
    if trim == "touched":
        counts = sum((deltas.count_nonzero(dim=1).cpu() for deltas in pieces()), start=torch.zeros_like(counts))
    ranks = [
        min(vectors.numel - d + max(d - int(d * density), 1), vectors.numel)
        for d, density in zip(counts.tolist(), densities, strict=True)
    ]
    threshold = vectors.kth_magnitude_native(ranks)
    if threshold is None:
        threshold = kth_magnitude(pieces, ranks, numel=vectors.numel, dtype=vectors.dtype)
    return Cut(threshold.unsqueeze(1))


@provides("cut")
def cut_tensor(rows: Sequence[Tensor], *, density: PerRun[Density] = 0.2, cut: Cut | None, at_least: int) -> dict[str, Any]:
    """Keep exactly ⌊density·n⌋ elements of one tensor, unless the cut has already been made."""
    if cut is not None or not rows:
        return {"cut": cut}
    n = len(rows[0])
    return {"cut": largest(rows, [max(int(share * n), at_least) for share in each(density, rows)])}


def trimmed(deltas: Tensor, offset: int, cut: Cut) -> Tensor:
    """Return τ̂_t: the elements inside the cut; zero elsewhere."""
    return torch.where(cut.mask(deltas, offset), deltas, 0)


def ballots(kept: Tensor, weights: Tensor, elect: Elect) -> Iterable[Tensor]:
    """Return each run's vote in the election of the sign."""
    if elect == "weighted":
        return (weight * delta for weight, delta in zip(weights, kept, strict=True))
    return kept.sign() if elect == "count" else kept


def consensus(kept: Tensor, weights: Tensor, *, elect: Elect, aggregate: Aggregate, majority: int = 1) -> Tensor:
    """Merge the elements that have the elected sign (`majority` where the election is a draw)."""
    balance = run_sum(ballots(kept, weights, elect))
    positive = balance >= 0 if majority > 0 else balance > 0
    merged, share = torch.zeros_like(balance), torch.zeros_like(balance)
    for vote, weight, delta in zip(ballots(kept, weights, elect), weights, kept, strict=True):
        agrees = torch.where(positive, vote > 0, vote < 0)
        term = torch.where(agrees, weight * delta, 0)
        merged = torch.where(term.abs() > merged.abs(), term, merged) if aggregate == "max" else merged + term
        share += agrees * weight if aggregate == "mean" else agrees
    return merged if aggregate in ("sum", "max") else merged / torch.where(share == 0, 1, share)


def ties_advice(report: dict[str, Any]) -> list[str]:
    """Warn if a global threshold of zero trims nothing."""
    density, kept = report["params"]["density"], report.get("mask_density")
    if report["params"]["trim"] != "global" or not kept or not isinstance(density, float):
        return []
    if max(kept.values()) >= density - 1 / report["elements"]:
        return []
    return [
        f"ties trimmed nothing: no run moved more than the {density:.0%} of the weights that it may keep, "
        "so all of them elect the sign; trim: touched keeps that share of the weights that moved"
    ]


def balance_native(stored: StoredTensor, weights: Tensor, cut: Cut, elect: Elect) -> int:
    """Return the number of elements that elect plus minus the number of elements that elect minus, with compiled code."""
    last = None if cut.last is None else cut.last.flatten()
    return stored.balance(weights, numbers=cut.threshold.flatten(), last=last, elect=ELECT[elect])


def ties_native(
    stored: StoredTensor,
    weights: Tensor,
    figures: Figures,
    *,
    density: PerRun[Density],
    cut: Cut | None,
    at_least: int,
    elect: Elect,
    aggregate: Aggregate,
    majority: int,
) -> tuple[Tensor, bool] | None:
    """Compiled version."""
    cut = cut or stored.largest([max(int(share * stored.numel), at_least) for share in each(density, weights)])
    if cut is None:
        return None
    last = None if cut.last is None else cut.last.flatten()
    options = (ELECT[elect], AGGREGATE[aggregate], majority)
    numbers = cut.threshold.flatten()
    return stored.merge("ties", weights, numbers=numbers, last=last, options=options, figures=figures), True


@merge_method(
    "ties",
    native=ties_native,
    source="Yadav et al. 2023",
    elementwise=True,
    relative_weights=False,
    first_pass=trim_and_elect,
    tensor_pass=cut_tensor,
    advice=ties_advice,
)
def ties(
    deltas: Tensor, weights: Tensor, offset: int, *, cut: Cut, elect: Elect, aggregate: Aggregate, majority: int
) -> tuple[Tensor, Tensor]:
    """Trim each τ_t to its largest elements, elect a sign sgn(Σ_t τ̂_t), and average the w_t τ̂_t that have it.

    `preset` selects a variant (`PRESETS`), each part of which can be overridden. The weights are used as given.
    """
    kept = trimmed(deltas, offset, cut)
    return consensus(kept, weights, elect=elect, aggregate=aggregate, majority=majority), kept != 0


def each(numbers: float | Sequence[float], runs: Sequence[Tensor] | Tensor) -> Sequence[float]:
    """Return one number for each run."""
    return [numbers] * len(runs) if isinstance(numbers, int | float) else numbers


def _one_density(density: Mapping[str, tuple[float, ...]], trim: Trim, runs: int) -> tuple[float, ...]:
    if density and constant(density) is None:
        raise BadInput(
            "a threshold over all tensors needs one density for all of them",
            where="`density` of ties",
            found=f"trim: {trim}",
            fix="set trim: tensor, or one density for all tensors",
        )
    return constant(density) or (1.0,) * runs
