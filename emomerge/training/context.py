"""The context that all runs of a recipe share, and the unit of work that a worker receives."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from emomerge.checkpoints import Checkpoint, open_checkpoint
from emomerge.recipe import Recipe
from emomerge.tasks import Task, TaskData, make_task
from emomerge.training.device import choose_device
from emomerge.training.plan import RunSpec, run_inputs
from emomerge.training.run_dir import RunDir


@dataclass(frozen=True)
class Context:
    """A recipe bound to its base and folders. Task, data, device and base are loaded on first use.

    Only the fields below are pickled; a worker that sees the same file system loads the rest itself.

    Attributes:
        recipe: the recipe.
        base_folder: folder of the base model.
        base_hash: hash of the base's weights.
        folder: holds one directory per run; unused where nothing is trained.
        working_directory: relative paths in the recipe are resolved against it.
    """

    recipe: Recipe
    base_folder: Path
    base_hash: str
    folder: Path = Path()
    working_directory: Path = field(default_factory=Path.cwd)

    @cached_property
    def task(self) -> Task:
        """The recipe's task."""
        return make_task(self.recipe.task)

    @cached_property
    def data(self) -> TaskData:
        """The splits of the task's data."""
        return self.task.load_data(self.recipe.base)

    @cached_property
    def device(self) -> torch.device:
        """The device that models are trained and measured on."""
        return choose_device(self.recipe.device)

    @cached_property
    def base(self) -> Checkpoint:
        """The base's weights."""
        return open_checkpoint(self.base_folder)

    def using(self, task: Task, data: TaskData, base: Checkpoint | None = None) -> Context:
        """Return a copy with a task, data and, if given, a base that are already loaded."""
        copy = Context(**self.__getstate__())
        copy.__dict__.update(task=task, data=data, **({} if base is None else {"base": base}))
        return copy

    def run_dir(self, spec: RunSpec) -> RunDir:
        """Return the directory of a run."""
        return RunDir(self.folder / spec.name)

    def run_inputs(self, spec: RunSpec) -> str:
        """Return the hash of everything that decides a run's result."""
        return run_inputs(self.recipe, spec, self.base_hash)

    def is_done(self, spec: RunSpec) -> bool:
        """Return whether the whole run has been trained from these inputs."""
        return self.run_dir(spec).is_done(self.run_inputs(spec))

    def has_reached(self, spec: RunSpec) -> bool:
        """Return whether the run has been trained to `spec.end`."""
        return self.run_dir(spec).has_reached(self.run_inputs(spec), spec)

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True)
class Job:
    """One run to train, as plain data for a worker or another rank."""

    context: Context
    spec: RunSpec
