"""Losses and accuracies of an artefact, and the columns of the figures that are measured of every artefact."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from emomerge.experiment.costs import Cost
from emomerge.probing.basics import mean_score
from emomerge.probing.registry import Array
from emomerge.results import Column, Estimate, View
from emomerge.results import Split as SplitName
from emomerge.tasks import Batch, Split, Task

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
    names, figures = _row_figures(task, model, [batch])
    return _means(names, figures, [figures.shape[1]])[0]


class Scorer:
    """Scores of the batches of a split.

    Small batches serve the bootstrap, which needs many of them, but they make slow forward passes. The rows of several batches
    are therefore evaluated together, in wider passes and in the order of their lengths, so that few tokens are padding.

    Args:
        split: the data.
        rows: the rows that are scored, in order.
        size: number of rows in a batch.
        width: number of rows in a forward pass.
        device: where the model is.
    """

    PASSES = 8
    """Forward passes whose rows are sorted, and whose scores are stored, together."""

    def __init__(self, split: Split, rows: Tensor, *, size: int, width: int, device: torch.device) -> None:
        self._split, self._width, self._device = split, width, device
        self._batches = rows.split(size)
        self.sizes = [len(batch) for batch in self._batches]
        self.together = max(1, self.PASSES * width // size)
        """Number of batches that are evaluated together."""
        self.passes = sum(-(-len(part) // width) for part in rows.split(size * self.together))
        """Number of forward passes for all batches."""
        self._inputs: dict[int, tuple[list[Batch], Tensor]] = {}

    def scores(
        self, task: Task, model: nn.Module, batches: Sequence[int], on_passes: Callable[[float], None] = lambda passes: None
    ) -> list[dict[str, float]]:
        """Return what `score` does for some batches, by their numbers.

        Args:
            task: gives the figures of rows.
            model: in eval mode.
            batches: numbers of batches.
            on_passes: called with the number of forward passes that were just made.
        """
        found: dict[int, dict[str, float]] = {}
        for first in dict.fromkeys(number - number % self.together for number in batches):
            passes, places = self._passes(first)
            names, figures = _row_figures(task, model, passes)
            on_passes(len(passes))
            sizes = self.sizes[first : first + self.together]
            found |= dict(enumerate(_means(names, figures[:, places], sizes), first))
        return [found[number] for number in batches]

    def mean_loss(self, task: Task, model: nn.Module) -> float:
        """Return the mean loss of all rows."""
        rows = self.scores(task, model, range(len(self.sizes)))
        return float(np.average([row["loss"] for row in rows], weights=[row["weight"] for row in rows]))

    def _passes(self, first: int) -> tuple[list[Batch], Tensor]:
        """Return the inputs of the forward passes for the batches from `first` on, and where in them each row comes."""
        if first not in self._inputs:
            rows = torch.cat(self._batches[first : first + self.together])
            order = self._split.lengths[rows].argsort(stable=True)
            passes = [self._split.batch(part) for part in rows[order].split(self._width)]
            moved = [{name: field.to(self._device) for name, field in inputs.items()} for inputs in passes]
            self._inputs[first] = moved, order.argsort().to(self._device)
        return self._inputs[first]


def by_length(split: Split, rows: Tensor, size: int) -> Tensor:
    """Return rows in an order in which batches of `size` hold rows of similar length, and each batch its rows in order.

    Batches padded to their longest row then hold little padding. Without lengths the order stays as it is.
    """
    batches = rows[split.lengths[rows].argsort(stable=True)].split(size)
    return torch.cat([batch.sort().values for batch in batches])


def _row_figures(task: Task, model: nn.Module, passes: Sequence[Batch]) -> tuple[list[str], Tensor]:
    """Return the names of the figures that the task has of a row, `weight` first, and the figures (names, rows)."""
    parts = []
    with torch.inference_mode():
        for batch in passes:
            found = task.row_figures(model, batch)
            known = {name: figure for name, figure in found._asdict().items() if figure is not None and name != "weight"}
            parts.append(torch.stack([found.weight.to(found.loss.dtype), *known.values()]))
    return ["weight", *known], torch.cat(parts, dim=1)


def _means(names: Sequence[str], figures: Tensor, sizes: Sequence[int]) -> list[dict[str, float]]:
    """Return the weighted means over consecutive rows (`sizes` of them each) and their total weights."""
    weight, figures = figures[0], figures[1:]
    parts = zip((figures * weight).split([*sizes], dim=1), weight.split([*sizes]), strict=True)
    means = torch.stack([torch.cat([rows.sum(dim=1) / weights.sum(), weights.sum()[None]]) for rows, weights in parts])
    return [dict(zip([*names[1:], names[0]], row, strict=True)) for row in means.tolist()]
