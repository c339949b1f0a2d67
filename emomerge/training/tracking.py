"""Logging of steps to TensorBoard, wandb or trackio through accelerate's trackers, in addition to metrics.jsonl."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from emomerge.errors import BadInput
from emomerge.recipe import Recipe
from emomerge.training.plan import RunSpec
from emomerge.training.run_dir import RunDir


def check_trackers(names: Sequence[str]) -> None:
    """Raise BadInput if the package of a tracker is not installed."""
    if not names:
        return
    from accelerate.tracking import get_available_trackers

    available = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in available:
            raise BadInput("the tracker is not installed", where=f"runs.log_with = {name}", fix=f"pip install {name}")


@contextlib.contextmanager
def tracked(recipe: Recipe, spec: RunSpec, run: RunDir) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open a run in each of the recipe's trackers at its first step, and close them after the block.

    TensorBoard files are written to the run's directory. For wandb and trackio the recipe's name is the project.

    Yields:
        A function that logs one row of metrics.jsonl under the same names; `rate` is emoPulse, the effective learning rate.
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

    if name == "tensorboard":  # rows that a resumed run writes again replace the old ones
        options = {"run_name": "tensorboard", "logging_dir": run.path, "purge_step": step}
    else:
        options = {"run_name": recipe.name, "name": spec.name, "resume": "allow"}
    if name == "wandb":
        options |= {"id": f"{recipe.name}-{spec.name}-{run.state['inputs'][:8]}", "reinit": "finish_previous"}
    tracker = LOGGER_TYPE_TO_CLASS[name](**options)
    tracker.start()
    return tracker
