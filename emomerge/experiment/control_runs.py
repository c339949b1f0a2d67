"""The controls: their training plans, training them, and the artefacts made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from emomerge.controls import CONTROLS
from emomerge.errors import RunFailed
from emomerge.experiment.experiment import Experiment
from emomerge.experiment.measure import Artefact
from emomerge.experiment.overfitting import keep_best
from emomerge.numerics.hashing import digest
from emomerge.recipe import Recipe
from emomerge.training import RunSpec

Train = Callable[[Sequence[RunSpec]], None]


TRAINED = tuple(kind for kind, control in CONTROLS.items() if control.rival_in == "better" and control.made_from is None)
"""The controls that are trained."""


def sweep_runs(recipe: Recipe, seed: int) -> list[RunSpec]:
    """Return AdamW runs with cosine decay, as many and as long as the merged runs, one for each peak rate of the sweep."""
    return [
        RunSpec(f"adamw-sweep-{rate:g}-{seed}", "adamw", seed, recipe.runs.steps, control="adamw-sweep", rate=rate)
        for rate in recipe.sweep_rates
    ]


def long_run(recipe: Recipe, best: RunSpec) -> RunSpec:
    """Return the run of one optimizer with the steps of all runs, with snapshots to stop at.

    If nothing else needs it, it ends where it has plainly overfitted, unless its weights are averaged over all steps.
    """
    steps, alone = total_steps(recipe), not serves_others(recipe)
    snapshots = tuple(step for step in snapshot_steps(recipe) if step < steps or not alone)
    ends_early = alone and recipe.runs.average is None
    return RunSpec(
        f"long-{best.name}", best.optimizer, best.seed, steps, control="long-run", snapshots=snapshots, ends_early=ends_early
    )  # fmt: skip


def serves_others(recipe: Recipe) -> bool:
    """Return whether other controls, `loss-matched` or `swa`, are made from the snapshots of the long run."""
    return any(control.made_from == "long-run" and kind in recipe.controls for kind, control in CONTROLS.items())


def stops_at_best(recipe: Recipe, spec: RunSpec) -> bool:
    """Return whether only the best of a control's snapshots is kept, once it is trained."""
    return bool(spec.snapshots) and not (spec.control == "long-run" and serves_others(recipe))


def long_adamw_runs(recipe: Recipe, seed: int) -> list[RunSpec]:
    """Return AdamW runs with cosine decay and the steps of all runs, one for each peak rate, with snapshots to stop at."""
    steps = total_steps(recipe)
    earlier = tuple(step for step in snapshot_steps(recipe) if step < steps)
    return [
        RunSpec(
            f"long-adamw-{rate:g}-{seed}", "adamw", seed, steps, control="adamw-long-run", rate=rate, snapshots=earlier
        )
        for rate in recipe.rival.learning_rates
    ]  # fmt: skip


def large_batch_runs(recipe: Recipe, seed: int) -> list[RunSpec]:
    """Return AdamW runs with cosine decay and the steps of one run on the rows of all runs, one for each peak rate."""
    return [
        RunSpec(
            f"adamw-large-batch-{rate:g}-{seed}", "adamw", seed, recipe.runs.steps, control="adamw-large-batch", rate=rate,
            batch_factor=len(recipe.runs.optimizers),
        )
        for rate in recipe.rival.learning_rates
    ]  # fmt: skip


def adamw_members(recipe: Recipe, seed: int, rate: float) -> list[RunSpec]:
    """Return the AdamW runs to average: as many and as long as the merged runs, each with a different order of the data."""
    steps = recipe.runs.steps
    return [
        RunSpec(f"adamw-{rate:g}-{k}-{seed}", "adamw", seed, steps, control="adamw-average", rate=rate, member=k)
        for k in range(len(recipe.runs.optimizers))
    ]


