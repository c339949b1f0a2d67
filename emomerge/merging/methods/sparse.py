"""Sparsify the task vectors, then add them up or merge them as TIES does: DARE, DELLA, Breadcrumbs, SCE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from emomerge.errors import BadInput
from emomerge.merging.methods.ties import Aggregate, Density, Elect, consensus, each
from emomerge.merging.registry import merge_method
from emomerge.merging.settings import PerRun, PerTensor
from emomerge.merging.thresholds import Cut, largest
from emomerge.merging.vectors import blocks
from emomerge.numerics.seeds import key_of
from emomerge.numerics.sums import PIECE, run_sum, total, weighted_sum

Share = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0)]
Sum = Literal["sum", "mean"]
Rescale = Literal["unbiased", "l1", "none"]
"""Divide by the probability of being kept; restore the L1 norm of each tensor; leave as it is."""


def added(kept: Tensor, weights: Tensor, aggregate: Sum) -> Tensor:
    """Σ_t w_t τ̂_t, or Σ_t w_t τ̂_t / Σ_t w_t."""
    merged, whole = weighted_sum(kept, weights), run_sum(weights)
    return merged if aggregate == "sum" else merged / torch.where(whole == 0, 1, whole)


def l1_share(rows: Sequence[Tensor], keep: Callable[[int, Tensor], Tensor]) -> Tensor:
    """The share of each run's L1 norm that `keep` (offset, τ (runs, n) → τ̂) leaves (runs, 1); 1 where that is nothing."""
    before = after = torch.zeros(len(rows), dtype=torch.float64, device=rows[0].device)
    for offset, deltas in blocks(rows, PIECE):
        before, after = before + total(deltas.abs()), after + total(keep(offset, deltas).abs())
    return torch.where(after > 0, after / before, 1).to(rows[0].dtype).unsqueeze(1)


# ----------------------------------------------------------------------------------------------------------------- dare


def uniform(like: Tensor, name: str, run: int, seed: int, offset: int = 0) -> Tensor:
    """Numbers in [0, 1) of 24 bits that depend on seed, run, tensor and element alone: a hash of these (lowbias32).

    Args:
        like: shape and device.
        offset: the place of its first element in the flat tensor.
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
    """Every element kept with the probability `density`, zero elsewhere."""
    rows = zip(deltas, density, strict=True)
    keep = [uniform(delta, name, run, seed, offset) < share for run, (delta, share) in enumerate(rows)]
    return torch.where(torch.stack(keep), deltas, 0)


def dare_divisor(
    rows: Sequence[Tensor], name: str, *, density: PerRun[Density] = 0.5, rescale: Rescale = "unbiased", seed: Seed = 0
) -> dict[str, Any]:
    """What makes up for the dropped elements of each run (runs, 1)."""
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
    density: PerRun[Density] = 0.5,
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
    density: PerRun[Density] = 0.5,
    elect: Elect = "sum",
    aggregate: Aggregate = "mean",
    seed: Seed = 0,
) -> tuple[Tensor, Tensor]:
    """DARE's τ̂_t joined as by TIES: an elected sign, then the average of what has it."""
    kept = dropped(deltas, name, offset, each(density, deltas), seed) / divisor
    return consensus(kept, weights, elect=elect, aggregate=aggregate), kept != 0


# ---------------------------------------------------------------------------------------------------------------- della


def probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Of being kept: from density − ε for the smallest magnitude of a row to density + ε for the largest."""
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
    """MAGPRUNE: every element kept with a probability that grows with its rank in its row, rescaled."""
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
    density: PerRun[Density] = 0.5,
    epsilon: PerRun[Share] = 0.15,
    rescale: Rescale = "unbiased",
    elect: Elect = "sum",
    aggregate: Aggregate = "mean",
    seed: Seed = 0,
) -> tuple[Tensor, Tensor]:
    """MAGPRUNE's τ̂_t, which keep an element the likelier (density ± ε) the larger it is in its row, joined as by TIES."""
    kept = pruned(deltas, name, each(density, deltas), each(epsilon, deltas), rescale, seed)
    return consensus(kept, weights, elect=elect, aggregate=aggregate), kept != 0


