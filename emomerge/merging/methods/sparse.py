"""Methods that sparsify the task vectors, then sum or average them or elect signs like TIES: DARE, DELLA, Breadcrumbs, SCE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from emomerge.errors import BadInput
from emomerge.merging.methods.ties import Aggregate, Density, Elect, consensus, each
from emomerge.merging.registry import merge_method, provides
from emomerge.merging.settings import PerRun, PerTensor
from emomerge.merging.thresholds import Cut, largest
from emomerge.merging.vectors import blocks
from emomerge.numerics.seeds import key_of
from emomerge.numerics.sums import PIECE, run_sum, total, weighted_sum

KeepProbability = Annotated[float, Field(gt=0, le=1, description="probability of keeping an element")]
Epsilon = Annotated[
    float, Field(ge=0, lt=1, description="the probability runs from density − ε for the smallest element to density + ε")
]
Gamma = Annotated[float, Field(ge=0, lt=1, description="share of the largest elements to drop")]
TopVariance = Annotated[float, Field(gt=0, le=1, description="share of the elements, those that vary most, to keep")]
Seed = Annotated[int, Field(ge=0, description="seed of the random masks")]
Sum = Annotated[Literal["sum", "mean"], Field(description="sum of the runs, or their weighted mean")]
Rescale = Annotated[
    Literal["unbiased", "l1", "none"],
    Field(description="divide by the probability of being kept, restore each tensor's L1 norm, or do neither"),
]
RescaleNorm = Annotated[Literal["l1", "none"], Field(description="restore each tensor's L1 norm, or not")]


def added(kept: Tensor, weights: Tensor, aggregate: Sum) -> Tensor:
    """Return Σ_t w_t τ̂_t, or Σ_t w_t τ̂_t / Σ_t w_t."""
    merged, whole = weighted_sum(kept, weights), run_sum(weights)
    return merged if aggregate == "sum" else merged / torch.where(whole == 0, 1, whole)


def l1_share(rows: Sequence[Tensor], keep: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Return the share of each run's L1 norm that `keep` (offset, τ (runs, n) → τ̂) retains (runs, 1); 1 if it is zero."""
    before = after = torch.zeros(len(rows), dtype=torch.float64, device=rows[0].device)
    for offset, deltas in blocks(rows, PIECE):
        before, after = before + total(deltas.abs()), after + total(keep(offset, deltas).abs())
    return torch.where(after > 0, after / before, 1).to(rows[0].dtype).unsqueeze(1)


# ----------------------------------------------------------------------------------------------------------------- dare


def uniform(like: Tensor, name: str, run: int, seed: int, offset: int = 0) -> Tensor:
    """Return 24-bit numbers in [0, 1) that depend only on seed, run, tensor and element: their hash (lowbias32).

    Args:
        like: tensor with the shape and device of the result.
        name: name of the tensor.
        run: index of the run.
        seed: seed of the masks.
        offset: index of the first element in the flat tensor.
    """
    digest = key_of(seed, run, name)
    start, stride = (int.from_bytes(part, "little", signed=True) for part in (digest[:4], digest[4:]))
    x = torch.arange(offset, offset + like.numel(), device=like.device).to(torch.int32)
    x.mul_(stride | 1).add_(start)
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(-0x7B935975)  # 0x846CA68B
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
    return (x >> 8).bitwise_and_(0xFFFFFF).to(torch.float32).mul_(2.0**-24).view(like.shape)


def dropped(deltas: Tensor, name: str, offset: int, density: Sequence[float], seed: int) -> Tensor:
    """Keep each element with probability `density`; zero elsewhere."""
    rows = zip(deltas, density, strict=True)
    keep = [uniform(delta, name, run, seed, offset) < share for run, (delta, share) in enumerate(rows)]
    return torch.where(torch.stack(keep), deltas, 0)


@provides("divisor")
def dare_divisor(
    rows: Sequence[Tensor], name: str, *, density: PerRun[KeepProbability] = 0.5, rescale: Rescale = "unbiased", seed: Seed = 0
) -> dict[str, Any]:
    """Return the divisor that compensates for the dropped elements of each run (runs, 1)."""
    shares = each(density, rows)
    if rescale == "l1":
        return {"divisor": l1_share(rows, lambda offset, deltas: dropped(deltas, name, offset, shares, seed))}
    return {"divisor": rows[0].new_tensor(shares if rescale == "unbiased" else [1.0] * len(rows)).unsqueeze(1)}


