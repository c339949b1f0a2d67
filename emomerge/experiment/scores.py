"""Losses and accuracies of an artefact, and the columns of the figures that are measured of every artefact."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import nn

from emomerge.experiment.costs import Cost
from emomerge.probing.basics import mean_score
from emomerge.probing.registry import Array
from emomerge.results import Column, Estimate, View
from emomerge.results import Split as SplitName
from emomerge.tasks import Batch, Task

Figure: TypeAlias = tuple[Column, Estimate]

DISTANCE = Column(key="distance", title="distance", meaning="‖θ − θ₀‖, the length of the task vector")
COSINE = Column(
    key="cosine_to_mean", title="cos to mean", views=("table",), decimals=3,
    meaning="cosine between the task vector and the mean of the runs' task vectors",
)  # fmt: skip
ENTROPY = Column(
    key="entropy", title="entropy", views=("table",),
    meaning="mean entropy of the predictions (nats); confident models look flatter",
)  # fmt: skip
GRADIENT_NORM = Column(key="grad_norm", title="‖∇L‖", meaning="norm of the gradient at the artefact", views=("table",))

EXAMPLES = Column(
    key="examples", title="examples", views=("table", "terminal"), decimals=0,
    meaning="rows passed forward and backward to train everything that the artefact was made of or chosen from",
)  # fmt: skip
CPU_SECONDS = Column(
    key="cpu_seconds", title="CPU s", views=("table", "terminal"), digits=2,
    meaning="CPU seconds of that training and of merging; runs that share a pass share its time",
)  # fmt: skip


def cost_figures(cost: Cost | None) -> list[Figure]:
    """Return the columns and figures of a cost, without the CPU time if it is unknown."""
    if cost is None:
        return []
    seconds = [] if cost.cpu_seconds is None else [(CPU_SECONDS, exact(cost.cpu_seconds))]
    return [(EXAMPLES, exact(cost.examples)), *seconds]


def score_figures(split: SplitName, scores: Mapping[str, Array], unit: str, *, perplexity: bool) -> list[Figure]:
    """Return the columns and figures of a split: mean loss, perplexity and accuracy."""
    everywhere: tuple[View, ...] = ("table", "card", "terminal")
    of_loss: dict[SplitName, tuple[View, ...]] = {"train": ("table",), "validation": everywhere, "test": everywhere}
    of_accuracy: dict[SplitName, tuple[View, ...]] = {"train": ("table",), "validation": ("table", "card"), "test": everywhere}
    mean = mean_score(scores, "loss")
    loss = Column(
        key=f"{split}_loss", title=f"{split} loss", meaning=f"mean loss on the {split} rows ({unit})", better="lower",
        views=of_loss[split], digits=4,
    )  # fmt: skip
    figures = [(loss, exact(mean))]
    if perplexity:
        meaning = f"exp of the {split} loss: among so many equally likely tokens the next one is as hard to guess"
        title, key = "perplexity", f"{split}_perplexity"
        column = Column(key=key, title=title, meaning=meaning, better="lower", views=("table",))
        figures.append((column, exact(math.exp(min(mean, 700.0)))))
    if "accuracy" in scores:
        accuracy = Column(
            key=f"{split}_accuracy", title=f"{split} acc.", meaning=f"accuracy on the {split} rows", better="higher",
            views=of_accuracy[split], percent=True,
        )  # fmt: skip
        figures.append((accuracy, exact(mean_score(scores, "accuracy"))))
    return figures


def exact(value: float) -> Estimate:
    """Return a figure without sampling error."""
    return Estimate(mean=value)


def score(task: Task, model: nn.Module, batch: Batch) -> dict[str, float]:
    """Return mean loss and weight of a batch, and mean accuracy and predictive entropy if the task has them."""
    with torch.inference_mode():
        rows = task.row_figures(model, batch)
        found = {name: figure for name, figure in rows._asdict().items() if figure is not None and name != "weight"}
        means = (torch.stack([*found.values()]) * rows.weight).sum(dim=1) / rows.weight.sum()
    return dict(zip(found, means.tolist(), strict=True)) | {"weight": float(rows.weight.sum())}
