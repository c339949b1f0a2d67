"""Assess an experiment: measure all artefacts, derive controls, reach the verdict and select the artefact to use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

from emomerge.adapters import open_run
from emomerge.checkpoints import atomic, open_checkpoint
from emomerge.controls import CONTROLS, PLAIN_MEAN, SINGLE_RUN
from emomerge.errors import BadInput
from emomerge.experiment.crew import probing
from emomerge.experiment.measure import Artefact, Measured, Measurer, fingerprint, united
from emomerge.experiment.recommendation import recommend
from emomerge.experiment.survey import survey, survey_in_pieces
from emomerge.probing import verdict
from emomerge.probing.registry import METRICS, Metric, recipe_metrics
from emomerge.progress import Display
from emomerge.recipe import Recipe
from emomerge.results import Column, Evidence, ProbeFacts, Results, Verdict
from emomerge.training import Context, Engine


@dataclass(frozen=True)
class Contestants:
    """All artefacts that an experiment compares."""

    base: Artefact
    runs: Sequence[Artefact]
    merges: Mapping[str, Sequence[Artefact]]
    """Label → one merge for each training seed."""
    best: Sequence[Artefact]
    """The best single run of each training seed."""
    controls: Mapping[str, Sequence[Artefact]]
    """Kind of control → one artefact for each training seed that has it."""
    snapshots: Sequence[Artefact] = ()
    """Snapshots of the long runs."""


@dataclass(frozen=True)
class Comparison:
    """A merge and its rivals (label → artefact) of one training seed."""

    merge: Artefact
    in_sharpness: Mapping[str, Artefact]
    in_loss: Mapping[str, Artefact]


def assess(
    recipe: Recipe, measurer: Measurer, contestants: Contestants, *, display: Display, engine: Engine | None = None
) -> Results:
    """Measure everything and judge the recipe's first merge.

    The verdict is about this merge, which was fixed before anything was measured, to avoid selection bias.

    Args:
        recipe: the experiment.
        measurer: measures artefacts.
        contestants: all artefacts except the controls that are derived from a merge.
        display: shows progress.
        engine: starts workers for the probe; None measures in this process.

    Returns:
        Results with figures, landscapes, verdict and selection; the caller adds the rest.
    """
    label = recipe.merge[0].label
    planned = _planned(recipe, measurer, contestants)
    everything, controls, comparisons = planned.artefacts, planned.controls, planned.comparisons
    _, of_close = recipe_metrics(recipe.probe)
    measured = survey(
        measurer, everything, planned.metrics, planned.judged,
        display=display, engine=engine, later=measurer.passes_together(of_close),
    )  # fmt: skip
    merge, best = contestants.merges[label][0], contestants.best[0]  # first seed: figures only, not the verdict
    runs = [run for run in contestants.runs if run.seed == best.seed]
    measurer.probe_together(measured, merge, best, runs, of_close)
    models = _all({kind: made for kind, made in controls.items() if CONTROLS[kind].rival_in == "better"})
    results = _results(recipe, measured)
    return results.model_copy(
        update={
            "probe": _probe_facts(recipe, measurer, contestants.base),
            "held_out": measurer.held_out(everything),
            "verdict": _judge(recipe, measurer, comparisons, measured),
            "selected": recommend(
                measurer,
                contestants.base,
                contestants.runs,
                [contestants.merges[merge.label] for merge in recipe.merge],
                models,
            )
            if recipe.select == "best"
            else None,
        }
    )


@dataclass(frozen=True)
class _Planned:
    """What is measured of which artefacts."""

    artefacts: Sequence[Artefact]
    controls: Mapping[str, Sequence[Artefact]]
    """Kind → artefacts, those derived from merges included."""
    comparisons: Sequence[Comparison]
    metrics: Mapping[str, Sequence[Metric]]
    """Name → metrics of the artefact."""
    judged: set[str]
    """Names of the artefacts that the verdict compares in sharpness."""


def _planned(recipe: Recipe, measurer: Measurer, contestants: Contestants) -> _Planned:
    controls = {**contestants.controls, **derived_controls(recipe, measurer, contestants)}
    comparisons = _comparisons(recipe, contestants, controls)
    everything = [contestants.base, *contestants.runs, *_all(contestants.merges), *_all(controls)]
    close = {
        contestants.base.name,
        *(a.name for c in comparisons for a in (c.merge, *c.in_sharpness.values(), *c.in_loss.values())),
    }
    of_all, of_close = recipe_metrics(recipe.probe)
    metrics = {a.name: of_close if a.name in close else of_all for a in everything}
    judged = {artefact.name for c in comparisons for artefact in (c.merge, *c.in_sharpness.values())}
    return _Planned(everything, controls, comparisons, metrics, judged)


def measure_ahead(recipe: Recipe, measurer: Measurer, contestants: Contestants) -> Iterator[None]:
    """Measure, piece by piece, what there is to measure before all controls are trained; `assess` then finds it in the ledger.

    Args:
        recipe: the experiment.
        measurer: measures artefacts.
        contestants: the artefacts that there are by now.
    """
    planned = _planned(recipe, measurer, contestants)
    wanted = {control.label for kind, control in CONTROLS.items() if kind in recipe.controls and control.rival_in == "flatter"}
    complete = wanted <= planned.comparisons[0].in_sharpness.keys()
    yield from survey_in_pieces(measurer, planned.artefacts, planned.metrics, planned.judged, complete=complete)


def probe_models(
    recipe: Recipe,
    models: Sequence[str],
    base_folder: Path,
    out: Path,
    display: Display,
    metrics: Sequence[str] | None = None,
    engine: Engine | None = None,
    workers: int | None = 1,
) -> Results:
    """Measure given models on a recipe's data, resumably: `results.json` and `evaluations.jsonl` in `out`.

    Args:
        recipe: gives the data and the probe.
        models: checkpoints, adapters or run directories, all of the base's architecture.
        base_folder: the base that they are compared with; its RMS sets the radii.
        out: folder for results and ledger.
        display: shows progress.
        metrics: names of metrics; by default those of the recipe.
        engine: starts workers for the probe.
        workers: without an engine, the number of processes that share the work; None lets the work decide.

    Raises:
        BadInput: `out` is the output folder of a recipe, or a metric is unknown.
    """
    _, chosen = recipe_metrics(recipe.probe, metrics)
    if (out / "recipe.yaml").exists():
        raise BadInput("the output folder of a recipe has results of its own", where=out, fix="choose another -o")
    base = open_checkpoint(base_folder)
    checkpoints = [open_run(base, model) for model in models]
    context = Context(recipe, base_folder, fingerprint(base))
    measurer = Measurer(context, out / "evaluations.jsonl")
    artefacts = [Artefact("base", "base", base, context.base_hash, path=base_folder)]
    short = [Path(model).name for model in models]
    for model, checkpoint in zip(models, checkpoints, strict=True):
        name = Path(model).name if short.count(Path(model).name) == 1 and Path(model).name != "base" else model
        artefacts.append(Artefact(name, "merge", checkpoint, fingerprint(checkpoint), path=Path(model)))
    passes = sum(measurer.passes_of(artefact, chosen) for artefact in artefacts)
    held = contextlib.nullcontext(engine) if engine is not None else probing(measurer, passes, workers, display)
    with held as engine, display.live():
        later = measurer.passes_together(chosen) if len(artefacts) > 2 else 0.0
        metrics_of, names = {artefact.name: chosen for artefact in artefacts}, [artefact.name for artefact in artefacts]
        measured = survey(measurer, artefacts, metrics_of, names, display=display, engine=engine, later=later)
        if len(artefacts) > 2:
            measurer.probe_together(measured, artefacts[1], artefacts[2], artefacts[2:], chosen)
    results = _results(recipe, measured).model_copy(
        update={"probe": ProbeFacts.model_validate(recipe.probe.model_dump()), "held_out": measurer.held_out(artefacts)}
    )
    atomic.write_text(out / "results.json", results.to_json())
    return results


def derived_controls(recipe: Recipe, measurer: Measurer, contestants: Contestants) -> dict[str, list[Artefact]]:
    """Return the controls of the recipe that are derived from its first merge, by kind."""
    merges = contestants.merges[recipe.merge[0].label]
    wanted = {kind: derive for kind, derive in DERIVED.items() if kind in recipe.controls}
    return {kind: [a for merge in merges for a in derive(measurer, contestants, merge)] for kind, derive in wanted.items()}


def _distance_matched(measurer: Measurer, contestants: Contestants, merge: Artefact) -> list[Artefact]:
    return [measurer.distance_matched(run, merge) for run in contestants.best if run.seed == merge.seed]


def _loss_matched(measurer: Measurer, contestants: Contestants, merge: Artefact) -> list[Artefact]:
    snapshots = [snapshot for snapshot in contestants.snapshots if snapshot.seed == merge.seed]
    return [measurer.loss_matched(snapshots, merge)] if snapshots else []


DERIVED: Mapping[str, Callable[[Measurer, Contestants, Artefact], list[Artefact]]] = {
    "distance-matched": _distance_matched,
    "loss-matched": _loss_matched,
}
"""Kind of control → function that derives its artefacts from a merge."""


def _comparisons(recipe: Recipe, contestants: Contestants, controls: Mapping[str, Sequence[Artefact]]) -> list[Comparison]:
    """Return one comparison per training seed, with the rivals that exist for every seed: others would be unpaired."""
    label, mean = recipe.merge[0].label, _plain_mean(recipe)
    found = []
    for index, (merge, single) in enumerate(zip(contestants.merges[label], contestants.best, strict=True)):
        in_sharpness, in_loss = {SINGLE_RUN: single}, {}
        if sweep := [a for a in controls.get("adamw-sweep", ()) if _belongs(a, merge, single)]:
            in_loss[CONTROLS["adamw-sweep"].label] = sweep[0]  # the first rival: what one does otherwise
        in_loss[SINGLE_RUN] = single
        if mean not in (None, label):
            in_loss[PLAIN_MEAN] = contestants.merges[mean][index]
        for kind, control in CONTROLS.items():
            rival = next((a for a in controls.get(kind, ()) if _belongs(a, merge, single)), None)
            if rival is not None:
                (in_sharpness if control.rival_in == "flatter" else in_loss)[control.label] = rival
        found.append(Comparison(merge, in_sharpness, in_loss))
    return [
        Comparison(
            c.merge, _shared(c.in_sharpness, [f.in_sharpness for f in found]), _shared(c.in_loss, [f.in_loss for f in found])
        )
        for c in found
    ]


def _belongs(control: Artefact, merge: Artefact, single: Artefact) -> bool:
    """Return whether a control is matched to the merge or the best run of a training seed, or was trained with that seed."""
    return control.seed == single.seed if control.of is None else control.of in (merge.name, single.name)


def _shared(rivals: Mapping[str, Artefact], of_all_seeds: Sequence[Mapping[str, Artefact]]) -> dict[str, Artefact]:
    return {label: rival for label, rival in rivals.items() if all(label in others for others in of_all_seeds)}


def _plain_mean(recipe: Recipe) -> str | None:
    """Return the label of the recipe's plain mean, if it has one."""
    means = (spec.label for spec in recipe.merge if (spec.method, spec.of) == ("mean", "runs") and not spec.params)
    return next(means, None)


