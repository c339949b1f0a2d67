"""The experiment's result: every figure of every artefact, its controls, the verdict, and which artefact to use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emomerge.measure import Artefact, Measurer
from emomerge.probing import verdict
from emomerge.progress import Display
from emomerge.recipe import Recipe

Array = NDArray[np.float64]

SINGLE, MATCHED, LOSS_MATCHED, MEAN = "best single run", "distance-matched", "loss-matched", "plain mean"
LONG, ADAMW, ADAMW_AVERAGE, SWA = (
    "long run of equal steps", "AdamW with cosine, equal steps", "average of AdamW runs", "SWA of the long run",
)  # fmt: skip
"""The merge's rivals."""
UNMEASURED_FLATNESS = ("λmax and trace of the Hessian",)
"""What the claim `flatter` needs and the preset `quick` does not measure."""


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

    Returns:
        `artefacts`, `probe`, `curves`, `verdict` and `selected` of results.json.
    """
    label = recipe.merge[0].label
    matched = _distance_matched(recipe, measurer, runs, merges[label])
    alike = _loss_matched(recipe, measurer, rivals["snapshots"], merges[label])
    trained = [a for kind in ("long-run", "adamw-long-run", "adamw-average", "swa") for a in rivals[kind]]
    rows, curves, sharpness = [], {}, {}
    everything = [base, *runs, *(merge for group in merges.values() for merge in group), *trained, *matched, *alike]
    line = display.line("probe", len(everything) * recipe.probe.directions)
    for artefact in everything:
        row, values, curve = measurer.probe(artefact, line)
        rows.append(row)
        sharpness[artefact.name] = values
        if curve["alpha"]:
            curves[artefact.name] = curve
    mean = next((spec.label for spec in recipe.merge if spec.method == "mean" and not spec.params), None)
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
                    LONG: [a for a in rivals["long-run"] if a.seed == single.seed],
                    ADAMW: [a for a in rivals["adamw-long-run"] if a.seed == single.seed],
                    ADAMW_AVERAGE: [a for a in rivals["adamw-average"] if a.seed == single.seed],
                    SWA: [a for a in rivals["swa"] if a.seed == single.seed],
                }
            ),
        )
        for index, (merged, single) in enumerate(zip(merges[label], best, strict=True))
    ]
    contests = _everywhere(contests)
    found = _judge(recipe, measurer, label, contests, sharpness, mean_needed=mean != label)
    if (rounds := recipe.runs.rounds) > 1:
        found["caveats"].append(f"{rounds} rounds: a single run holds the means of all and had a share in their steps")
    return {
        "artefacts": rows,
        "probe": {
            **recipe.probe.model_dump(mode="json"),
            "rows": len(measurer.probe_rows[recipe.probe.data]),
            "noise_floor": measurer.noise_floor(base),
        },
        "curves": curves,
        "verdict": {**found, "merge": merges[label][0].name, "best_single": [run.name for run in best]},
        "selected": select(rows) if recipe.select == "best" else None,
    }


def _distance_matched(
    recipe: Recipe, measurer: Measurer, runs: Sequence[Artefact], merged: Sequence[Artefact]
) -> list[Artefact]:
    if "distance-matched" not in recipe.controls:
        return []
    return [measurer.distance_matched(run, merge) for merge in merged for run in runs if run.seed == merge.seed]


def _everywhere(contests: Sequence[Contest]) -> list[Contest]:
    """The contests with the rivals alone that every training seed has: one that diverged leaves the others unpaired."""
    flat = [name for name in contests[0].flat if all(name in c.flat for c in contests)]
    better = [name for name in contests[0].better if all(name in c.better for c in contests)]
    return [Contest(c.merge, {n: c.flat[n] for n in flat}, {n: c.better[n] for n in better}) for c in contests]


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
    recipe: Recipe,
    measurer: Measurer,
    label: str,
    contests: Sequence[Contest],
    sharpness: Mapping[str, Sequence[Array]],
    *,
    mean_needed: bool,
) -> dict[str, Any]:
    """The verdict on one merge method over all training seeds."""
    probe = recipe.probe
    weight = measurer.unit_weights(contests[0].merge)
    flat = [
        verdict.sharpness_ratio(
            [sharpness[c.merge.name][r] for c in contests],
            [sharpness[c.flat[rival].name][r] for c in contests],
            weight,
            against=rival,
            what=f"gaussian σ={radius:g}",
        )
        for rival in contests[0].flat
        for r, radius in enumerate(probe.radii)
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
    flat_missing = [
        *UNMEASURED_FLATNESS,
        *(f"the {rival} control" for rival in (MATCHED, LOSS_MATCHED) if rival not in contests[0].flat),
    ]
    needed = {MEAN: mean_needed, LONG: True}
    better_missing = [f"the {rival}" for rival, is_needed in needed.items() if is_needed and rival not in contests[0].better]
    return verdict.overall(
        label,
        verdict.judge_better(better, better_missing),
        verdict.judge_flatter(flat, len(probe.radii), flat_missing),
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