@merge_method("dare-linear", source="Yu et al. 2024", elementwise=True, relative_weights=False, tensor_pass=dare_divisor)
def dare_linear(
    deltas: Tensor,
    weights: Tensor,
    name: str,
    offset: int,
    *,
    divisor: Tensor,
    density: PerRun[KeepProbability] = 0.5,
    aggregate: Sum = "sum",
    seed: Seed = 0,
) -> tuple[Tensor, Tensor]:
    """Σ_t w_t τ̂_t, where τ̂_t keeps each element with probability `density`, divided by it; `mean` divides by Σ w_t."""
    kept = dropped(deltas, name, offset, each(density, deltas), seed) / divisor
    return added(kept, weights, aggregate), kept != 0


@merge_method("dare-ties", source="Yu et al. 2024", elementwise=True, relative_weights=False, tensor_pass=dare_divisor)
def dare_ties(
    deltas: Tensor,
    weights: Tensor,
    name: str,
    offset: int,
    *,
    divisor: Tensor,
    density: PerRun[KeepProbability] = 0.5,
    elect: Elect = "sum",
    aggregate: Aggregate = "mean",
    seed: Seed = 0,
) -> tuple[Tensor, Tensor]:
    """DARE's τ̂_t merged as by TIES: elect a sign, then average the values that have it."""
    kept = dropped(deltas, name, offset, each(density, deltas), seed) / divisor
    return consensus(kept, weights, elect=elect, aggregate=aggregate), kept != 0


# ---------------------------------------------------------------------------------------------------------------- della


def probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Return the probability of keeping each element: density − ε for the smallest of a row to density + ε for the largest."""
    if density == 1:
        return torch.ones_like(delta)
    if not epsilon < density < 1 - epsilon:
        where, expected = "`epsilon` of della", "density − ε and density + ε between 0 and 1"
        raise BadInput("impossible probabilities", where=where, expected=expected, found=f"density {density}, ε {epsilon}")
    rows = delta.flatten(1) if delta.ndim > 1 else delta.view(1, -1)
    order = rows.abs().argsort(dim=1, stable=True)
    places = torch.arange(rows.shape[1], device=delta.device, dtype=delta.dtype).expand_as(rows)
    rank = torch.empty_like(rows).scatter_(1, order, places)
    height = rank / (rows.shape[1] - 1) if rows.shape[1] > 1 else torch.full_like(rows, 0.5)
    return ((density - epsilon) + height * (2 * epsilon)).view_as(delta)


def pruned(
    deltas: Tensor, name: str, density: Sequence[float], epsilon: Sequence[float], rescale: Rescale, seed: int
) -> Tensor:
    """MAGPRUNE: keep each element with a probability that grows with its rank in its row, and rescale."""
    merged = []
    for run, (delta, share, half) in enumerate(zip(deltas, density, epsilon, strict=True)):
        probability = probabilities(delta, share, half)
        kept = torch.where(uniform(delta, name, run, seed) < probability, delta, 0)
        if rescale == "l1":
            kept = kept / l1_share([delta.flatten()], lambda at, x: kept.flatten()[at : at + x.shape[1]].view_as(x))  # noqa: B023
        merged.append(kept / probability if rescale == "unbiased" else kept)
    return torch.stack(merged)


@merge_method("della", source="Deep et al. 2024", relative_weights=False)
def della(
    deltas: Tensor,
    weights: Tensor,
    name: str,
    *,
    density: PerRun[KeepProbability] = 0.5,
    epsilon: PerRun[Epsilon] = 0.15,
    rescale: Rescale = "unbiased",
    elect: Elect = "sum",
    aggregate: Aggregate = "mean",
    seed: Seed = 0,
) -> tuple[Tensor, Tensor]:
    """MAGPRUNE's τ̂_t, which favour the larger elements of a row (probability density ± ε), merged as by TIES."""
    kept = pruned(deltas, name, each(density, deltas), each(epsilon, deltas), rescale, seed)
    return consensus(kept, weights, elect=elect, aggregate=aggregate), kept != 0


@merge_method("della-linear", source="Deep et al. 2024", relative_weights=False)
def della_linear(
    deltas: Tensor,
    weights: Tensor,
    name: str,
    *,
    density: PerRun[KeepProbability] = 0.5,
    epsilon: PerRun[Epsilon] = 0.15,
    rescale: Rescale = "unbiased",
    aggregate: Sum = "sum",
    seed: Seed = 0,
) -> tuple[Tensor, Tensor]:
    """Σ_t w_t τ̂_t with MAGPRUNE's τ̂_t; `mean` divides by Σ w_t."""
    kept = pruned(deltas, name, each(density, deltas), each(epsilon, deltas), rescale, seed)
    return added(kept, weights, aggregate), kept != 0