def control_plans(recipe: Recipe, best_run: Callable[[int], RunSpec]) -> dict[str, Callable[[int], list[RunSpec]]]:
    """Return the trained controls of a recipe: kind → what returns its runs for a training seed.

    `adamw-average` is not among them: the rate of its runs is chosen when others are trained.

    Args:
        recipe: the recipe.
        best_run: returns the best single run of a training seed, of whose optimizer the long run is.
    """
    plans: dict[str, Callable[[int], list[RunSpec]]] = {
        "adamw-sweep": lambda seed: sweep_runs(recipe, seed),
        "adamw-large-batch": lambda seed: large_batch_runs(recipe, seed),
        "long-run": lambda seed: [long_run(recipe, best_run(seed))],
        "adamw-long-run": lambda seed: long_adamw_runs(recipe, seed),
    }
    return {kind: plan for kind, plan in plans.items() if kind in recipe.controls}


def total_steps(recipe: Recipe) -> int:
    """Return the total number of steps of all runs of one training seed."""
    return recipe.runs.steps * len(recipe.runs.optimizers)


def snapshot_steps(recipe: Recipe) -> tuple[int, ...]:
    """Return the evenly spaced steps at which a long run keeps its weights, the last one included."""
    steps, kept = total_steps(recipe), recipe.rival.snapshots
    return tuple(sorted({max(1, steps * k // kept) for k in range(1, kept + 1)}))


def controls_inputs(experiment: Experiment) -> str:
    """Return the hash of everything that decides which controls are trained, and how."""
    recipe = experiment.recipe
    wanted = [kind for kind in TRAINED if kind in recipe.controls]
    return digest([experiment.run_hashes(), wanted, recipe.rival, recipe.sweep_rates, recipe.probe.batch_size])


def train_controls(experiment: Experiment, train: Train) -> dict[str, Any]:
    """Train the controls of the recipe. Controls that diverge are recorded and do not stop the experiment.

    Returns:
        Facts for the stamp: the runs that were trained, and the errors of those that diverged.
    """
    recipe, seeds = experiment.recipe, experiment.recipe.runs.seeds
    trainer = _Trainer(experiment, train)
    plans = control_plans(recipe, experiment.best_run)
    trainer.train([spec for plan in plans.values() for seed in seeds for spec in plan(seed)])
    if "adamw-average" in recipe.controls:
        rates = {seed: _adamw_rate(experiment, seed, trainer.trained) for seed in seeds}
        trainer.train([spec for seed in seeds for spec in adamw_members(recipe, seed, rates[seed])])
    return {"trained": [asdict(spec) for spec in trainer.trained], "diverged": trainer.diverged}


def grouped(recipe: Recipe, specs: Iterable[RunSpec]) -> list[list[RunSpec]]:
    """Return runs in the groups that are trained together: those of equal length and batch size share a pass where they can."""
    groups: dict[tuple[Any, ...], list[RunSpec]] = {}
    for spec in specs:
        groups.setdefault((spec.steps, spec.batch_factor, spec.name if _is_alone(recipe, spec) else ""), []).append(spec)
    return list(groups.values())


def _is_alone(recipe: Recipe, spec: RunSpec) -> bool:
    # Snapshots of whole models are large: each such run is reduced to its best point before the next one starts.
    return recipe.adapter.kind == "full" and bool(spec.snapshots)


class _Trainer:
    """Trains controls and collects the finished ones, and the errors of the others."""

    def __init__(self, experiment: Experiment, train: Train) -> None:
        self._experiment, self._train = experiment, train
        self.trained: list[RunSpec] = []
        self.diverged: list[str] = []

    def train(self, specs: Sequence[RunSpec]) -> None:
        """Train runs. Those of equal length and batch size share a pass where they can."""
        for group in grouped(self._experiment.recipe, specs):
            try:
                self._train(group)
            except RunFailed as error:
                self._experiment.display.say(str(error))
                self.diverged.append(str(error))
            done = [spec for spec in group if self._experiment.run_is_done(spec)]
            self.trained += done
            for spec in done:
                self._experiment.say_if_stopped(spec)
                if stops_at_best(self._experiment.recipe, spec):
                    keep_best(self._experiment.measurer, spec)


def _points(experiment: Experiment, spec: RunSpec) -> list[Artefact]:
    """Return the points of a run among which is chosen: its end, and those of its snapshots that still exist."""
    found = [experiment.run_artefact(spec)]
    for step in spec.snapshots:
        if experiment.run_dir(spec).snapshot(step).exists():
            snapshot = experiment.snapshot_artefact(spec, step)
            found.append(replace(snapshot, name=f"{spec.name} until step {step}", control=spec.control))
    return found


def _adamw_rate(experiment: Experiment, seed: int, trained: Sequence[RunSpec]) -> float:
    """Return the peak rate of the long run with the lowest validation loss; the recipe's first if none was trained."""
    long = [spec for spec in trained if spec.control == "adamw-long-run" and spec.seed == seed]
    points = [(point, spec.rate) for spec in long for point in _points(experiment, spec)]
    best = experiment.measurer.best([point for point, _ in points]) if points else None
    return next((rate for point, rate in points if point is best and rate), experiment.recipe.rival.learning_rates[0])


def possible_controls(experiment: Experiment) -> list[RunSpec]:
    """Return every control that may be trained; which ones are depends on the best run and the best rate."""
    recipe = experiment.recipe
    return [
        *(spec for seed in recipe.runs.seeds for spec in sweep_runs(recipe, seed)),
        *(long_run(recipe, spec) for spec in experiment.specs),
        *(spec for seed in recipe.runs.seeds for spec in long_adamw_runs(recipe, seed)),
        *(spec for seed in recipe.runs.seeds for spec in large_batch_runs(recipe, seed)),
        *(s for seed in recipe.runs.seeds for rate in recipe.rival.learning_rates for s in adamw_members(recipe, seed, rate)),
    ]


def trained_so_far(experiment: Experiment) -> list[RunSpec]:
    """Return the runs of those kinds of controls of which all runs are done."""
    plans = control_plans(experiment.recipe, experiment.best_run)
    kinds = [[spec for seed in experiment.recipe.runs.seeds for spec in plan(seed)] for plan in plans.values()]
    return [spec for specs in kinds if all(map(experiment.run_is_done, specs)) for spec in specs]


def control_artefacts(experiment: Experiment, trained: Sequence[RunSpec] | None = None) -> dict[str, list[Artefact]]:
    """Return the artefacts of each kind of control, in the order of the seeds; `snapshots` are those of the long run.

    Where several runs or several points of a run are candidates, the one with the lowest validation loss is returned.

    Args:
        experiment: the experiment.
        trained: the controls that have been trained; by default, what their stage says.
    """
    trained = experiment.trained_controls if trained is None else trained
    measurer, recipe = experiment.measurer, experiment.recipe
    found: dict[str, list[Artefact]] = {kind: [] for kind, control in CONTROLS.items() if control.rival_in == "better"}
    found["snapshots"] = []
    for seed in recipe.runs.seeds:
        runs: dict[str | None, list[RunSpec]] = {kind: [] for kind in TRAINED}
        for spec in trained:
            if spec.seed == seed:
                runs[spec.control].append(spec)
        for kind in ("adamw-sweep", "adamw-long-run", "adamw-large-batch", "long-run"):
            points = [point for spec in runs[kind] for point in _points(experiment, spec)]
            found[kind] += [replace(measurer.best(points), cost=experiment.cost_of(runs[kind]))] if points else []
        sweep = [experiment.run_artefact(spec) for spec in runs["adamw-sweep"]]
        if sweep and "adamw-soup" in recipe.controls:
            soup = measurer.greedy_soup(f"adamw-soup-{seed}", sweep, "adamw-soup")
            found["adamw-soup"].append(replace(soup, cost=experiment.cost_of(runs["adamw-sweep"])))
        members = [experiment.run_artefact(spec) for spec in runs["adamw-average"]]
        if members:
            average = measurer.average(f"adamw-average-{seed}", members, "adamw-average")
            cost = experiment.cost_of([*runs["adamw-average"], *runs["adamw-long-run"]])  # the latter chose its rate
            found["adamw-average"].append(replace(average, cost=cost))
        for spec in runs["long-run"] if serves_others(recipe) else ():
            snapshots = [experiment.snapshot_artefact(spec, step) for step in spec.snapshots]
            found["snapshots"] += snapshots
            if "swa" in recipe.controls:
                later = [a for a, step in zip(snapshots, spec.snapshots, strict=True) if 2 * step > spec.steps]
                average = measurer.average(f"swa-{spec.name}", later, "swa")
                found["swa"].append(replace(average, cost=experiment.cost_of([spec])))
    return found
