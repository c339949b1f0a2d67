"""Measure the artefacts of a recipe: losses, the metrics of the probe, and controls derived from other artefacts.

All artefacts share one model, into which their weights are loaded in turn. Choices (weights, λ, scale, greedy soup, the
selected artefact) depend on the validation split only; the held-out figures in reports come from the test split.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emomerge.checkpoints import Checkpoint, load_into, on_disk
from emomerge.errors import BadInput
from emomerge.experiment.costs import Cost
from emomerge.experiment.meter import Meter
from emomerge.experiment.scores import (
    COSINE,
    DISTANCE,
    ENTROPY,
    GRADIENT_NORM,
    Figure,
    Scorer,
    by_length,
    cost_figures,
    exact,
    score_figures,
)  # fmt: skip
from emomerge.merging import merge
from emomerge.numerics.hashing import bytes_of, digest, hash_tensors
from emomerge.probing import basics
from emomerge.probing.batch_norm import reestimate_batch_norm
from emomerge.probing.ledger import Ledger
from emomerge.probing.perturb import Perturbable, rms
from emomerge.probing.registry import BACKWARD, Array, Measurement, Metric
from emomerge.results import ArtefactRow, Column, HeldOut, Role
from emomerge.results import Split as SplitName
from emomerge.tasks import Batch, Split
from emomerge.training import Context


@dataclass(frozen=True)
class Artefact:
    """A set of weights to measure: base, run, merge or control."""

    name: str
    role: Role
    checkpoint: Checkpoint
    hash: str
    """Key in the ledger: equal hashes mean equal weights."""
    path: Path | None = None
    optimizer: str | None = None
    seed: int | None = None
    control: str | None = None
    of: str | None = None
    seconds: float | None = None
    """Wall time of training or merging."""
    sha256: str | dict[str, str] | None = None
    """SHA-256 of the weights, or of each file."""
    method: str | None = None
    """Merge method."""
    sources: tuple[Path, ...] = ()
    """The models that a control in no folder of its own is merged from by `method`."""
    cost: Cost | None = None
    """What it cost to train everything that it was made of or chosen from."""
    cosine_to_mean: float | None = None
    """Cosine between its task vector and the mean of the runs' task vectors."""


@dataclass
class Measured:
    """Everything measured of one artefact.

    Attributes:
        artefact: the artefact.
        scores: the figures that precede those of metrics, and those that follow them, in the order of the tables.
        figures: columns and estimates of metrics.
        row: further fields for its `ArtefactRow`, as plain data.
        results: further fields for `Results`, as plain data.
        series: name → values for paired statistics, (…, directions, units) or (…, directions, batches).
        weights: name → weights of the units or batches, summing to one.
    """

    artefact: Artefact
    scores: tuple[Sequence[Figure], Sequence[Figure]]
    figures: list[Figure] = field(default_factory=list)
    row: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    series: dict[str, Array] = field(default_factory=dict)
    weights: dict[str, Array] = field(default_factory=dict)

    def add(self, metric: Metric, found: Measurement) -> None:
        """Add the result of a metric."""
        report = metric.report(found.summary, self.artefact.name)
        self.figures += report.figures
        self.row, self.results = united(self.row, report.row), united(self.results, report.results)
        if found.weights is not None:
            series = found.series or {metric.name: found.values}
            self.series |= series
            self.weights |= dict.fromkeys(series, found.weights)

    @property
    def columns(self) -> list[Column]:
        """The columns of the estimates in the order of the tables: scores enclose metrics; secondary metrics come last."""
        return [column for column, _ in self._all_figures()]

    def artefact_row(self) -> ArtefactRow:
        """Return the artefact's row in the results."""
        about = self.artefact
        plain = {
            "name": about.name, "role": about.role, "path": None if about.path is None else str(about.path),
            "optimizer": about.optimizer, "seed": about.seed, "control": about.control, "of": about.of,
            "seconds": about.seconds, "sha256": about.sha256, "method": about.method,
            "estimates": {column.key: estimate for column, estimate in self._all_figures()}, **self.row,
        }  # fmt: skip
        return ArtefactRow.model_validate(plain)

    def _all_figures(self) -> list[Figure]:
        before, after = self.scores
        return [*before, *sorted(self.figures, key=lambda figure: "details" in figure[0].views), *after]