def _judge(recipe: Recipe, measurer: Measurer, comparisons: Sequence[Comparison], measured: Mapping[str, Measured]) -> Verdict:
    """Return the verdict on the recipe's first merge over all training seeds."""
    label, rivals = recipe.merge[0].label, comparisons[0]
    better_missing = [PLAIN_MEAN] if _plain_mean(recipe) != label and PLAIN_MEAN not in rivals.in_loss else []
    better_missing += _missing("better", rivals.in_loss)
    flatter_missing = [f"{name} control" for name in _missing("flatter", rivals.in_sharpness)]
    found = verdict.overall(
        label,
        verdict.judge_better(_in_loss(measurer, comparisons), [f"the {name}" for name in better_missing]),
        verdict.judge_flatter(
            _in_sharpness(recipe, comparisons, measured), len(_radii(recipe)), [f"the {name}" for name in flatter_missing]
        ),
        merge=rivals.merge.name,
        best_single=[c.in_loss[SINGLE_RUN].name for c in comparisons],
    )
    caveats = []
    if recipe.runs.trunk_steps:
        caveats.append("a trunk: every single run profits from the steps that were taken for all")
    if (rounds := recipe.runs.rounds) > 1:
        caveats.append(f"{rounds} rounds: a single run holds the means of all and had a share in their steps")
    return found.model_copy(update={"caveats": (*found.caveats, *caveats)})


