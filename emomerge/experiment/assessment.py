"""The experiment's result: every figure of every artefact, its controls, the verdict, and which artefact to use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emomerge.adapters import open_run
from emomerge.checkpoints import atomic, open_checkpoint
from emomerge.errors import BadInput
from emomerge.experiment.measure import PRESETS, Artefact, Measured, Measurer, fingerprint, steps_of
from emomerge.experiment.workers import spread
from emomerge.probing import verdict
from emomerge.progress import Display
from emomerge.recipe import Recipe
from emomerge.tasks import make_task
from emomerge.training import Engine, choose_device

Array = NDArray[np.float64]

SINGLE, MATCHED, LOSS_MATCHED, MEAN = "best single run", "distance-matched", "loss-matched", "plain mean"
LONG, ADAMW, ADAMW_AVERAGE, SWA = (
    "long run of equal steps", "AdamW with cosine, equal steps", "average of AdamW runs", "SWA of the long run",
)  # fmt: skip
"""The merge's rivals."""


@dataclass(frozen=True)
class Contest:
    """What one training seed brings to the verdict: the merge and its rivals as paired arrays."""

    merge: Artefact
    flat: Mapping[str, Artefact]
    """Rivals in sharpness."""
    better: Mapping[str, Artefact]
    """Rivals in held-out loss."""