class Measurer:
    """Measures the artefacts of one recipe on one model.

    Args:
        context: recipe, data and base.
        ledger: file that stores evaluations; None keeps them in memory.
        known: another ledger's file, which is only read.
    """

    def __init__(self, context: Context, ledger: Path | None, *, known: Path | None = None) -> None:
        torch.backends.cudnn.allow_tf32 = False  # TF32 convolutions would round small perturbations away
        self.context, self.recipe, self.task, self.data = context, context.recipe, context.task, context.data
        self.ledger = Ledger(ledger, known)
        trusted = self.recipe.base.trust_remote_code
        model = self.task.reload_model(context.base_folder, trust_remote_code=trusted)
        self.model: nn.Module = model.to(context.device)
        load_into(self.model, context.base)
        self.base_parameters = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.reference = rms(self.model)
        self._loaded: str | None = None
        self._probes: dict[int | None, Perturbable] = {}
        self._scorers: dict[SplitName, Scorer] = {}
        self._cuts: dict[int | None, tuple[list[Batch], str]] = {}
        self._same: dict[str, str] = {}
        self.meter = Meter()
        """Counts the forward passes of everything that is measured."""

    def write_to(self, ledger: Ledger) -> None:
        """Continue with another ledger."""
        self.ledger = ledger
        self._probes.clear()

    # Data.

    @cached_property
    def probe_rows(self) -> dict[SplitName, Tensor]:
        """Indices of the rows sampled from the training and the test split with the probe's seed."""
        probe, generator = self.recipe.probe, torch.Generator().manual_seed(self.recipe.probe.seed)
        names: tuple[SplitName, ...] = ("train", "test")
        count = probe.batches * probe.batch_size
        return {n: torch.randperm(len(self.split(n)), generator=generator)[:count].sort().values for n in names}

    def split(self, name: SplitName) -> Split:
        """Return a split of the data."""
        split: Split = getattr(self.data, name)
        return split

    def batches(self, name: SplitName) -> list[Batch]:
        """Return a split in batches on the device: all rows, or for the training data the probe's sample."""
        return self._cut(self.split(name), *self._rows(name))

    def _rows(self, name: SplitName) -> tuple[Tensor, int]:
        """Return the rows of a split that are scored, and how many of them make up a batch."""
        size, count = self.recipe.probe.batch_size, len(self.split(name))
        if name == "train":
            return self.probe_rows["train"], size
        return torch.arange(count), max(1, min(size, count // 50))  # the bootstrap over batches needs many of them

    def _cut(self, split: Split, rows: Tensor, size: int) -> list[Batch]:
        return [{k: v.to(self.context.device) for k, v in split.batch(part).items()} for part in rows.split(size)]

    def _scorer(self, name: SplitName) -> Scorer:
        if name not in self._scorers:
            rows, size = self._rows(name)
            width = max(size, self.recipe.probe.batch_size)
            self._scorers[name] = Scorer(self.split(name), rows, size=size, width=width, device=self.context.device)
        return self._scorers[name]

    def load(self, artefact: Artefact) -> None:
        """Load an artefact's weights into the model."""
        if self._loaded != self.key(artefact):
            self._loaded = None
            load_into(self.model, artefact.checkpoint)
            self._loaded = self.key(artefact)

    def distinct(self, artefacts: Sequence[Artefact]) -> list[Artefact]:
        """Return the artefacts without those whose weights equal those of an earlier one.

        From now on, what is measured of one of them is known of the other: a soup of one run is that run.
        """
        first: dict[str, Artefact] = {}
        for artefact in artefacts:

            def evaluate(artefact: Artefact = artefact) -> dict[str, str]:
                self.load(artefact)
                return {"sha256": hash_tensors(sorted(self.model.state_dict().items()))}

            key = {"model": artefact.hash, "data": "", "metric": "weights", "radius": 0.0, "direction": None, "batch": 0}
            same = first.setdefault(self.ledger.ask(evaluate, **key)["sha256"], artefact)
            self._same[artefact.hash] = same.hash
        return [*first.values()]

    def key(self, artefact: Artefact) -> str:
        """Return what identifies an artefact's weights in the ledger."""
        return self._same.get(artefact.hash, artefact.hash)

    def held_out_loss(self, checkpoint: Checkpoint) -> float:
        """Return the mean validation loss of a checkpoint; merges make their choices by it."""
        self._loaded = None
        load_into(self.model, checkpoint)
        return self._scorer("validation").mean_loss(self.task, self.model)

    def batch_norm_statistics(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """Estimate the running statistics of batch norm on training data for a checkpoint's weights, by the names on disk."""
        self._loaded = None
        load_into(self.model, checkpoint)
        batches = self.batches("train")
        if not reestimate_batch_norm(self.model, lambda model, batch: (self.task.loss(model, batch), 1.0), batches):
            raise BadInput("--reestimate needs a model with batch norm", where=checkpoint.source, fix="leave that option out")
        state = self.model.state_dict()
        buffers = {name: state[name].clone() for name, _ in self.model.named_buffers() if name in state}
        return on_disk(self.model, buffers)

    def scores(self, artefact: Artefact, split: SplitName) -> dict[str, Array]:
        """Return loss, accuracy, entropy and weight of every batch of a split, each (batches,)."""
        scorer = self._scorer(split)
        rows = self.probe_rows["train"].tolist() if split == "train" else None
        data = digest([self.split(split).digest, split, rows, scorer.sizes])
        if not self._is_known(artefact, data, split, len(scorer.sizes)):
            self.load(artefact)
        return basics.scores(
            self.model, len(scorer.sizes), lambda batches: scorer.scores(self.task, self.model, batches, self.meter.add),
            ledger=self.ledger, model_hash=self.key(artefact), data_hash=data, split=split, together=scorer.together,
        )  # fmt: skip

    def _is_known(self, artefact: Artefact, data: str, split: SplitName, batches: int) -> bool:
        return all(
            self.ledger.get(
                model=self.key(artefact), data=data, metric=f"scores of {split}", radius=0.0, direction=None, batch=index
            )
            for index in range(batches)
        )

    def held_out(self, artefacts: Sequence[Artefact]) -> HeldOut:
        """Return the losses of artefacts on every batch of the test rows, and what identifies these rows."""
        rows = self.split("test")
        scores = {artefact.name: self.scores(artefact, "test") for artefact in artefacts}
        return HeldOut(
            rows=rows.digest, labels=rows.digest_of("labels"),
            weights=tuple(next(iter(scores.values()))["weight"].tolist()),
            losses={name: tuple(found["loss"].tolist()) for name, found in scores.items()},
        )  # fmt: skip

    def loss(self, artefact: Artefact, split: SplitName) -> float:
        """Return the mean loss over a split."""
        return basics.mean_score(self.scores(artefact, split), "loss")

    def best(self, artefacts: Sequence[Artefact]) -> Artefact:
        """Return the artefact with the lowest validation loss."""
        losses = [self.loss(artefact, "validation") for artefact in artefacts]
        return artefacts[min(range(len(losses)), key=lambda i: math.inf if math.isnan(losses[i]) else losses[i])]

    def probe(self, artefact: Artefact, metrics: Sequence[Metric]) -> Measured:
        """Measure one artefact: its scores, distance, gradient norm, and the metrics of single artefacts."""
        with self.meter.part(self.basic_passes, f"{artefact.name}: losses"):
            measured = Measured(artefact, self._basic_figures(artefact))
        for metric in metrics:
            if metric.looks_at(artefact.role):
                with self.meter.part(self.passes(metric), f"{artefact.name}: {metric.name}"):
                    measured.add(metric, self.measure(metric, artefact))
        return measured

    def probe_together(
        self, measured: Mapping[str, Measured], merged: Artefact, best: Artefact, runs: Sequence[Artefact],
        metrics: Sequence[Metric],
    ) -> None:  # fmt: skip
        """Measure the metrics that take several artefacts, or only the merge and the best run.

        Args:
            measured: name → results of single artefacts, to which the new results are added.
            merged: the merge.
            best: the best single run.
            runs: all runs that the merge is compared with.
            metrics: metrics of the probe; those of single artefacts are skipped.
        """
        others = {None: (), "best": [best], "runs": runs}
        for metric in metrics:
            for artefact in {"every": (), "pair": (best, merged), "merge": (merged,)}[metric.models]:
                with self.meter.part(self.passes(metric), f"{artefact.name}: {metric.name}"):
                    found = self.measure(metric, artefact, others=others[metric.others])
                    measured[artefact.name].add(metric, found)

    def measure(
        self,
        metric: Metric,
        artefact: Artefact,
        *,
        others: Sequence[Artefact] = (),
        **options: Any,
    ) -> Measurement:
        """Measure one metric of one artefact with the recipe's options.

        Args:
            metric: the metric.
            artefact: the artefact.
            others: artefacts to compare it with, if the metric takes several.
            **options: take precedence over the recipe's.
        """
        arguments = {**metric.options_of(self.recipe.probe), **options}
        if metric.base:
            arguments["base"] = self.base_parameters
        if metric.others:
            arguments["others"] = {other.name: self.weights_of(other) for other in others}
        return metric.function(self._perturbable(artefact, metric.parts), **arguments)

    def passes(self, metric: Metric) -> float:
        """Return the cost of measuring one artefact, in forward passes of the recipe's batches."""
        probe = self.recipe.probe
        return metric.passes(metric.options_of(probe), probe.batches)

    def measure_basics(self, artefact: Artefact) -> None:
        """Evaluate the scores and the gradient norm of an artefact, so that the ledger has them."""
        self._basic_figures(artefact)

    def passes_of(self, artefact: Artefact, metrics: Sequence[Metric]) -> float:
        """Return the cost of `probe`."""
        return self.basic_passes + sum(self.passes(metric) for metric in metrics if metric.looks_at(artefact.role))

    def passes_together(self, metrics: Sequence[Metric]) -> float:
        """Return the cost of `probe_together`."""
        return sum({"every": 0, "pair": 2, "merge": 1}[metric.models] * self.passes(metric) for metric in metrics)

    @cached_property
    def basic_passes(self) -> float:
        """The cost of the figures that are measured of every artefact."""
        splits: tuple[SplitName, ...] = ("train", "validation", "test")
        gradient = BACKWARD * self.recipe.probe.batches if self._with_gradient else 0
        return gradient + sum(self._scorer(split).passes for split in splits)

    @property
    def _with_gradient(self) -> bool:
        """Whether the gradient norm is measured: a `quick` probe leaves out what takes backward passes."""
        return self.recipe.probe.preset != "quick"

    def _basic_figures(self, artefact: Artefact) -> tuple[list[Figure], list[Figure]]:
        """Return the figures common to all artefacts, in the order of the tables: before and after those of metrics."""
        self.load(artefact)
        distance = basics.distance(self.model, self.base_parameters)
        splits: tuple[SplitName, ...] = ("test", "validation", "train")
        scores = {split: self.scores(artefact, split) for split in splits}
        test, validation, train = (
            score_figures(split, scores[split], self.task.unit, perplexity=self.task.perplexity and split == "test")
            for split in splits
        )
        after = [(DISTANCE, exact(distance)), *validation, *train]
        if artefact.cosine_to_mean is not None:
            after.append((COSINE, exact(artefact.cosine_to_mean)))
        if "entropy" in scores["train"]:
            after.append((ENTROPY, exact(basics.mean_score(scores["train"], "entropy"))))
        if self._with_gradient:
            after.append((GRADIENT_NORM, exact(basics.gradient_norm(self._perturbable(artefact)))))
        return test, [*after, *cost_figures(artefact.cost)]

    def weights_of(self, artefact: Artefact) -> dict[str, Tensor]:
        """Return copies of an artefact's parameters, keyed by their names in the model."""
        self.load(artefact)
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def noise_floor(self, artefact: Artefact) -> float:
        """Return the largest difference between repeated evaluations of an artefact."""
        self.load(artefact)
        return basics.noise_floor(self._perturbable(artefact))

    def grouped_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return mean losses (groups,) and weights of groups of rows: about 64 bootstrap units over the whole probe."""
        size = max(1, len(self.probe_rows[self.recipe.probe.data]) // 64)
        rows = self.task.row_figures(model, batch)
        weights = torch.stack([group.sum() for group in rows.weight.split(size)])
        sums = torch.stack([group.sum() for group in (rows.loss * rows.weight).split(size)])
        return sums / weights, weights

    @cached_property
    def inputs(self) -> str:
        """The hash of everything besides the artefact that determines the figures of metrics."""
        recipe = self.recipe.probe
        return digest([self.split(recipe.data).digest, self.context.base_hash, recipe.model_dump(mode="json")])

    def _perturbable(self, artefact: Artefact, parts: int | None = None) -> Perturbable:
        """Load an artefact for probing on the recipe's batches, or on the same rows split into about `parts` batches."""
        self.load(artefact)
        if parts not in self._probes:
            batches, data = self._cut_for(parts)
            self._probes[parts] = Perturbable(
                self.model, self.grouped_loss, batches, self.reference, seed=self.recipe.probe.seed,
                data_hash=data, ledger=self.ledger, on_passes=lambda passes: self.meter.add(passes),
            )  # fmt: skip
        self._probes[parts].model_hash = self.key(artefact)  # one serves all artefacts, as they are loaded into one model
        return self._probes[parts]

    def _cut_for(self, parts: int | None) -> tuple[list[Batch], str]:
        """Return the probe's batches on the device, and what identifies them in the ledger."""
        if parts not in self._cuts:
            recipe, split = self.recipe.probe, self.split(self.recipe.probe.data)
            rows = self.probe_rows[recipe.data]
            size = recipe.batch_size if parts is None else max(1, min(recipe.batch_size, -(-len(rows) // parts)))
            rows = by_length(split, rows, size)
            data = digest([split.digest, recipe.data, rows.tolist(), size, recipe.seed])
            self._cuts[parts] = self._cut(split, rows, size), digest([data, self.context.base_hash])
        return self._cuts[parts]

    # Controls.

    def average(self, name: str, members: Sequence[Artefact], control: str) -> Artefact:
        """Return the plain mean of artefacts."""
        return Artefact(
            name, "control",
            merge(self.context.base, [a.checkpoint for a in members], method="mean", names=[a.name for a in members]),
            digest(["mean", *(a.hash for a in members)]),
            optimizer=members[0].optimizer, seed=members[0].seed, control=control, method="mean",
            sources=tuple(member.path for member in members if member.path is not None),
        )  # fmt: skip

    def greedy_soup(self, name: str, members: Sequence[Artefact], control: str) -> Artefact:
        """Return the greedy soup of artefacts (Wortsman et al. 2022); the evaluations of its search go into the ledger."""
        ordered = sorted(members, key=lambda member: self.loss(member, "validation"))
        soup, chosen = self.average(name, ordered[:1], control), ordered[:1]
        for candidate in ordered[1:]:
            larger = self.average(name, [*chosen, candidate], control)
            if self.best([larger, soup]) is larger:
                soup, chosen = larger, [*chosen, candidate]
        return replace(soup, method="greedy-soup", sources=self.average(name, members, control).sources)

    def loss_matched(self, snapshots: Sequence[Artefact], merged: Artefact) -> Artefact:
        """Return the snapshot whose training loss is closest to the merge's."""
        goal = self.loss(merged, "train")
        found = min(snapshots, key=lambda a: abs(self.loss(a, "train") - goal))
        return replace(found, control="loss-matched", of=merged.name)

    def distance_matched(self, run: Artefact, merged: Artefact) -> Artefact:
        """Return the run with its task vector rescaled to the norm of the merge's."""
        lengths = []
        for artefact in (run, merged):
            self.load(artefact)
            lengths.append(basics.distance(self.model, self.base_parameters))
        factor = lengths[1] / lengths[0] if lengths[0] else 0.0  # a zero task vector cannot be rescaled
        return Artefact(
            f"{run.name} at |{merged.name}|", "control",
            merge(self.context.base, [run.checkpoint], method="task-arithmetic", weights=[1.0], scale=factor, names=[run.name]),
            digest([run.hash, factor]),
            optimizer=run.optimizer, seed=run.seed, control="distance-matched", of=run.name, cost=run.cost,
        )  # fmt: skip


def united(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return the union of two nested mappings; if both have a plain value for a key, the second takes precedence."""
    both = {key: united(first[key], value) for key, value in second.items() if isinstance(value, Mapping) and key in first}
    return {**first, **second, **both}


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return the SHA-256 over names, dtypes, shapes and data of all tensors."""
    total = hashlib.sha256()
    for name in checkpoint:
        tensor = checkpoint[name]
        total.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
        total.update(bytes_of(tensor))
    return total.hexdigest()
