"""What workers do before its stage: training controls that wait for no choice, and measuring what has been made."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from emomerge.experiment.control_runs import control_plans, grouped, is_alone, trained_so_far
from emomerge.experiment.experiment import Experiment
from emomerge.experiment.measure import Artefact
from emomerge.experiment.workers import VALIDATION, ProbeJob, job_of, jobs_of
from emomerge.probing.registry import recipe_metrics
from emomerge.training import RunSpec


def groups_ahead(experiment: Experiment, *, runs_are_done: bool) -> list[list[RunSpec]]:
    """Return the groups of controls that can be trained before their stage: those that wait for no choice."""
    recipe, first = experiment.recipe, {spec.seed: spec for spec in reversed(experiment.specs)}
    plans = control_plans(recipe, experiment.best_run if runs_are_done else first.__getitem__)
    groups = grouped(recipe, [spec for plan in plans.values() for seed in recipe.runs.seeds for spec in plan(seed)])
    return [
        group
        for group in groups
        if (runs_are_done or all(spec.control != "long-run" for spec in group))
        and not any(is_alone(recipe, spec) for spec in group)
        and not all(map(experiment.run_is_done, group))
    ]


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
