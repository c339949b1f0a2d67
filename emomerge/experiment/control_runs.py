"""The controls: their training plans, training them, and the artefacts made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from emomerge.errors import RunFailed
from emomerge.experiment.experiment import Experiment
from emomerge.experiment.measure import Artefact
from emomerge.numerics.hashing import digest
from emomerge.recipe import Recipe
from emomerge.training import RunSpec

Train = Callable[[Sequence[RunSpec]], None]


def long_run(recipe: Recipe, best: RunSpec) -> RunSpec:
    """Return the run of one optimizer with the steps of all runs, with the snapshots that `loss-matched` and `swa` need."""
    steps, kept = total_steps(recipe), recipe.rival.snapshots
    wanted = {"loss-matched", "swa"} & set(recipe.controls)
    snapshots = tuple(sorted({max(1, steps * k // kept) for k in range(1, kept + 1)})) if wanted else ()
    return RunSpec(f"long-{best.name}", best.optimizer, best.seed, steps, control="long-run", snapshots=snapshots)


def long_adamw_runs(recipe: Recipe, seed: int) -> list[RunSpec]:
    """Return AdamW runs with cosine decay and the steps of all runs, one for each peak rate."""
    steps = total_steps(recipe)
    return [
        RunSpec(f"long-adamw-{rate:g}-{seed}", "adamw", seed, steps, control="adamw-long-run", rate=rate)
        for rate in recipe.rival.learning_rates
    ]


def adamw_members(recipe: Recipe, seed: int, rate: float) -> list[RunSpec]:
    """Return the AdamW runs to average: as many and as long as the merged runs, each with a different order of the data."""
    steps = recipe.runs.steps
    return [
        RunSpec(f"adamw-{rate:g}-{k}-{seed}", "adamw", seed, steps, control="adamw-average", rate=rate, member=k)
        for k in range(len(recipe.runs.optimizers))
    ]


def total_steps(recipe: Recipe) -> int:
    """Return the total number of steps of all runs of one training seed."""
    return recipe.runs.steps * len(recipe.runs.optimizers)


def controls_inputs(experiment: Experiment) -> str:
    """Return the hash of everything that decides which controls are trained, and how."""
    wanted = sorted({"long-run", "adamw-long-run", "adamw-average"} & set(experiment.recipe.controls))
    return digest([experiment.run_hashes(), wanted, experiment.recipe.rival, experiment.recipe.probe.batch_size])


def train_controls(experiment: Experiment, train: Train) -> dict[str, Any]:
    """Train the controls of the recipe. Controls that diverge are recorded and do not stop the experiment.

    Returns:
        Facts for the stamp: the runs that were trained, and the errors of those that diverged.
    """
    recipe, seeds = experiment.recipe, experiment.recipe.runs.seeds
    best = [experiment.best_run(seed) for seed in seeds]
    wanted = [long_run(recipe, spec) for spec in best] if "long-run" in recipe.controls else []
    if "adamw-long-run" in recipe.controls:
        wanted += [spec for seed in seeds for spec in long_adamw_runs(recipe, seed)]
    trained, diverged = _train_all(experiment, train, wanted)
    if "adamw-average" in recipe.controls:
        members = [spec for seed in seeds for spec in adamw_members(recipe, seed, _adamw_rate(experiment, seed, trained))]
        more, diverged_too = _train_all(experiment, train, members)
        trained, diverged = [*trained, *more], [*diverged, *diverged_too]
    return {"trained": [asdict(spec) for spec in trained], "diverged": diverged}


def _train_all(experiment: Experiment, train: Train, specs: Sequence[RunSpec]) -> tuple[list[RunSpec], list[str]]:
    """Train runs; return the finished ones and the errors of the others."""
    try:
        train(specs)
    except RunFailed as error:
        experiment.display.say(str(error))
        return [spec for spec in specs if experiment.run_is_done(spec)], [str(error)]
    return list(specs), []


def _adamw_rate(experiment: Experiment, seed: int, trained: Sequence[RunSpec]) -> float:
    """Return the peak rate of the long run with the lowest validation loss; the recipe's first if none was trained."""
    long = [spec for spec in trained if spec.optimizer == "adamw" and spec.seed == seed]
    best = min(long, key=lambda spec: experiment.measurer.loss(experiment.run_artefact(spec), "validation"), default=None)
    return experiment.recipe.rival.learning_rates[0] if best is None or best.rate is None else best.rate


def possible_controls(experiment: Experiment) -> list[RunSpec]:
    """Return every control that may be trained; which ones are depends on the best run and the best rate."""
    recipe = experiment.recipe
    long = [long_run(recipe, spec) for spec in experiment.specs]
    long += [spec for seed in recipe.runs.seeds for spec in long_adamw_runs(recipe, seed)]
    rates = recipe.rival.learning_rates
    return long + [s for seed in recipe.runs.seeds for rate in rates for s in adamw_members(recipe, seed, rate)]


def control_artefacts(experiment: Experiment) -> dict[str, list[Artefact]]:
    """Return the artefacts of each kind of control, in the order of the seeds; `snapshots` are those of the long run."""
    kinds = ("long-run", "adamw-long-run", "adamw-average", "swa", "snapshots")
    found: dict[str, list[Artefact]] = {kind: [] for kind in kinds}
    for seed in experiment.recipe.runs.seeds:
        of_kind: dict[str | None, list[RunSpec]] = {kind: [] for kind in kinds}
        for spec in experiment.trained_controls:
            if spec.seed == seed:
                of_kind[spec.control].append(spec)
        long = [experiment.run_artefact(spec) for spec in of_kind["adamw-long-run"]]
        if long:
            found["adamw-long-run"].append(min(long, key=lambda a: experiment.measurer.loss(a, "validation")))
        members = [experiment.run_artefact(spec) for spec in of_kind["adamw-average"]]
        if members:
            found["adamw-average"].append(experiment.measurer.average(f"adamw-average-{seed}", members, "adamw-average"))
        for spec in of_kind["long-run"]:
            found["long-run"].append(experiment.run_artefact(spec))
            snapshots = [experiment.snapshot_artefact(spec, step) for step in spec.snapshots]
            found["snapshots"] += snapshots
            if "swa" in experiment.recipe.controls:
                later = [a for a, step in zip(snapshots, spec.snapshots, strict=True) if 2 * step > spec.steps]
                found["swa"].append(experiment.measurer.average(f"swa-{spec.name}", later, "swa"))
    return found
