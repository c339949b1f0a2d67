"""Where the steps of runs are logged besides metrics.jsonl: TensorBoard, wandb or trackio, through accelerate's trackers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from emomerge.errors import BadInput
from emomerge.recipe import Recipe
from emomerge.training.runs import RunDir, RunSpec


def check_trackers(names: Sequence[str]) -> None:
    """Raises BadInput where the package of a tracker is not installed."""
    if not names:
        return
    from accelerate.tracking import get_available_trackers

    available = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in available:
            raise BadInput("the tracker is not installed", where=f"runs.log_with = {name}", fix=f"pip install {name}")


@contextlib.contextmanager
def tracked(recipe: Recipe, spec: RunSpec, run: RunDir) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open a run in each of the recipe's trackers at its first step; close them all after the block.

    TensorBoard's files are in the run's directory; to wandb and trackio the recipe's name is the project.

    Yields:
        What logs a row of metrics, under the names that metrics.jsonl has: `rate` is emoPulse, the effective learning rate.
    """
    opened: list[Any] = []

    def log(row: dict[str, Any]) -> None:
        if recipe.runs.log_with and not opened:
            opened.extend(_open(name, recipe, spec, run, row["step"]) for name in recipe.runs.log_with)
        values = {key: float(value) for key, value in row.items() if key != "step" and isinstance(value, (int, float))}
        for tracker in opened:
            tracker.log(values, step=row["step"])

    try:
        yield log
    finally:
        for tracker in opened:
            tracker.finish()


def _open(name: str, recipe: Recipe, spec: RunSpec, run: RunDir, step: int) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    if name == "tensorboard":  # rows of a killed process that are written again count once
        options = {"run_name": "tensorboard", "logging_dir": run.path, "purge_step": step}
    else:
        options = {"run_name": recipe.name, "name": spec.name, "resume": "allow"}
    if name == "wandb":
        options |= {"id": f"{recipe.name}-{spec.name}-{run.state['inputs'][:8]}", "reinit": "finish_previous"}
    tracker = LOGGER_TYPE_TO_CLASS[name](**options)
    tracker.start()
    return tracker