def _missing(claim: str, rivals: Mapping[str, Artefact]) -> list[str]:
    """Return the labels of the controls that a claim needs and that were not measured."""
    needed = [control for control in CONTROLS.values() if control.rival_in == claim and control.required]
    return [control.label for control in needed if control.label not in rivals]


def _in_loss(measurer: Measurer, comparisons: Sequence[Comparison]) -> list[Evidence]:
    losses = {a.name: measurer.scores(a, "test") for c in comparisons for a in (c.merge, *c.in_loss.values())}
    return [
        verdict.loss_difference(
            [losses[c.merge.name]["loss"] for c in comparisons],
            [losses[c.in_loss[rival].name]["loss"] for c in comparisons],
            losses[comparisons[0].merge.name]["weight"],
            against=rival,
            what="test loss",
        )
        for rival in comparisons[0].in_loss
    ]


def _in_sharpness(recipe: Recipe, comparisons: Sequence[Comparison], measured: Mapping[str, Measured]) -> list[Evidence]:
    merged = measured[comparisons[0].merge.name]
    looks: list[tuple[str, int | EllipsisType, str]] = [
        ("gaussian", index, f"gaussian σ={radius:g}") for index, radius in enumerate(_radii(recipe))
    ]
    looks += [(name, ..., name) for name in verdict.HESSIAN if name in merged.series]
    return [
        verdict.sharpness_ratio(
            [measured[c.merge.name].series[name][at] for c in comparisons],
            [measured[c.in_sharpness[rival].name].series[name][at] for c in comparisons],
            merged.weights[name],
            against=rival,
            what=what,
        )
        for rival in comparisons[0].in_sharpness
        for name, at, what in looks
    ]


