"""Where runs are trained. Here: one after the other in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from emomerge.errors import RunFailed
from emomerge.recipe import Recipe
from emomerge.tasks import Task, TaskData
from emomerge.training.live import StepHook
from emomerge.training.loop import train_run
from emomerge.training.runs import RunDir, RunSpec, run_inputs


def train_locally(
    recipe: Recipe,
    specs: Sequence[RunSpec],
    folder: Path,
    base_hash: str,
    *,
    task: Task,
    data: TaskData,
    base_folder: Path,
    device: torch.device,
    on_step: StepHook = lambda spec, row: None,
) -> None:
    """Train the given runs into `folder/<name>`, each to the end of its round, leaving alone those that are there.

    Raises:
        RunFailed: after all others were trained, if any run met a non-finite loss.
    """
    failures = []
    for spec in specs:
        run, inputs = RunDir(folder / spec.name), run_inputs(recipe, spec, base_hash)
        if run.has_reached(inputs, spec):
            continue
        try:
            train_run(
                recipe, spec, run, inputs,
                task=task, data=data, base_folder=base_folder, device=device, on_step=on_step,
            )  # fmt: skip
        except RunFailed as error:
            failures.append(str(error))
    if failures:
        raise RunFailed("; ".join(failures))
