"""Model cards of the base, the runs and the merges of an experiment."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from emomerge.checkpoints import atomic
from emomerge.experiment.experiment import Experiment
from emomerge.optim import OPTIMIZERS
from emomerge.reporting import Card, model_card
from emomerge.results import Results


def write_cards(experiment: Experiment, results: Results) -> None:
    """Write the cards of the base, all runs and all merges, with the results in them."""
    for name in experiment.merge_names:
        atomic.write_text(
            experiment.space.merges / name / "README.md", merge_card(experiment, name, experiment.merge_record(name), results)
        )
    shared = {
        "results": results,
        "recipe_yaml": experiment.recipe_yaml,
        "command": experiment.command,
        "version": version("emomerge"),
    }
    prepare = experiment.recipe.base.prepare
    base = experiment.as_written.base.model or (f"a small {prepare.model}" if prepare else "the model of the task's function")
    about = f"The base of all runs of the recipe `{experiment.recipe.name}`: {base}."
    _write_card(experiment, experiment.space.base, {"name": "base", "about": about, **shared})
    for spec in [*experiment.specs, *experiment.trained_controls]:
        optimizer = OPTIMIZERS[spec.optimizer].class_name if spec.rate is None else f"AdamW, peak rate {spec.rate:g}, cosine"
        taken = experiment.run_dir(spec).state["steps_taken"]
        about = f"Trained from `{experiment.space.base}` for {taken} steps with {optimizer}"
        rounds = experiment.recipe.runs.rounds if spec.role == "run" else 1
        about += ", after a trunk that all runs share" if spec.role == "run" and experiment.trunks else ""
        about += "." if rounds == 1 else f", in {rounds} rounds that each began at the mean of all runs."
        folders = {spec.name: experiment.run_dir(spec).artefact}
        points = (f"{spec.name} at step", f"{spec.name} until step")
        folders |= {row.name: Path(row.path) for row in results.artefacts if row.path and row.name.startswith(points)}
        for name, folder in folders.items():
            _write_card(experiment, folder, {"name": name, "about": about, "base": str(experiment.space.base), **shared})


def _write_card(experiment: Experiment, folder: Path, context: dict[str, Any]) -> None:
    title = f"{experiment.recipe.name}, {context['name']}"
    atomic.write_text(folder / "README.md", model_card(Card(title=title, **context)))


def merge_card(experiment: Experiment, name: str, record: dict[str, Any], results: Results | None = None) -> str:
    """Return the card of a merge, with its results if known."""
    params = record["diagnostics"].get("params", record["params"])
    known = {
        "title": f"{experiment.recipe.name}, {name}", "name": name, "base": experiment.as_written.base.model or "prepared",
        "params": params, "results": results, "recipe_yaml": experiment.recipe_yaml, "command": experiment.command,
        "version": record["emomerge"],
    }  # fmt: skip
    return model_card(Card.model_validate(record | known))