def _radii(recipe: Recipe) -> Sequence[float]:
    """Return the radii at which the verdict compares sharpness."""
    radii: Sequence[float] = METRICS["gaussian"].options_of(recipe.probe)["radii"]
    return radii


def _results(recipe: Recipe, measured: Mapping[str, Measured]) -> Results:
    figures: dict[str, Any] = {}
    for found in measured.values():
        figures = united(figures, found.results)
    rows = [found.artefact_row() for found in measured.values()]
    columns = united_columns(found.columns for found in measured.values())
    return Results.model_validate({"name": recipe.name, "columns": columns, "artefacts": rows, **figures})


def united_columns(of_artefacts: Iterable[Sequence[Column]]) -> list[Column]:
    """Return the columns of all artefacts; a column that some artefacts lack stays after the one that precedes it."""
    union: list[Column] = []
    for columns in of_artefacts:
        place = 0
        for column in columns:
            known = next((i for i, other in enumerate(union) if other.key == column.key), None)
            if known is None:
                union.insert(place, column)
            place = (place if known is None else known) + 1
    return union


def _probe_facts(recipe: Recipe, measurer: Measurer, base: Artefact) -> ProbeFacts:
    rows = len(measurer.probe_rows[recipe.probe.data])
    others = METRICS["gaussian"].in_few(recipe.probe)
    facts = {
        "rows": rows,
        "noise_floor": measurer.noise_floor(base),
        "other_directions": others.directions(recipe.probe),
        "other_radius": others.options_of(recipe.probe)["radii"][0] if others.middle else None,
    }
    return ProbeFacts.model_validate(recipe.probe.model_dump() | facts)


def _all(groups: Mapping[str, Sequence[Artefact]]) -> list[Artefact]:
    return [artefact for group in groups.values() for artefact in group]
