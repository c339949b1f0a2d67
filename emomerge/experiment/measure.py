"""What is measured of each artefact of a recipe: losses, sharpness, α-curve, and its distance-matched control.

One live model serves all artefacts: their weights are streamed into it in turn. Choices (weights, λ, scale, greedy soup,
the selected artefact) see the validation split only; the reported held-out figures come from the test split.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from emomerge.checkpoints import Checkpoint, load_into
from emomerge.merging import merge
from emomerge.numerics.hashing import bytes_of, digest
from emomerge.probing import controls, hessian, landscape, report, sharpness, worst_case
from emomerge.probing.ledger import Ledger
from emomerge.probing.perturb import Perturbable, rms
from emomerge.probing.registry import Measurement
from emomerge.progress import Line
from emomerge.recipe import Recipe
from emomerge.results import (
    ArtefactRow,
    Column,
    Curve,
    Density,
    Estimate,
    Hessian,
    Matrix,
    Plane,
    Point,
    Subspace,
    Surface,
    View,
)  # fmt: skip
from emomerge.tasks import Batch, Split, Task, TaskData

Array = NDArray[np.float64]
PRESETS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "quick": ("gaussian", "curve"),
        "standard": ("gaussian", "curve", "adaptive", "hessian", "basin", "barriers"),
        "full": ("gaussian", "curve", "adaptive", "hessian", "basin", "barriers", "worst-case", "plane", "surface"),
    }
)
"""What is measured; `barriers`, `plane` and `surface` look at several artefacts at once."""
BY_DIRECTION = ("gaussian", "adaptive")
"""Metrics whose directions can be taken apart."""
HESSIAN_PARTS = 16
"""The rows of the probe are cut into so many batches for the Hessian: what its intervals are resampled over."""
SplitName = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Artefact:
    """A set of weights that is measured: base, run, merge or control."""

    name: str
    role: Literal["base", "run", "merge", "control"]
    checkpoint: Checkpoint
    hash: str
    """What the ledger files it under: equal hashes mean equal weights."""
    path: Path | None = None
    optimizer: str | None = None
    seed: int | None = None
    control: str | None = None
    of: str | None = None
    seconds: float | None = None
    """Wall time it took to make."""
    sha256: str | dict[str, str] | None = None
    """Of the weights, or of each file."""
    method: str | None = None
    """Merge method."""
    cosine_to_mean: float | None = None
    """Between its task vector and the mean of the runs'."""


@dataclass(frozen=True)
class Measured:
    """All figures of one artefact."""

    row: ArtefactRow
    """For the report."""
    columns: tuple[Column, ...]
    """Of the row's estimates, in the order of the tables."""
    values: Mapping[str, Array]
    """For paired statistics: `gaussian` (radii, directions, units), `λmax` (1, batches), `trace` (probes, batches)."""
    weights: Mapping[str, Array]
    """Of the units or batches of each, summing to one."""
    curve: Curve | None

    def figures(self, metric: str, radius: int | None = None) -> Array:
        """Values of a metric, or of one of its radii, each row a direction."""
        return self.values[metric] if radius is None else self.values[metric][radius]


