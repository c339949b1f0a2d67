"""The base stage: the model that all runs start from."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from emomerge.checkpoints import atomic, model_checkpoint, write_checkpoint
from emomerge.experiment.experiment import Experiment
from emomerge.tasks import Task, make_task
from emomerge.training import fit


def make_base(experiment: Experiment) -> dict[str, Any]:
    """Write the base of all runs: the given model with the head that the task needs, or a small model trained here.

    Returns:
        Facts for the stamp: the SHA-256 of the weights.
    """
    prepare = experiment.recipe.base.prepare
    line = experiment.display.line("base", prepare.steps if prepare else 1)
    if prepare is not None:
        task = make_task(experiment.recipe.base_task)
        data = task.load_data(experiment.recipe.base)
        model = task.new_model(experiment.recipe.base, data)
        fit(model.to(experiment.device), task, data, prepare, lambda step, loss: line.at(step, f"loss {loss:.4f}"))
    else:
        task, data = experiment.task, experiment.data
        model = task.new_model(experiment.recipe.base, data)
    _write_model(experiment, model.cpu(), task)
    line.at(prepare.steps if prepare else 1)
    weights = {file.name: atomic.sha256(file) for file in sorted(experiment.space.base.glob("*.safetensors"))}
    return {"sha256": weights}


def _write_model(experiment: Experiment, model: torch.nn.Module, task: Task) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        task.save_files(model, Path(scratch))
        weights = model_checkpoint(model, source="base")
        write_checkpoint(weights, experiment.space.base, files_from=Path(scratch), force=True)