# ---------------------------------------------------------------------------------------------------------- breadcrumbs


@provides("tails", "divisor")
def cut_tails(
    rows: Sequence[Tensor],
    *,
    density: PerRun[Density] = 0.9,
    gamma: PerRun[Gamma] = 0.01,
    rescale: RescaleNorm = "none",
) -> dict[str, Any]:
    """Keep ⌊density·n⌋ elements of each tensor below its ⌊γ·n⌋ largest, or below fewer of these if not enough remain."""
    n = len(rows[0])
    counts = [int(share * n) for share in each(density, rows)]
    upper = [min(count + int(share * n), n) for count, share in zip(counts, each(gamma, rows), strict=True)]
    tails = largest(rows, upper), largest(rows, [most - count for most, count in zip(upper, counts, strict=True)])
    divisor = l1_share(rows, lambda offset, x: without(x, offset, tails)) if rescale == "l1" else rows[0].new_ones(1, 1)
    return {"tails": tails, "divisor": divisor}


def without(deltas: Tensor, offset: int, tails: tuple[Cut, Cut]) -> Tensor:
    """Keep the elements inside the first cut and outside the second; zero elsewhere."""
    inside, above = (cut.mask(deltas, offset) for cut in tails)
    return torch.where(inside & ~above, deltas, 0)


@merge_method(
    "breadcrumbs", source="Davari and Belilovsky 2024", elementwise=True, relative_weights=False, tensor_pass=cut_tails
)
def breadcrumbs(
    deltas: Tensor, weights: Tensor, offset: int, *, tails: tuple[Cut, Cut], divisor: Tensor, aggregate: Sum = "sum"
) -> tuple[Tensor, Tensor]:
    """Σ_t w_t τ̂_t, where τ̂_t lacks the share γ of the largest elements and the smallest; `mean` divides by Σ w_t."""
    kept = without(deltas, offset, tails) / divisor
    return added(kept, weights, aggregate), kept != 0


@merge_method(
    "breadcrumbs-ties", source="Davari and Belilovsky 2024", elementwise=True, relative_weights=False, tensor_pass=cut_tails
)
def breadcrumbs_ties(
    deltas: Tensor,
    weights: Tensor,
    offset: int,
    *,
    tails: tuple[Cut, Cut],
    divisor: Tensor,
    elect: Elect = "sum",
    aggregate: Aggregate = "mean",
) -> tuple[Tensor, Tensor]:
    """The τ̂_t of Breadcrumbs merged as by TIES."""
    kept = without(deltas, offset, tails) / divisor
    return consensus(kept, weights, elect=elect, aggregate=aggregate), kept != 0


# ------------------------------------------------------------------------------------------------------------------ sce


def variance(deltas: Tensor) -> Tensor:
    """Return the variance over the runs (1, n)."""
    centre = run_sum(deltas) / len(deltas)
    return (run_sum((delta - centre).square() for delta in deltas) / len(deltas)).unsqueeze(0)


@provides("cut", "energies")
def select_and_weigh(rows: Sequence[Tensor], *, density: PerTensor[TopVariance] = 1.0) -> dict[str, Any]:
    """Select the elements that vary most, and compute the share of each run in their energy Σ τ̂_t²."""
    cut = None
    if density < 1:
        whole = torch.cat([variance(deltas)[0] for _, deltas in blocks(rows, PIECE)])
        cut = largest([whole], [int(whole.count_nonzero() * density)])
    energy = torch.zeros(len(rows), dtype=torch.float64, device=rows[0].device)
    for offset, deltas in blocks(rows, PIECE):
        energy = energy + total(selected(deltas, offset, cut).double().square())
    whole = run_sum(energy)
    return {"cut": cut, "energies": torch.where(whole > 0, energy / whole, 1).to(rows[0].dtype)}


def selected(deltas: Tensor, offset: int, cut: Cut | None) -> Tensor:
    """Keep the elements that vary enough, zero elsewhere."""
    return deltas if cut is None else torch.where(cut.mask(variance(deltas), offset), deltas, 0)


@merge_method("sce", source="Wan et al. 2024", elementwise=True, tensor_pass=select_and_weigh)
def sce(deltas: Tensor, offset: int, *, cut: Cut | None, energies: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the share `density` that varies most over the runs, weight runs by energy Σ τ̂_t², erase minority signs."""
    kept = selected(deltas, offset, cut)
    return consensus(kept, energies, elect="sum", aggregate="mean"), kept != 0
