"""What workers do before its stage: training controls that wait for no choice, and measuring what has been made."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from emomerge.errors import EmomergeError
from emomerge.experiment.control_runs import control_plans, grouped, stops_at_best, trained_so_far
from emomerge.experiment.experiment import Experiment
from emomerge.experiment.measure import Artefact
from emomerge.experiment.overfitting import keep_best, overfits
from emomerge.experiment.workers import VALIDATION, ProbeJob, job_of, jobs_of, measurer_of, of_workers
from emomerge.probing.registry import recipe_metrics
from emomerge.training import Loaded, RunSpec, catch_errors, train_locally, train_runs
from emomerge.training.ahead import GroupJob
from emomerge.training.warm import warmed


def groups_ahead(experiment: Experiment, *, runs_are_done: bool) -> list[list[RunSpec]]:
    """Return the groups of controls that can be trained before their stage: those that wait for no choice."""
    recipe, first = experiment.recipe, {spec.seed: spec for spec in reversed(experiment.specs)}
    plans = control_plans(recipe, experiment.best_run if runs_are_done else first.__getitem__)
    groups = grouped(recipe, [spec for plan in plans.values() for seed in recipe.runs.seeds for spec in plan(seed)])
    return [
        group
        for group in groups
        if (runs_are_done or all(spec.control != "long-run" for spec in group)) and not all(map(experiment.run_is_done, group))
    ]


def train_ahead(job: GroupJob, ledger: Path) -> EmomergeError | None:
    """Train the runs of a job in a worker, each until it has overfitted if it may end early, and keep their best snapshots.

    Args:
        job: the runs.
        ledger: of the main process. What is evaluated here goes into the file of `ledger_of`.

    Returns:
        the error if some could not be trained.
    """
    context, measured = job.context, ledger_of(ledger, job.specs[0])

    def train() -> None:
        here = warmed(context)
        train_runs(
            here,
            job.specs,
            partial(train_locally, here, loaded=Loaded()),
            overfits=lambda spec, step: overfits(measurer_of(context, ledger, measured), spec, step),
        )
        for spec in job.specs:
            if stops_at_best(context.recipe, spec):
                keep_best(measurer_of(context, ledger, measured), spec)

    names = ", ".join(spec.name for spec in job.specs)
    return catch_errors(f"runs {names}", context.working_directory, train)


def ledger_of(ledger: Path, spec: RunSpec) -> Path:
    """Return the ledger of the worker that trains a group of runs, given the main process's and the first run."""
    return of_workers(ledger) / f"{spec.name}.jsonl"


def jobs_ahead(experiment: Experiment, offered: set[str]) -> dict[str, ProbeJob]:
    """Return, by name, jobs that measure finished artefacts and do not depend on what else is measured.

    Args:
        experiment: an experiment whose runs are complete.
        offered: names of the artefacts whose jobs were returned before; those of the others are added.
    """
    measurer, recipe = experiment.measurer, experiment.recipe
    every, _ = recipe_metrics(recipe.probe)
    whole = [metric for metric in every if metric.split == "whole"]
    jobs: list[ProbeJob] = []
    for name, artefact in _made(experiment).items():
        if name not in offered:
            offered.add(name)
            jobs += jobs_of(measurer, artefact(), whole)
    for spec in trained_so_far(experiment):  # one of them is chosen
        if spec.name not in offered:
            offered.add(spec.name)
            jobs.append(job_of(measurer, experiment.run_artefact(spec), VALIDATION))
    return {job.ledger.name: job for job in jobs if measurer.ledger.get(**job.mark(measurer)) is None}


def _made(experiment: Experiment) -> dict[str, Callable[[], Artefact]]:
    """Return the finished artefacts that will be measured, by name; each is opened by a call."""
    made: dict[str, Callable[[], Artefact]] = {"base": lambda: experiment.base_artefact}
    made |= {spec.name: partial(experiment.run_artefact, spec) for spec in experiment.specs}
    for merge in experiment.recipe.merge:
        for seed in experiment.recipe.runs.seeds:
            name = experiment.merge_name(merge, seed)
            if experiment.space.is_done(f"merge-{name}", experiment.merge_stamp(merge, seed)):
                made[f"merge {name}"] = partial(experiment.merge_artefact, merge, seed)
    return made