def assess(
    recipe: Recipe,
    measurer: Measurer,
    *,
    base: Artefact,
    runs: Sequence[Artefact],
    merges: Mapping[str, Sequence[Artefact]],
    best: Sequence[Artefact],
    rivals: Mapping[str, Sequence[Artefact]],
    display: Display,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Measure everything and judge the recipe's first merge: named before any figure was seen, it is no pick of the luckiest.

    Args:
        recipe: what was asked for.
        measurer: measures artefacts.
        base: where all started.
        runs: the shallow runs.
        merges: label → one merge for each training seed.
        best: the best single run of each training seed.
        rivals: kind of control → its artefact for each training seed that has one (see `Pipeline.rivals`).
        display: shows progress.
        engine: what starts workers for the probe; None measures here.

    Returns:
        `artefacts`, `probe`, `curves`, `verdict` and `selected` of results.json.
    """
    label = recipe.merge[0].label
    matched = _distance_matched(recipe, measurer, runs, merges[label])
    alike = _loss_matched(recipe, measurer, rivals["snapshots"], merges[label])
    contests = _contests(recipe, merges, best, rivals, matched, alike)
    trained = [a for kind in ("long-run", "adamw-long-run", "adamw-average", "swa") for a in rivals[kind]]
    everything = [base, *runs, *(merge for group in merges.values() for merge in group), *trained, *matched, *alike]
    close = {base.name, *(a.name for c in contests for a in (c.merge, *c.flat.values(), *c.better.values()))}
    metrics = PRESETS[recipe.probe.preset]
    of_each = {a.name: metrics if a.name in close else PRESETS["quick"] for a in everything}
    if engine is not None:
        spread(engine, measurer, [(a, of_each[a.name]) for a in everything], display)
    line = display.line("probe", sum(steps_of(recipe, chosen) for chosen in of_each.values()))
    measured = {a.name: measurer.probe(a, line, of_each[a.name]) for a in everything}
    several = {}
    if recipe.probe.preset != "quick":  # of the first training seed: pictures, not evidence
        of_seed = [run for run in runs if run.seed == best[0].seed]
        several = measurer.landscapes(merges[label][0], best[0], of_seed, line, metrics)
        measured[merges[label][0].name].row["hessian"]["subspace"] = measurer.span(merges[label][0], of_seed)
    rows = [found.row for found in measured.values()]
    judged = _judge(recipe, measurer, label, contests, measured)
    if (rounds := recipe.runs.rounds) > 1:
        judged["caveats"].append(f"{rounds} rounds: a single run holds the means of all and had a share in their steps")
    return {
        "artefacts": rows,
        "probe": {
            **recipe.probe.model_dump(mode="json"),
            "rows": len(measurer.probe_rows[recipe.probe.data]),
            "noise_floor": measurer.noise_floor(base),
        },
        "curves": {name: found.curve for name, found in measured.items() if found.curve},
        **several,
        "verdict": {**judged, "merge": merges[label][0].name, "best_single": [run.name for run in best]},
        "selected": select(rows) if recipe.select == "best" else None,
    }


def probe_models(
    recipe: Recipe,
    models: Sequence[str],
    base_folder: Path,
    out: Path,
    display: Display,
    metrics: Sequence[str] | None = None,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Measure given models on a recipe's data, resumably: `results.json` and `evaluations.jsonl` in `out`.

    Args:
        recipe: gives data and probe.
        models: checkpoints, adapters or run directories, all of the base's architecture.
        base_folder: the base they are compared with; its RMS sets the ball.
        out: folder for results and ledger.
        display: shows progress.
        metrics: of those in PRESETS; by default what the recipe's preset holds.
        engine: what starts workers for the probe; None measures here.
    """
    metrics = PRESETS[recipe.probe.preset] if metrics is None else metrics
    if (out / "recipe.yaml").exists():
        raise BadInput("the output folder of a recipe has results of its own", where=out, fix="choose another -o")
    base = open_checkpoint(base_folder)
    task = make_task(recipe.task)
    checkpoints = [open_run(base, model) for model in models]
    measurer = Measurer(
        recipe,
        task,
        task.load_data(recipe.base),
        base,
        base_folder,
        fingerprint(base),
        choose_device(recipe.device),
        out / "evaluations.jsonl",
    )
    artefacts = [Artefact("base", "base", base, measurer.base_hash, path=base_folder)]
    short = [Path(model).name for model in models]
    for model, checkpoint in zip(models, checkpoints, strict=True):
        name = Path(model).name if short.count(Path(model).name) == 1 and Path(model).name != "base" else model
        artefacts.append(Artefact(name, "merge", checkpoint, fingerprint(checkpoint), path=Path(model)))
    rows, curves, several = [], {}, {}
    with display.live():
        if engine is not None:
            spread(engine, measurer, [(artefact, metrics) for artefact in artefacts], display)
        line = display.line("probe", len(artefacts) * steps_of(recipe, metrics))
        for artefact in artefacts:
            measured = measurer.probe(artefact, line, metrics)
            rows.append(measured.row)
            if measured.curve:
                curves[artefact.name] = measured.curve
        if len(artefacts) > 2:
            several = measurer.landscapes(artefacts[1], artefacts[2], artefacts[2:], line, metrics)
    results = {
        "name": recipe.name, "artefacts": rows, "curves": curves, "probe": recipe.probe.model_dump(mode="json"), **several,
    }  # fmt: skip
    atomic.write_json(out / "results.json", results)
    return results


def _contests(
    recipe: Recipe,
    merges: Mapping[str, Sequence[Artefact]],
    best: Sequence[Artefact],
    rivals: Mapping[str, Sequence[Artefact]],
    matched: Sequence[Artefact],
    alike: Sequence[Artefact],
) -> list[Contest]:
    """One contest for each training seed, with the rivals alone that every seed has: one that diverged leaves them unpaired."""
    label, mean = recipe.merge[0].label, _plain_mean(recipe)
    kinds = {LONG: "long-run", ADAMW: "adamw-long-run", ADAMW_AVERAGE: "adamw-average", SWA: "swa"}
    contests = [
        Contest(
            merged,
            flat=_present(
                {
                    SINGLE: [single],
                    MATCHED: [m for m in matched if m.of == single.name],
                    LOSS_MATCHED: [a for a in alike if a.of == merged.name],
                }
            ),
            better=_present(
                {
                    SINGLE: [single],
                    MEAN: [merges[mean][index]] if mean not in (None, label) else [],
                    **{rival: [a for a in rivals[kind] if a.seed == single.seed] for rival, kind in kinds.items()},
                }
            ),
        )
        for index, (merged, single) in enumerate(zip(merges[label], best, strict=True))
    ]
    flat = [name for name in contests[0].flat if all(name in c.flat for c in contests)]
    better = [name for name in contests[0].better if all(name in c.better for c in contests)]
    return [Contest(c.merge, {n: c.flat[n] for n in flat}, {n: c.better[n] for n in better}) for c in contests]


def _plain_mean(recipe: Recipe) -> str | None:
    """The label of the recipe's plain mean, if it has one."""
    return next((spec.label for spec in recipe.merge if spec.method == "mean" and not spec.params), None)


def _distance_matched(
    recipe: Recipe, measurer: Measurer, runs: Sequence[Artefact], merged: Sequence[Artefact]
) -> list[Artefact]:
    if "distance-matched" not in recipe.controls:
        return []
    return [measurer.distance_matched(run, merge) for merge in merged for run in runs if run.seed == merge.seed]


def _loss_matched(
    recipe: Recipe, measurer: Measurer, snapshots: Sequence[Artefact], merged: Sequence[Artefact]
) -> list[Artefact]:
    if "loss-matched" not in recipe.controls:
        return []
    of_seed = [(m, [s for s in snapshots if s.seed == m.seed]) for m in merged]
    return [measurer.loss_matched(kept, merge) for merge, kept in of_seed if kept]


def _present(rivals: Mapping[str, Sequence[Artefact]]) -> dict[str, Artefact]:
    return {name: found[0] for name, found in rivals.items() if found}


def _judge(
    recipe: Recipe, measurer: Measurer, label: str, contests: Sequence[Contest], measured: Mapping[str, Measured]
) -> dict[str, Any]:
    """The verdict on one merge method over all training seeds."""
    radii = recipe.probe.radii
    looks: list[tuple[str, int | None, str]] = [("gaussian", r, f"gaussian σ={radius:g}") for r, radius in enumerate(radii)]
    if "hessian" in PRESETS[recipe.probe.preset]:
        looks += [(what, None, what) for what in verdict.HESSIAN]
    flat = [
        verdict.sharpness_ratio(
            [measured[c.merge.name].figures(metric, at) for c in contests],
            [measured[c.flat[rival].name].figures(metric, at) for c in contests],
            measured[contests[0].merge.name].weights[metric],
            against=rival,
            what=what,
        )
        for rival in contests[0].flat
        for metric, at, what in looks
    ]
    losses = {a.name: measurer.scores(a, "test") for c in contests for a in (c.merge, *c.better.values())}
    better = [
        verdict.loss_difference(
            [losses[c.merge.name]["loss"] for c in contests],
            [losses[c.better[rival].name]["loss"] for c in contests],
            losses[contests[0].merge.name]["weight"],
            against=rival,
            what="test loss",
        )
        for rival in contests[0].better
    ]
    flat_missing = [f"the {rival} control" for rival in (MATCHED, LOSS_MATCHED) if rival not in contests[0].flat]
    needed = {MEAN: label != _plain_mean(recipe), LONG: True}
    better_missing = [f"the {rival}" for rival, is_needed in needed.items() if is_needed and rival not in contests[0].better]
    return verdict.overall(
        label,
        verdict.judge_better(better, better_missing),
        verdict.judge_flatter(flat, len(radii), flat_missing),
        seeds=len(contests),
    )


def select(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The run or merge with the lowest validation loss, and a sentence that says so where it is no merge."""
    run, merged = (
        min((row for row in rows if row["role"] == role), key=lambda row: float(row["validation_loss"]))
        for role in ("run", "merge")
    )
    merge_wins = merged["validation_loss"] < run["validation_loss"]
    winner, other = (merged, run) if merge_wins else (run, merged)
    reason = (
        f"the lowest validation loss, {winner['validation_loss']:.4f}, against {other['validation_loss']:.4f} of the best "
        f"single run, {other['name']}"
        if merge_wins
        else f"no merge has a lower validation loss than this single run's {winner['validation_loss']:.4f} "
        f"({other['name']}: {other['validation_loss']:.4f})"
    )
    return {
        "name": winner["name"],
        "path": winner["path"],
        "validation_loss": winner["validation_loss"],
        "sentence": f"Use {winner['name']}: {reason}.",
    }
