"""The base stage: the model that all runs start from."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from emomerge.checkpoints import atomic, model_checkpoint, write_checkpoint
from emomerge.experiment.experiment import Experiment
from emomerge.tasks import Task, TaskData, make_task
from emomerge.training import fit
from emomerge.training.work import Work, measure_work


@dataclass(frozen=True)
class NewBase:
    """A base before it is trained, with the task and data that it is trained on."""

    task: Task
    data: TaskData
    model: nn.Module


def new_base(experiment: Experiment) -> NewBase:
    """Return the base of a recipe on the CPU: the given model with the head that the task needs, or a small model to train."""
    recipe = experiment.recipe
    if recipe.base.prepare is None:
        return NewBase(experiment.task, experiment.data, experiment.task.new_model(recipe.base, experiment.data))
    task = make_task(recipe.base_task)
    data = task.load_data(recipe.base)
    return NewBase(task, data, task.new_model(recipe.base, data))


def make_base(experiment: Experiment, new: NewBase) -> dict[str, Any]:
    """Train the base if the recipe says so, and write it.

    Returns:
        Facts for the stamp: the SHA-256 of the weights.
    """
    prepare = experiment.recipe.base.prepare
    line = experiment.display.line("base", prepare.steps if prepare else 1)
    if prepare is not None:
        model = new.model.to(experiment.device)
        fit(model, new.task, new.data, prepare, lambda step, loss: line.at(step, f"loss {loss:.4f}"))
    _write_model(experiment, new.model.cpu(), new.task)
    line.at(prepare.steps if prepare else 1)
    weights = {file.name: atomic.sha256(file) for file in sorted(experiment.space.base.glob("*.safetensors"))}
    return {"sha256": weights}


def work_of(experiment: Experiment, new: NewBase) -> Work:
    """Measure the passes of a batch of the runs on a base."""
    size = experiment.recipe.runs.batch_size
    batch = new.data.train.batch(range(min(size, len(new.data.train))))
    return measure_work(new.task, new.model, batch)


def _write_model(experiment: Experiment, model: nn.Module, task: Task) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        task.save_files(model, Path(scratch))
        weights = model_checkpoint(model, source="base")
        write_checkpoint(weights, experiment.space.base, files_from=Path(scratch), force=True)