class Measurer:
    """Measures artefacts of one recipe on one model.

    Args:
        recipe, task, data: what is learnt.
        base: the weights every artefact started from.
        base_folder: where the base's model is rebuilt from.
        base_hash: the base's hash.
        device: where the model lives.
        ledger: file that remembers evaluations.
        known: another one, which is only read.
    """

    def __init__(
        self, recipe: Recipe, task: Task, data: TaskData, base: Checkpoint, base_folder: Path, base_hash: str,
        device: torch.device, ledger: Path | None, *, known: Path | None = None,
    ) -> None:  # fmt: skip
        torch.backends.cudnn.allow_tf32 = False  # convolutions in TF32 would round small perturbations away
        self.recipe, self.task, self.data, self.base = recipe, task, data, base
        self.base_hash, self.base_folder = base_hash, base_folder
        self.device = device
        self.ledger = Ledger(ledger, known)
        self.model: nn.Module = task.reload_model(base_folder, trust_remote_code=recipe.base.trust_remote_code).to(device)
        load_into(self.model, base)
        self.base_parameters = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.reference = rms(self.model)
        self._loaded: str | None = None

    # What is evaluated on.

    @cached_property
    def probe_rows(self) -> dict[SplitName, Tensor]:
        """Rows of the training sample, and of the probe's split, drawn with the probe's seed."""
        probe, generator = self.recipe.probe, torch.Generator().manual_seed(self.recipe.probe.seed)
        names: tuple[SplitName, ...] = ("train", "test")
        count = probe.batches * probe.batch_size
        return {n: torch.randperm(len(self.split(n)), generator=generator)[:count].sort().values for n in names}

    def split(self, name: SplitName) -> Split:
        """One split of the data."""
        split: Split = getattr(self.data, name)
        return split

    def batches(self, name: SplitName) -> list[Batch]:
        """A split in batches on the device: the probe's sample of the training data, everything of the others."""
        return self._batches[name]

    @cached_property
    def _batches(self) -> dict[SplitName, list[Batch]]:
        size = self.recipe.probe.batch_size
        validation, test = len(self.data.validation), len(self.data.test)
        return {
            "train": self._cut(self.data.train, self.probe_rows["train"], size),
            # Small batches: the bootstrap over batches needs many of them.
            "validation": self._cut(self.data.validation, torch.arange(validation), max(1, min(size, validation // 50))),
            "test": self._cut(self.data.test, torch.arange(test), max(1, min(size, test // 50))),
        }

    def _cut(self, split: Split, rows: Tensor, size: int) -> list[Batch]:
        return [{k: v.to(self.device) for k, v in split.batch(part).items()} for part in rows.split(size)]

    # Single artefacts.

    def load(self, artefact: Artefact) -> None:
        """Put an artefact's weights into the model."""
        if self._loaded != artefact.hash:
            self._loaded = None
            load_into(self.model, artefact.checkpoint)
            self._loaded = artefact.hash

    def held_out_loss(self, checkpoint: Checkpoint) -> float:
        """Mean validation loss of any weights: what merges choose by."""
        self._loaded = None
        load_into(self.model, checkpoint)
        rows = [score(self.task, self.model, batch) for batch in self.batches("validation")]
        return float(np.average([row["loss"] for row in rows], weights=[row["weight"] for row in rows]))

    def scores(self, artefact: Artefact, split: SplitName) -> dict[str, Array]:
        """Loss, accuracy, entropy and weight of every batch of a split, each (batches,)."""
        batches = self.batches(split)
        rows = self.probe_rows["train"].tolist() if split == "train" else None
        data = digest([self.split(split).digest, split, rows, [len(next(iter(batch.values()))) for batch in batches]])
        if not self._is_known(artefact, data, split, len(batches)):
            self.load(artefact)
        return controls.scores(
            self.model, batches, lambda model, batch: score(self.task, model, batch),
            ledger=self.ledger, model_hash=artefact.hash, data_hash=data, split=split,
        )  # fmt: skip

    def _is_known(self, artefact: Artefact, data: str, split: SplitName, batches: int) -> bool:
        return all(
            self.ledger.get(
                model=artefact.hash, data=data, metric=f"scores of {split}", radius=0.0, direction=None, batch=index
            )
            for index in range(batches)
        )

    def loss(self, artefact: Artefact, split: SplitName) -> float:
        """Mean loss over a split."""
        return controls.mean_score(self.scores(artefact, split), "loss")

    def probe(self, artefact: Artefact, line: Line, metrics: Sequence[str]) -> Measured:
        """All figures of one artefact: losses, gradient norm and distance, and those of `metrics` that look at one artefact."""
        self.load(artefact)
        probe = self._perturbable(artefact)
        values: dict[str, Array] = {}
        weights: dict[str, Array] = {}
        gradient_norm = controls.gradient_norm(probe)
        found: report.Figures = []
        curvature: Hessian | None = None
        if "gaussian" in metrics:
            shaken = self.shaken(artefact, "gaussian", on_direction=lambda _: line.add(1, artefact.name))
            values["gaussian"], weights["gaussian"] = shaken.values, sharpness.weights(probe)
            found += report.gaussian(shaken.summary)
        if "hessian" in metrics:
            figures, curvature, run, trace = self._hessian(artefact)
            found += figures
            values |= {"λmax": np.array([run.largest.units]), "trace": trace.values}
            weights |= {"λmax": np.array(run.weight), "trace": trace.weight}
            line.add(1, f"{artefact.name}: Hessian")
        if "basin" in metrics:
            found += report.basin(sharpness.basin(probe).summary)
            line.add(1, f"{artefact.name}: basin")
        if "adaptive" in metrics:
            found += report.adaptive(self.shaken(artefact, "adaptive").summary)
            line.add(1, f"{artefact.name}: adaptive")
        if "worst-case" in metrics:
            found += report.worst_case(worst_case.worst_case(probe).summary)
            line.add(1, f"{artefact.name}: worst case")
        curve = None
        if "curve" in metrics and artefact.role in ("run", "merge"):
            curve = Curve.model_validate(landscape.alpha_curve(probe, self.base_parameters).summary)
        found = self._with_scores(artefact, found, gradient_norm)
        row = ArtefactRow(
            name=artefact.name, role=artefact.role, path=None if artefact.path is None else str(artefact.path),
            optimizer=artefact.optimizer, seed=artefact.seed, control=artefact.control, of=artefact.of,
            seconds=artefact.seconds, sha256=artefact.sha256, method=artefact.method,
            estimates={column.key: estimate for column, estimate in found}, hessian=curvature,
        )  # fmt: skip
        return Measured(row, tuple(column for column, _ in found), values, weights, curve)

    def _with_scores(self, artefact: Artefact, found: report.Figures, gradient_norm: float) -> report.Figures:
        """Put figures among those that need no perturbation, in the order of the tables."""
        self.load(artefact)
        distance = controls.distance(self.model, self.base_parameters)
        splits: tuple[SplitName, ...] = ("test", "validation", "train")
        scores = {split: self.scores(artefact, split) for split in splits}
        test, validation, train = (
            score_figures(split, scores[split], self.task.unit, perplexity=self.task.perplexity and split == "test")
            for split in splits
        )
        figures = [*test, *found, (DISTANCE, exact(distance)), *validation, *train]
        if artefact.cosine_to_mean is not None:
            figures.append((COSINE, exact(artefact.cosine_to_mean)))
        if "entropy" in scores["train"]:
            figures.append((ENTROPY, exact(controls.mean_score(scores["train"], "entropy"))))
        return [*figures, (GRADIENT_NORM, exact(gradient_norm))]

    def shaken(
        self,
        artefact: Artefact,
        metric: str,
        numbers: Sequence[int] | None = None,
        on_direction: Callable[[int], None] = lambda number: None,
    ) -> Measurement:
        """`gaussian` or `adaptive` sharpness of the loaded artefact, in all directions or in those of some numbers."""
        recipe = self.recipe.probe
        directions = recipe.directions if numbers is None else numbers
        function = sharpness.gaussian if metric == "gaussian" else sharpness.adaptive
        radii = recipe.radii if metric == "gaussian" else recipe.adaptive_radii
        return function(self._perturbable(artefact), radii, directions, on_direction)

    def take(self, artefact: Artefact, metric: str, numbers: Sequence[int]) -> None:
        """Evaluate what one metric needs of one artefact, for the ledger; of directions those of some numbers."""
        self.load(artefact)
        if metric in BY_DIRECTION:
            self.shaken(artefact, metric, numbers)
        elif metric == "hessian":
            self._hessian(artefact)
        elif metric == "basin":
            sharpness.basin(self._perturbable(artefact))
        else:
            worst_case.worst_case(self._perturbable(artefact))

    def _hessian(self, artefact: Artefact) -> tuple[report.Figures, Hessian, hessian.Lanczos, hessian.Trace]:
        """λmax, λmin and the trace; the density and the trace's parts; and what they were made of."""
        probe = self._perturbable(artefact, parts=HESSIAN_PARTS)
        run = hessian.lanczos(probe, self.recipe.probe.lanczos_steps)
        found = hessian.trace(probe, self.recipe.probe.trace_probes, lanczos=run)
        ends, curve, trace = run.summary(), hessian.density([run]), found.summary()
        payload = Hessian(
            density=Density(at=tuple(curve["eigenvalue"]), density=tuple(curve["density"])) if curve else None,
            layers={module: part["mean"] for module, part in trace["modules"].items()},
            step=run.step, disagreement=run.disagreement,
        )  # fmt: skip
        return report.hessian(ends["largest"], trace, ends["smallest"]), payload, run, found

    def span(self, artefact: Artefact, runs: Sequence[Artefact]) -> Subspace:
        """The exact Hessian at an artefact in the span of the runs' task vectors."""
        base = self.base_parameters
        vectors = [{name: w - base[name] for name, w in self.weights_of(run).items()} for run in runs]
        self.load(artefact)
        found = hessian.in_span(self._perturbable(artefact), vectors).summary()
        along = dict(zip((run.name for run in runs), found["along"] or [], strict=False))
        return Subspace.model_validate(found | {"along": along})

    def add_span(self, measured: Measured, artefact: Artefact, runs: Sequence[Artefact]) -> Measured:
        """Add the Hessian in the span of the runs' task vectors to the figures of an artefact."""
        found = self.span(artefact, runs)
        figures = report.span(found.eigenvalues)
        row = measured.row
        curvature = (row.hessian or Hessian()).model_copy(update={"subspace": found})
        estimates = row.estimates | {column.key: estimate for column, estimate in figures}
        return replace(
            measured,
            row=row.model_copy(update={"estimates": estimates, "hessian": curvature}),
            columns=(*measured.columns, *(column for column, _ in figures)),
        )

    def weights_of(self, artefact: Artefact) -> dict[str, Tensor]:
        """The parameters of an artefact by their names in the model, in memory."""
        self.load(artefact)
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def landscapes(
        self, merged: Artefact, best: Artefact, runs: Sequence[Artefact], line: Line, metrics: Sequence[str]
    ) -> Landscapes:
        """What looks at several artefacts at once: barriers between runs and merge, a plane, surfaces."""
        found = Landscapes()
        if "barriers" in metrics:
            others = {run.name: self.weights_of(run) for run in runs}
            self.load(merged)
            entries = landscape.barriers(self._perturbable(merged), others).summary
            found.barriers = barrier_matrix([merged.name, *others], entries)
            line.add(1, "barriers")
        if "plane" in metrics:
            other = {best.name: self.weights_of(best)}
            self.load(merged)
            plane = landscape.plane(self._perturbable(merged), self.base_parameters, other).summary
            corners = {merged.name if name == landscape.MODEL else name: at for name, at in plane.pop("corners").items()}
            points = [Point(name=name, x=x, y=y) for name, (x, y) in corners.items()]
            found.plane = Plane(**plane, points=tuple(points))
            line.add(1, "plane")
        if "surface" in metrics:
            for artefact in (best, merged):
                self.load(artefact)
                surface = landscape.surface(self._perturbable(artefact)).summary
                found.surfaces[artefact.name] = Surface.model_validate(surface)
                line.add(1, f"{artefact.name}: surface")
        return found

    def noise_floor(self, artefact: Artefact) -> float:
        """By how much a repeated evaluation differs."""
        self.load(artefact)
        return controls.noise_floor(self._perturbable(artefact))

    def grouped_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, list[float]]:
        """Mean losses (groups,) of groups of rows and their weights: about 64 units over the whole probe for the bootstrap."""
        size = max(1, len(self.probe_rows[self.recipe.probe.data]) // 64)
        rows = self.task.row_figures(model, batch)
        weights = torch.stack([group.sum() for group in rows.weight.split(size)])
        sums = torch.stack([group.sum() for group in (rows.loss * rows.weight).split(size)])
        return sums / weights, weights.tolist()

    @cached_property
    def inputs(self) -> str:
        """Hash of what is probed on, and of how."""
        recipe = self.recipe.probe
        return digest([self.split(recipe.data).digest, self.base_hash, recipe.model_dump(mode="json")])

    def _perturbable(self, artefact: Artefact, parts: int | None = None) -> Perturbable:
        """The loaded artefact on the probe's batches, or on its rows cut into about so many."""
        recipe = self.recipe.probe
        split: SplitName = recipe.data
        rows = self.probe_rows[split]
        size = recipe.batch_size if parts is None else max(1, min(recipe.batch_size, -(-len(rows) // parts)))
        batches = self._cut(self.split(split), rows, size)
        data = digest([self.split(split).digest, split, rows.tolist(), size, recipe.seed])
        return Perturbable(
            self.model,
            self.grouped_loss,
            batches, self.reference,
            seed=recipe.seed, model_hash=artefact.hash, data_hash=digest([data, self.base_hash]), ledger=self.ledger,
        )  # fmt: skip

    # Controls.

    def average(self, name: str, members: Sequence[Artefact], control: str) -> Artefact:
        """The plain mean of some weights."""
        return Artefact(
            name, "control",
            merge(self.base, [a.checkpoint for a in members], method="mean", names=[a.name for a in members]),
            digest(["mean", *(a.hash for a in members)]),
            optimizer=members[0].optimizer, seed=members[0].seed, control=control,
        )  # fmt: skip

    def loss_matched(self, snapshots: Sequence[Artefact], merged: Artefact) -> Artefact:
        """The snapshot whose training loss is nearest to the merge's: is the merge flatter, or merely less far learnt?"""
        goal = self.loss(merged, "train")
        found = min(snapshots, key=lambda a: abs(self.loss(a, "train") - goal))
        return replace(found, control="loss-matched", of=merged.name)

    def distance_matched(self, run: Artefact, merged: Artefact) -> Artefact:
        """The run's task vector rescaled to the merge's length: is the merge flatter, or merely nearer to the base?"""
        lengths = []
        for artefact in (run, merged):
            self.load(artefact)
            lengths.append(controls.distance(self.model, self.base_parameters))
        factor = lengths[1] / lengths[0] if lengths[0] else 0.0  # a run that did not move has no direction to rescale
        return Artefact(
            f"{run.name} at |{merged.name}|", "control",
            merge(self.base, [run.checkpoint], method="task-arithmetic", weights=[1.0], scale=factor, names=[run.name]),
            digest([run.hash, factor]),
            optimizer=run.optimizer, seed=run.seed, control="distance-matched", of=run.name,
        )  # fmt: skip


@dataclass
class Landscapes:
    """What looks at several artefacts at once, as far as it was measured."""

    barriers: Matrix | None = None
    plane: Plane | None = None
    surfaces: dict[str, Surface] = field(default_factory=dict)


def barrier_matrix(names: Sequence[str], entries: Sequence[Mapping[str, Any]]) -> Matrix:
    """The summary of `landscape.barriers` as a symmetric matrix under the artefacts' own names, the probed model first."""
    matrix: list[list[float | None]] = [[0.0] * len(names) for _ in names]
    place = {landscape.MODEL: 0, **{name: i for i, name in enumerate(names)}}
    for entry in entries:
        i, j = (place[name] for name in entry["between"])
        matrix[i][j] = matrix[j][i] = entry["barrier"]
    return Matrix(names=tuple(names), matrix=tuple(map(tuple, matrix)))


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


def score_figures(split: SplitName, scores: Mapping[str, Array], unit: str, *, perplexity: bool) -> report.Figures:
    """Mean loss, perplexity and accuracy over a split."""
    everywhere: tuple[View, ...] = ("table", "card", "terminal")
    of_loss: dict[SplitName, tuple[View, ...]] = {"train": ("table",), "validation": everywhere, "test": everywhere}
    of_accuracy: dict[SplitName, tuple[View, ...]] = {"train": ("table",), "validation": ("table", "card"), "test": everywhere}
    mean = controls.mean_score(scores, "loss")
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
        figures.append((accuracy, exact(controls.mean_score(scores, "accuracy"))))
    return figures


def exact(value: float) -> Estimate:
    """A figure without sampling error."""
    return Estimate(mean=value)


def score(task: Task, model: nn.Module, batch: Batch) -> dict[str, float]:
    """Mean loss of a batch, mean accuracy and predictive entropy where the task has them, and the batch's weight."""
    with torch.inference_mode():
        rows = task.row_figures(model, batch)
        found = {name: figure for name, figure in rows._asdict().items() if figure is not None and name != "weight"}
        means = (torch.stack([*found.values()]) * rows.weight).sum(dim=1) / rows.weight.sum()
    return dict(zip(found, means.tolist(), strict=True)) | {"weight": float(rows.weight.sum())}


def steps_of(recipe: Recipe, metrics: Sequence[str]) -> int:
    """Steps of a progress line that one artefact takes."""
    return recipe.probe.directions * ("gaussian" in metrics) + sum(
        m in metrics for m in ("adaptive", "basin", "worst-case", "hessian")
    )


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 over names, dtypes, shapes and data of all tensors."""
    total = hashlib.sha256()
    for name in checkpoint:
        tensor = checkpoint[name]
        total.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
        total.update(bytes_of(tensor))
    return total.hexdigest()
