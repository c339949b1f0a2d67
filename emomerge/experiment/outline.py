"""What `emomerge run` would do, without doing it: `--dry-run`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from emomerge.experiment.control_runs import adamw_members, control_plans
from emomerge.experiment.pipeline import Pipeline
from emomerge.probing.registry import recipe_metrics
from emomerge.recipe import Recipe
from emomerge.training import RunSpec


def outline(pipeline: Pipeline) -> dict[str, Any]:
    """Return the stages of a pipeline, their work and what of it is done, as JSON-compatible data.

    Passes are forward and backward passes of one batch of the runs; those of the base are not counted.
    """
    recipe, runs = pipeline.recipe, pipeline.recipe.runs
    started = pipeline.space.recipe.is_file() and pipeline.space.is_done("base", pipeline.base_inputs)
    done = pipeline.status() if started else {}
    rows = [_row("base", _base(recipe), 0, done.get("base"))]
    trained = [*pipeline.trunks, *pipeline.specs]
    rows.append(_row("runs", _runs(recipe), _passes(trained, recipe), done.get("runs")))
    for kind, specs in _controls(recipe, pipeline.specs).items():
        rows.append(_row(f"control {kind}", _described(specs), _passes(specs, recipe), done.get("controls")))
    for merge in recipe.merge:
        stages = [f"merge-{pipeline.merge_name(merge, seed)}" for seed in runs.seeds]
        work = f"{merge.method} of {merge.of}" + (f", for {len(stages)} training seeds" if len(stages) > 1 else "")
        rows.append(_row(f"merge {merge.label}", work, 0, all(done.get(stage, False) for stage in stages)))
    of_all, of_close = recipe_metrics(recipe.probe)
    metrics = ", ".join(dict.fromkeys(metric.name for metric in (*of_all, *of_close)))
    rows.append(_row("probe", f"preset {recipe.probe.preset}: {metrics}", 0, done.get("probe")))
    rows.append(_row("report", str(pipeline.space.report), 0, done.get("report")))
    return {"recipe": recipe.name, "out": str(pipeline.space.out), "batch_size": runs.batch_size, "stages": rows}


def _row(stage: str, work: str, passes: int, done: bool | None) -> dict[str, Any]:
    return {"stage": stage, "work": work, "passes": passes, "done": bool(done)}


def _base(recipe: Recipe) -> str:
    prepare = recipe.base.prepare
    if prepare is not None:
        return f"train a {prepare.model}, {prepare.steps:,} steps of {prepare.batch_size}"
    return f"load {recipe.base.model}" if recipe.base.model else "the task's own model"


def _runs(recipe: Recipe) -> str:
    runs = recipe.runs
    trunk = f"a trunk of {runs.trunk_steps:,} steps, then " if runs.trunk_steps else ""
    rounds = f" in {runs.rounds} rounds" if runs.rounds > 1 else ""
    seeds = f", for {len(runs.seeds)} training seeds" if len(runs.seeds) > 1 else ""
    return f"{trunk}{', '.join(runs.optimizers)}: {runs.own_steps:,} steps each{rounds}{seeds}"


def _controls(recipe: Recipe, specs: Sequence[RunSpec]) -> dict[str, list[RunSpec]]:
    """Return the runs that each trained control of the recipe needs."""
    first = {spec.seed: spec for spec in reversed(specs)}  # which run is the best is not known yet
    plans = control_plans(recipe, first.__getitem__)
    if "adamw-average" in recipe.controls:
        plans["adamw-average"] = lambda seed: adamw_members(recipe, seed, recipe.rival.learning_rates[0])
    return {kind: [spec for seed in recipe.runs.seeds for spec in plan(seed)] for kind, plan in plans.items()}


def _described(specs: Sequence[RunSpec]) -> str:
    rates = list(dict.fromkeys(f"{spec.rate:g}" for spec in specs if spec.rate is not None))
    at = f" at peak rates {', '.join(rates)}" if len(rates) > 1 else ""
    return f"{len(specs)} run{'s' if len(specs) > 1 else ''} of {specs[0].steps:,} steps{at}"


def _passes(specs: Sequence[RunSpec], recipe: Recipe) -> int:
    return sum(spec.steps * spec.micro_batches(recipe.runs) for spec in specs)
