"""Weighted averages of the runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from emomerge.checkpoints import Checkpoint, all_finite, open_checkpoint
from emomerge.errors import BadInput
from emomerge.merging.native import StoredTensor
from emomerge.merging.registry import RunFiles, merge_method, provides
from emomerge.merging.vectors import TaskVectors
from emomerge.numerics.sums import run_sum, weighted_sum

if TYPE_CHECKING:
    from emomerge.merging.diagnostics import Figures


def task_arithmetic_native(stored: StoredTensor, weights: Tensor, figures: Figures) -> tuple[Tensor, bool]:
    """Compiled version."""
    return stored.merge("linear", weights, figures=figures), False


@merge_method(
    "task-arithmetic",
    source="Ilharco et al. 2023",
    elementwise=True,
    relative_weights=False,
    incremental=True,
    native=task_arithmetic_native,
)
def task_arithmetic(deltas: Tensor, weights: Tensor) -> Tensor:
    """Σ_t w_t τ_t, with w_t as given (1 by default, negative to forget)."""
    return weighted_sum(deltas, weights)


def mean_native(stored: StoredTensor, weights: Tensor, figures: Figures) -> tuple[Tensor, bool]:
    """Compiled version."""
    return stored.merge("linear", weights, options=(1,), figures=figures), False


@merge_method("mean", source="Wortsman et al. 2022; Ramé et al. 2022", elementwise=True, incremental=True, native=mean_native)
def mean(deltas: Tensor, weights: Tensor) -> Tensor:
    """Σ_t w_t τ_t / Σ_t w_t."""
    return weighted_sum(deltas, weights) / len(deltas)


# ---------------------------------------------------------------------------------------------------------- greedy-soup


@provides("chosen", "members")
def choose_members(vectors: TaskVectors) -> dict[str, Any]:
    """Start from the best run; add each further run, best first, if the mean including it is no worse on held-out data."""
    losses = vectors.run_losses("greedy-soup")
    best, *others = sorted(range(len(vectors)), key=losses.__getitem__)
    chosen: tuple[int, ...] = (best,)
    lowest = losses[best]
    for run in others:
        candidate = (*chosen, run)
        loss = vectors.loss_of(
            lambda _, deltas: greedy_soup(deltas, chosen=candidate),  # noqa: B023
            "greedy-soup", weights=dict.fromkeys(candidate, 1.0), over=len(candidate),
        )  # fmt: skip
        if loss <= lowest:
            chosen, lowest = candidate, loss
    return {"chosen": chosen, "members": tuple(vectors.labels[run] for run in chosen)}


@merge_method("greedy-soup", source="Wortsman et al. 2022", elementwise=True, needs_loss=True, first_pass=choose_members)
def greedy_soup(deltas: Tensor, *, chosen: tuple[int, ...]) -> Tensor:
    """The plain mean of the runs that a greedy search by held-out loss picks."""
    return run_sum(deltas[run] for run in chosen) / len(chosen)


# --------------------------------------------------------------------------------------------------------------- fisher


def squared_gradients_of(run: str) -> Path | None:
    """Find fisher.safetensors in a source's run directory; EmoSens writes it when it trains all weights."""
    for folder in (Path(run), *Path(run).parents[:2]):
        if (folder / "run.json").is_file() and (file := folder / "fisher.safetensors").is_file():
            return file
    return None


Information = Annotated[
    tuple[str, ...],
    RunFiles(squared_gradients_of),
    Field(description="one file of squared gradients per run; by default fisher.safetensors of its run directory"),
]


@provides("opened")
def open_information(vectors: TaskVectors, *, information: Information = ()) -> dict[str, Any]:
    """Open the F_t of each run: checkpoints with the base's tensor names and shapes."""
    information = information or tuple(str(squared_gradients_of(run.source) or "") for run in vectors.runs)
    for label, path in zip(vectors.labels, information, strict=False):
        if not path:
            raise BadInput(
                "a run without squared gradients",
                where=label,
                expected="fisher.safetensors in its directory, which EmoSens leaves when it trains all weights",
                fix="name a file for each run: `information`",
            )
    if len(information) != len(vectors):
        raise BadInput(
            "`information` does not fit the runs",
            where="fisher",
            expected=f"{len(vectors)} files of squared gradients, one for each run",
            found=len(information),
        )
    opened = [open_checkpoint(Path(path)) for path in information]
    for name in vectors.names:
        for fisher in opened:
            expected = vectors.base.info(name).shape
            if name not in fisher or fisher.info(name).shape != expected:
                found = list(fisher.info(name).shape) if name in fisher else "no such tensor"
                raise BadInput(
                    "information does not fit the base",
                    where=f"{name} in {fisher.source}",
                    expected=list(expected),
                    found=found,
                )
    return {"opened": opened}


@merge_method("fisher", source="Matena and Raffel 2022", first_pass=open_information)
def fisher(deltas: Tensor, weights: Tensor, name: str, *, opened: Sequence[Checkpoint]) -> Tensor:
    """Σ_t w_t F_t τ_t / Σ_t w_t F_t, F_t the runs' mean squared gradients; the mean where all F_t are zero."""
    weighted, whole = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, weight, checkpoint in zip(deltas, weights, opened, strict=True):
        f = checkpoint[name].to(delta)
        if not all_finite(f) or (f < 0).any():
            raise BadInput("squared gradients must be finite and not negative", where=f"{name} in {checkpoint.source}")
        weighted += weight * f * delta
        whole += weight * f
    return torch.where(whole > 0, weighted / whole.where(whole > 0, 1), mean(deltas, weights))
