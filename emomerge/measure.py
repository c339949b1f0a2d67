"""What is measured of each artefact of a recipe: losses, sharpness, α-curve, and its distance-matched control.

One live model serves all artefacts: their weights are streamed into it in turn. Choices (weights, λ, scale, greedy soup,
the selected artefact) see the validation split only; the reported held-out figures come from the test split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from emomerge.adapters import open_run
from emomerge.checkpoints import Checkpoint, atomic, load_into, open_checkpoint
from emomerge.errors import BadInput
from emomerge.merging import merge
from emomerge.probing import controls, landscape, sharpness
from emomerge.probing.ledger import Ledger
from emomerge.probing.perturb import Perturbable, rms
from emomerge.progress import Display, Line
from emomerge.recipe import Recipe, digest
from emomerge.tasks import Batch, Split, Task, TaskData, make_task
from emomerge.training import choose_device

Array = NDArray[np.float64]
METRICS = ("gaussian", "curve")
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
    facts: Mapping[str, Any] = field(default_factory=dict)


class Measurer:
    """Measures artefacts of one recipe on one model.

    Args:
        recipe, task, data: what is learnt.
        base: the weights every artefact started from.
        base_folder: where the base's model is rebuilt from.
        base_hash: the base's hash.
        device: where the model lives.
        ledger: file that remembers evaluations.
    """

    def __init__(
        self, recipe: Recipe, task: Task, data: TaskData, base: Checkpoint, base_folder: Path, base_hash: str,
        device: torch.device, ledger: Path | None,
    ) -> None:  # fmt: skip
        torch.backends.cudnn.allow_tf32 = False  # convolutions in TF32 would round small perturbations away
        self.recipe, self.task, self.data, self.base = recipe, task, data, base
        self.base_hash = base_hash
        self.device = device
        self.ledger = Ledger(ledger)
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

    def probe(
        self, artefact: Artefact, line: Line, metrics: Sequence[str] = METRICS
    ) -> tuple[dict[str, Any], list[Array], dict[str, list[float]]]:
        """All figures of one artefact: losses, gradient norm and distance, and of METRICS those that are asked for.

        Returns:
            its row of the report; its sharpness, (directions, units) for each radius; its α-curve.
        """
        recipe = self.recipe.probe
        self.load(artefact)
        probe = self._perturbable(artefact)
        radii = recipe.radii if "gaussian" in metrics else ()
        found_sharpness = sharpness.gaussian(probe, radii, recipe.directions, lambda number: line.add(1, artefact.name))
        row: dict[str, Any] = {
            "name": artefact.name, "role": artefact.role, "path": None if artefact.path is None else str(artefact.path),
            "optimizer": artefact.optimizer, "seed": artefact.seed, "control": artefact.control, "of": artefact.of,
            "grad_norm": controls.gradient_norm(probe),
            "distance": controls.distance(self.model, self.base_parameters),
            "sharpness": found_sharpness.summary,
            **artefact.facts,
        }  # fmt: skip
        for split in ("train", "validation", "test"):
            found = self.scores(artefact, split)
            row[f"{split}_loss"] = controls.mean_score(found, "loss")
            if "accuracy" in found:
                row[f"{split}_accuracy"] = controls.mean_score(found, "accuracy")
            if split == "train" and "entropy" in found:
                row["entropy"] = controls.mean_score(found, "entropy")
        curve: dict[str, list[float]] = {"alpha": [], "loss": []}
        if "curve" in metrics and artefact.role in ("run", "merge"):
            curve = landscape.alpha_curve(probe, self.base_parameters).summary
        return row, list(found_sharpness.values), curve

    def unit_weights(self, artefact: Artefact) -> Array:
        """Weights of the units that sharpness is resampled over, (units,)."""
        self.load(artefact)
        return sharpness.weights(self._perturbable(artefact))

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

    def _perturbable(self, artefact: Artefact) -> Perturbable:
        recipe = self.recipe.probe
        split: SplitName = recipe.data
        batches = self._cut(self.split(split), self.probe_rows[split], recipe.batch_size)
        data = digest([self.split(split).digest, split, self.probe_rows[split].tolist(), recipe.batch_size, recipe.seed])
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
            f"{run.name} at ‖{merged.name}‖", "control",
            merge(self.base, [run.checkpoint], method="task-arithmetic", weights=[1.0], scale=factor, names=[run.name]),
            digest([run.hash, factor]),
            optimizer=run.optimizer, seed=run.seed, control="distance-matched", of=run.name,
        )  # fmt: skip


def score(task: Task, model: nn.Module, batch: Batch) -> dict[str, float]:
    """Mean loss of a batch, mean accuracy and predictive entropy where the task has them, and the batch's weight."""
    with torch.inference_mode():
        rows = task.row_figures(model, batch)
        found = {name: figure for name, figure in rows._asdict().items() if figure is not None and name != "weight"}
        means = (torch.stack([*found.values()]) * rows.weight).sum(dim=1) / rows.weight.sum()
    return dict(zip(found, means.tolist(), strict=True)) | {"weight": float(rows.weight.sum())}


def probe_models(
    recipe: Recipe,
    models: Sequence[str],
    base_folder: Path,
    out: Path,
    display: Display,
    metrics: Sequence[str] = METRICS,
) -> dict[str, Any]:
    """Measure given models on a recipe's data, resumably: `results.json` and `evaluations.jsonl` in `out`.

    Args:
        recipe: gives data and probe.
        models: checkpoints, adapters or run directories, all of the base's architecture.
        base_folder: the base they are compared with; its RMS sets the ball.
        out: folder for results and ledger.
        display: shows progress.
        metrics: of METRICS.
    """
    if (out / "recipe.yaml").exists():
        raise BadInput("the output folder of a recipe has results of its own", where=out, fix="choose another -o")
    base = open_checkpoint(base_folder)
    task = make_task(recipe.task)
    checkpoints = [open_run(base, model) for model in models]
    measurer = Measurer(
        recipe,
        task,
        task.load_data(recipe.base),
        base,
        base_folder,
        fingerprint(base),
        choose_device(recipe.device),
        out / "evaluations.jsonl",
    )
    artefacts = [Artefact("base", "base", base, measurer.base_hash, path=base_folder)]
    short = [Path(model).name for model in models]
    for model, checkpoint in zip(models, checkpoints, strict=True):
        name = Path(model).name if short.count(Path(model).name) == 1 and Path(model).name != "base" else model
        artefacts.append(Artefact(name, "merge", checkpoint, fingerprint(checkpoint), path=Path(model)))
    rows, curves = [], {}
    with display.live():
        line = display.line("probe", len(artefacts) * recipe.probe.directions)
        for artefact in artefacts:
            row, _, curve = measurer.probe(artefact, line, metrics)
            rows.append(row)
            if curve["alpha"]:
                curves[artefact.name] = curve
    results = {"name": recipe.name, "artefacts": rows, "curves": curves, "probe": recipe.probe.model_dump(mode="json")}
    atomic.write_json(out / "results.json", results)
    return results


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 over names, dtypes, shapes and data of all tensors."""
    total = hashlib.sha256()
    for name in checkpoint:
        tensor = checkpoint[name].detach().cpu().contiguous()
        total.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