@merge_method("della-linear", source="Deep et al. 2024", relative_weights=False)
def della_linear(
    deltas: Tensor,
    weights: Tensor,
    name: str,
    *,
    density: PerRun[Density] = 0.5,
    epsilon: PerRun[Share] = 0.15,
    rescale: Rescale = "unbiased",
    aggregate: Sum = "sum",
    seed: Seed = 0,
) -> tuple[Tensor, Tensor]:
    """Σ_t w_t τ̂_t with MAGPRUNE's τ̂_t; `mean` divides by Σ w_t."""
    kept = pruned(deltas, name, each(density, deltas), each(epsilon, deltas), rescale, seed)
    return added(kept, weights, aggregate), kept != 0


# ---------------------------------------------------------------------------------------------------------- breadcrumbs


def cut_tails(
    rows: Sequence[Tensor],
    *,
    density: PerRun[Density] = 0.9,
    gamma: PerRun[Share] = 0.01,
    rescale: Literal["l1", "none"] = "none",
) -> dict[str, Any]:
    """Of each tensor ⌊density·n⌋ elements below the ⌊γ·n⌋ largest, or as few of these as leave enough."""
    n = len(rows[0])
    counts = [int(share * n) for share in each(density, rows)]
    upper = [min(count + int(share * n), n) for count, share in zip(counts, each(gamma, rows), strict=True)]
    tails = largest(rows, upper), largest(rows, [most - count for most, count in zip(upper, counts, strict=True)])
    divisor = l1_share(rows, lambda offset, x: without(x, offset, tails)) if rescale == "l1" else rows[0].new_ones(1, 1)
    return {"tails": tails, "divisor": divisor}


def without(deltas: Tensor, offset: int, tails: tuple[Cut, Cut]) -> Tensor:
    """What is among the elements of the first cut and not of the second; zero elsewhere."""
    inside, above = (cut.mask(deltas, offset) for cut in tails)
    return torch.where(inside & ~above, deltas, 0)


@merge_method(
    "breadcrumbs", source="Davari and Belilovsky 2024", elementwise=True, relative_weights=False, tensor_pass=cut_tails
)
def breadcrumbs(
    deltas: Tensor, weights: Tensor, offset: int, *, tails: tuple[Cut, Cut], divisor: Tensor, aggregate: Sum = "sum"
) -> tuple[Tensor, Tensor]:
    """Σ_t w_t τ̂_t, where τ̂_t lacks the share γ of largest elements and the smallest; `mean` divides by Σ w_t."""
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
    """The τ̂_t of Breadcrumbs joined as by TIES."""
    kept = without(deltas, offset, tails) / divisor
    return consensus(kept, weights, elect=elect, aggregate=aggregate), kept != 0


# ------------------------------------------------------------------------------------------------------------------ sce


def variance(deltas: Tensor) -> Tensor:
    """Over the runs, (1, n)."""
    centre = run_sum(deltas) / len(deltas)
    return (run_sum((delta - centre).square() for delta in deltas) / len(deltas)).unsqueeze(0)


def select_and_weigh(rows: Sequence[Tensor], *, density: PerTensor[Density] = 1.0) -> dict[str, Any]:
    """The elements that vary most, and the share of each run in their energy Σ τ̂_t²."""
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
    """What varies enough, zero elsewhere."""
    return deltas if cut is None else torch.where(cut.mask(variance(deltas), offset), deltas, 0)


@merge_method("sce", source="Wan et al. 2024", elementwise=True, tensor_pass=select_and_weigh)
def sce(deltas: Tensor, offset: int, *, cut: Cut | None, energies: Tensor) -> tuple[Tensor, Tensor]:
    """Select the share `density` that varies most over the runs, weight runs by energy Σ τ̂_t², erase minority signs."""
    kept = selected(deltas, offset, cut)
    return consensus(kept, energies, elect="sum", aggregate="mean"), kept != 0
