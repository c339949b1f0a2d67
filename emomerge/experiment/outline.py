"""What `emomerge run` is about to do, and what it takes: printed before work starts, and by `--dry-run`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from emomerge.controls import CONTROLS
from emomerge.experiment.control_runs import adamw_members, control_plans
from emomerge.probing.registry import BACKWARD, recipe_metrics
from emomerge.recipe import Full, Lora, Recipe
from emomerge.results import Split as SplitName
from emomerge.training import RunSpec
from emomerge.training.work import PROCESS, Hands, Work

if TYPE_CHECKING:
    from rich.table import Table

    from emomerge.experiment.pipeline import Pipeline

READ = 3e8
"""Bytes per second at which models are read, merged and written."""
CHOICES = 12
"""Evaluations of the validation rows by which a merge makes its choices, on average."""
REPORT = 10 * 2**20
"""Bytes of results, report and figures."""


def outline(
    pipeline: Pipeline, work: Work | None = None, hands: Hands | None = None, *, until: str = "report"
) -> dict[str, Any]:
    """Return the stages of a pipeline, their work and what of it is done, as JSON-compatible data.

    Passes are forward and backward passes of one batch of the runs; a forward pass alone counts as a third. Those of merges,
    which evaluate losses for their choices, are not counted.

    Args:
        pipeline: the pipeline.
        work: what a pass costs; without it seconds, memory and disk are unknown.
        hands: workers and threads.
        until: the last stage to be done: `runs` or `report`.
    """
    recipe, runs = pipeline.recipe, pipeline.recipe.runs
    started = pipeline.space.recipe.is_file() and pipeline.space.is_done("base", pipeline.base_inputs)
    done = pipeline.status() if started else {}
    each = 0.0 if work is None else work.seconds
    prepare = recipe.base.prepare
    base = 0 if prepare is None else round(prepare.steps * prepare.batch_size / runs.batch_size)
    rows = [_row("base", _base(recipe), base, done.get("base"), each)]
    trained = [*pipeline.trunks, *pipeline.specs]
    rows.append(_row("runs", _runs(recipe), _passes(trained, recipe), done.get("runs"), each))
    for kind, specs in _controls(recipe, pipeline.specs).items():
        rows.append(_row(f"control {kind}", _described(specs), _passes(specs, recipe), done.get("controls"), each))
    for merge in recipe.merge:
        stages = [f"merge-{pipeline.merge_name(merge, seed)}" for seed in runs.seeds]
        what = f"{merge.method} of {merge.of}" + (f", for {len(stages)} training seeds" if len(stages) > 1 else "")
        row = _row(f"merge {merge.label}", what, 0, all(done.get(stage, False) for stage in stages), each)
        if work is not None:
            row["seconds"] = len(stages) * _merging(pipeline, work)
        rows.append(row)
    of_all, of_close = recipe_metrics(recipe.probe)
    metrics = ", ".join(dict.fromkeys(metric.name for metric in (*of_all, *of_close)))
    rows.append(_row("probe", f"preset {recipe.probe.preset}: {metrics}", _probe(pipeline), done.get("probe"), each))
    rows.append(_row("report", str(pipeline.space.report), 0, done.get("report"), each))
    rows = rows[:2] if until == "runs" else rows
    found = {"recipe": recipe.name, "out": str(pipeline.space.out), "batch_size": runs.batch_size, "stages": rows}
    return found | _takes(pipeline, rows, work, hands)


def outline_table(found: dict[str, Any]) -> Table:
    """Return an outline as a table that fits 80 columns, with what is left to do in its last row."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    timed = found["seconds"] is not None
    table = Table(title=f"{found['recipe']} → {found['out']}", title_justify="left", caption_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for heading in ("stage", "work"):
        table.add_column(heading, overflow="fold")
    table.add_column(f"passes of {found['batch_size']}", justify="right")
    if timed:
        table.add_column("about", justify="right", no_wrap=True)
    for row in found["stages"]:
        time = [about(row["seconds"])] if timed else []
        passes = f"{row['passes']:,}" if row["passes"] else ""
        table.add_row("✓" if row["done"] else "", row["stage"], row["work"], passes, *time)
    left = sum(row["passes"] for row in found["stages"] if not row["done"])
    table.add_section()
    table.add_row("", "to do", "", f"{left:,}", *([about(found["seconds"])] if timed else []))
    if timed:
        workers = f", by {found['workers']} workers" if found["workers"] and found["workers"] > 1 else ""
        takes = f"Memory: about {size(found['memory'])}. Disk: about {size(found['disk'])}."
        table.caption = f"Estimates{workers}, which the bars refine. {takes}"
    return table


def about(seconds: float) -> str:
    """Return a rough duration in seconds, minutes or hours."""
    if seconds < 1:
        return "< 1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Return a rough number of bytes in MB or GB."""
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def _takes(pipeline: Pipeline, rows: Sequence[dict[str, Any]], work: Work | None, hands: Hands | None) -> dict[str, Any]:
    """Return seconds, bytes of memory and of disk, and workers, as far as they are known."""
    if work is None:
        return {"seconds": None, "memory": None, "disk": None, "workers": None}
    workers = 1 if hands is None else hands.workers
    todo = {row["stage"]: row["seconds"] for row in rows if not row["done"]}
    total = sum(todo.values())
    shared = sum(seconds for stage, seconds in todo.items() if stage == "probe" or stage.startswith("control "))
    together = len(pipeline.recipe.runs.optimizers)
    memory = workers * (PROCESS + 3 * work.weights + together * work.kept)
    seconds = total - shared * (1 - 1 / workers)
    return {"seconds": seconds, "memory": memory, "disk": disk_needed(pipeline.recipe, work), "workers": workers}


def _merging(pipeline: Pipeline, work: Work) -> float:
    """Return the seconds of a merge: reading and writing, and the losses that it chooses by, if the data are known."""
    runs = pipeline.recipe.runs
    batches = _rows(pipeline, "validation") / runs.batch_size
    return (len(runs.optimizers) + 2) * work.weights / READ + CHOICES * work.forward * batches


def _rows(pipeline: Pipeline, *splits: SplitName) -> int:
    """Return the number of rows in some splits of the data; 0 if they have not been read."""
    return sum(len(getattr(pipeline.data, name)) for name in splits) if "data" in vars(pipeline) else 0


def disk_needed(recipe: Recipe, work: Work) -> int:
    """Return the bytes that a finished output folder takes at least."""
    runs = recipe.runs
    adapter = recipe.adapter
    each = work.weights if isinstance(adapter, Full) else work.per_rank * adapter.rank if isinstance(adapter, Lora) else 0
    first = [spec for seed in runs.seeds for spec in _first(recipe, seed)]
    specs = [*first, *(spec for specs in _controls(recipe, first).values() for spec in specs)]
    models = len(recipe.merge) * len(runs.seeds)
    return (1 + models) * work.weights + sum(1 + len(spec.snapshots) for spec in specs) * each + REPORT


def _first(recipe: Recipe, seed: int) -> list[RunSpec]:
    return [RunSpec(f"{name}-{seed}", name, seed, recipe.runs.own_steps) for name in recipe.runs.optimizers]


def _probe(pipeline: Pipeline) -> int:
    """Return the passes of the probe, about: which models are compared closely is known once they are trained."""
    recipe = pipeline.recipe
    probe, runs, seeds = recipe.probe, recipe.runs, len(recipe.runs.seeds)
    held_out = _rows(pipeline, "validation", "test") / probe.batch_size
    gradient = 0 if probe.preset == "quick" else BACKWARD
    of_all, of_close = recipe_metrics(probe)
    judged = sum(kind in recipe.controls for kind, control in CONTROLS.items() if control.rival_in == "flatter") + 2
    close = sum(kind in recipe.controls for kind, control in CONTROLS.items() if control.rival_in == "better")
    others = len(runs.optimizers) + len(recipe.merge) - 1
    groups = (
        (judged, of_close),
        (close, [metric.in_few(probe) for metric in of_close]),
        (others, [metric.in_few(probe) for metric in of_all]),
    )
    forward = seeds * sum(
        count * ((1 + gradient) * probe.batches + held_out)
        + sum(count * metric.passes(metric.options_of(probe), probe.batches) for metric in metrics)
        for count, metrics in groups
    )
    return round(forward / BACKWARD * probe.batch_size / runs.batch_size)


def _row(stage: str, work: str, passes: int, done: bool | None, each: float) -> dict[str, Any]:
    return {"stage": stage, "work": work, "passes": passes, "done": bool(done), "seconds": passes * each}


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
