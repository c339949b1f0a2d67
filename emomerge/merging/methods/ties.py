"""TIES: trim the task vectors, elect a sign for each element, merge what agrees with it. Three published dialects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from emomerge.errors import BadInput
from emomerge.merging.native import AGGREGATE, ELECT, Source
from emomerge.merging.registry import merge_method
from emomerge.merging.settings import PerRun, constant
from emomerge.merging.thresholds import Cut, kth_magnitude, largest
from emomerge.merging.vectors import TaskVectors, blocks
from emomerge.numerics.sums import PIECE, run_sum

if TYPE_CHECKING:
    from emomerge.merging.diagnostics import Figures

Density = Annotated[float, Field(gt=0, le=1)]
Trim = Literal["global", "tensor", "touched"]
Elect = Literal["sum", "weighted", "count"]
Aggregate = Literal["mean", "count", "sum", "max"]


class Dialect(NamedTuple):
    """How one implementation reads the paper."""

    trim: Trim
    """Over what the density is taken: the whole task vector, each tensor, or the weights that the run moved."""
    at_least: int
    """Elements of a tensor that `trim: tensor` always keeps."""
    elect: Elect
    """The sign of Σ τ̂_t, of Σ w_t τ̂_t, or of the count of signs."""
    draw: Literal["majority", "plus"]
    """Where that is zero: the sign that most coordinates elected (minus in a draw of these), or plus."""
    aggregate: Aggregate
    """Over the agreeing runs: Σ w τ̂ / Σ w, Σ w τ̂ / their number, Σ w τ̂, or the largest w τ̂."""


PRESETS = {
    "paper": Dialect("global", 1, "sum", "majority", "mean"),
    "mergekit": Dialect("tensor", 1, "weighted", "plus", "mean"),
    "peft": Dialect("tensor", 0, "sum", "plus", "count"),
}


def trim_and_elect(
    vectors: TaskVectors,
    *,
    density: Mapping[str, tuple[float, ...]],
    preset: Literal["paper", "mergekit", "peft"] = "paper",
    trim: Trim | None = None,
    elect: Elect | None = None,
    draw: Literal["majority", "plus"] | None = None,
    aggregate: Aggregate | None = None,
) -> dict[str, Any]:
    """The dialect; what of each task vector is kept, if that is decided for all tensors at once; the majority's sign."""
    given: dict[str, Any] = {"trim": trim, "elect": elect, "draw": draw, "aggregate": aggregate}
    dialect = PRESETS[preset]._replace(**{knob: value for knob, value in given.items() if value is not None})
    found: dict[str, Any] = {**dialect._asdict(), "cut": None, "majority": 1}
    if dialect.trim != "tensor":
        found["cut"] = cut_globally(vectors, _one_density(density, dialect.trim, len(vectors)), dialect.trim)
    if dialect.draw == "majority":
        balance = torch.zeros((), dtype=torch.float64)
        for name in vectors.names:
            if found["cut"] and (source := vectors.source(name)):
                balance = balance + balance_native(
                    source, vectors.weights_for(name, torch.empty(0)), found["cut"], dialect.elect
                )
                continue
            rows = vectors.rows(name) or []
            cut = found["cut"] or cut_tensor(rows, density=density[name], cut=None, at_least=dialect.at_least)["cut"]
            for offset, deltas in blocks(rows, PIECE) if rows else ():
                votes = ballots(trimmed(deltas, offset, cut), vectors.weights_for(name, deltas), dialect.elect)
                balance = balance + run_sum(votes).sign().sum(dtype=torch.float64)
        found["majority"] = int(balance.sign())
    return found


def cut_globally(vectors: TaskVectors, densities: Sequence[float], trim: Trim) -> Cut:
    """What reaches the (d − ⌊d·K⌋)-th smallest |τ_t|, K the density; the smallest of all where that is the 0-th.

    d counts the elements of the task vector (`global`), or those the run moved (`touched`).
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


def cut_tensor(rows: Sequence[Tensor], *, density: PerRun[Density] = 0.2, cut: Cut | None, at_least: int) -> dict[str, Any]:
    """Of one tensor exactly ⌊density·n⌋ elements, unless the cut is made already."""
    if cut is not None or not rows:
        return {"cut": cut}
    n = len(rows[0])
    return {"cut": largest(rows, [max(int(share * n), at_least) for share in each(density, rows)])}


def trimmed(deltas: Tensor, offset: int, cut: Cut) -> Tensor:
    """τ̂_t: what the cut leaves, zero elsewhere."""
    return torch.where(cut.mask(deltas, offset), deltas, 0)


def ballots(kept: Tensor, weights: Tensor, elect: Elect) -> Iterable[Tensor]:
    """What each run puts into the election of the sign."""
    if elect == "weighted":
        return (weight * delta for weight, delta in zip(weights, kept, strict=True))
    return kept.sign() if elect == "count" else kept


def consensus(kept: Tensor, weights: Tensor, *, elect: Elect, aggregate: Aggregate, majority: int = 1) -> Tensor:
    """Join the elements whose sign is the elected one (`majority` where the election is a draw)."""
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
    """A global threshold that is zero trims nothing."""
    density, kept = report["params"]["density"], report.get("mask_density")
    if report["params"]["trim"] != "global" or not kept or not isinstance(density, float):
        return []
    if max(kept.values()) >= density - 1 / report["elements"]:
        return []
    return [
        f"ties trimmed nothing: no run moved more than the {density:.0%} of the weights that it may keep, "
        "and the sign is elected by all of them; trim: touched keeps that share of the weights that moved"
    ]


def balance_native(source: Source, weights: Tensor, cut: Cut, elect: Elect) -> int:
    """Coordinates that elect plus, less those that elect minus, compiled."""
    last = None if cut.last is None else cut.last.flatten()
    return source.balance(weights, numbers=cut.threshold.flatten(), last=last, elect=ELECT[elect])


def ties_native(
    source: Source,
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
    """Compiled."""
    cut = cut or source.largest([max(int(share * source.numel), at_least) for share in each(density, weights)])
    if cut is None:
        return None
    last = None if cut.last is None else cut.last.flatten()
    options = (ELECT[elect], AGGREGATE[aggregate], majority)
    numbers = cut.threshold.flatten()
    return source.merge("ties", weights, numbers=numbers, last=last, options=options, figures=figures), True


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

    `preset` chooses a dialect (`PRESETS`), each part of which can be set on its own. The weights are taken as given.
    """
    kept = trimmed(deltas, offset, cut)
    return consensus(kept, weights, elect=elect, aggregate=aggregate, majority=majority), kept != 0


def each(numbers: float | Sequence[float], runs: Sequence[Tensor] | Tensor) -> Sequence[float]:
    """One number for each run."""
    return [numbers] * len(runs) if isinstance(numbers, int | float) else numbers


def _one_density(density: Mapping[str, tuple[float, ...]], trim: Trim, runs: int) -> tuple[float, ...]:
    if density and constant(density) is None:
        raise BadInput(
            "a density for each tensor has no meaning for a threshold over all of them",
            where="`density` of ties",
            found=f"trim: {trim}",
            fix="set trim: tensor, or one density for all tensors",
        )
    return constant(density) or (1.0,) * runs
