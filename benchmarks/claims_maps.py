"""Claims about TALL-masks: maps of the loss and the flatness over reference, number of votes and λ."""

from __future__ import annotations

from typing import Any

from claims_core import Arm, Effort, Figures, Units, Verdict, claim, counted, interval_text, worded
from claims_merging import ABOUT, SETTINGS, SHALLOW, Member, State, Task, by_task, task, train_apart
from claims_merging_charts import heat
from claims_training import FIVE, OURS, PUBLISHED
from evidence_tables import Estimate

TASKS = ("strong", "digits")
REFERENCES = ("mean", "sum", "ties")
VOTES = (1, 2, 4)
LAMBDAS = (0.1, 0.2, 0.4, 0.7, 1.0, 1.5)
CELLS = {f"{r}, {k}, {x:g}": (r, k, x) for r in REFERENCES for k in VOTES for x in LAMBDAS}
PRINTED, DEFAULT = "sum, 2, 0.4", "mean, 2, 0.4"
"""What Wang et al. publish for tasks of several kinds, and emomerge's default."""
SINGLE, MEAN, SCALED = "best single run", "mean", "mean, scale tuned"
SHORT = {"published": PUBLISHED, "ours": OURS}
VALIDATION, TEST, SHARPNESS = range(3)


def _estimate(units: Units, arm: Arm, first: str, second: str | None = None, figure: int = TEST) -> Estimate:
    """Return a figure of a cell or a control, or the difference of two, paired by seed."""

    def value(figures: Figures, name: str) -> float:
        found = figures[name][figure]
        return float("inf") if found is None else float(found)

    values = [unit.figures for unit in units.of(**arm)]
    return Estimate(tuple(value(f, first) - (0.0 if second is None else value(f, second)) for f in values))


def _chosen(units: Units, arm: Arm) -> str:
    return min(CELLS, key=lambda cell: _estimate(units, arm, cell, figure=VALIDATION).mean)


def judge_maps(units: Units) -> Verdict:
    rows = [["task, preset", SINGLE, MEAN, SCALED, "sum, k 2, λ 0.4", "mean, k 2, λ 0.4", "best cell (reference, k, λ)",
             "it − best single", "it − scaled mean", "its sharpness ÷ the mean's"]]  # fmt: skip
    flags, single, scaled, flatter = [], [], [], []
    for arm in units.arms():
        cell = _chosen(units, arm)
        single.append(_estimate(units, arm, cell, SINGLE))
        scaled.append(_estimate(units, arm, cell, SCALED))
        flatter.append(_estimate(units, arm, cell, MEAN, SHARPNESS))
        flags.append(single[-1].sign < 0 and scaled[-1].sign < 0)
        ratio = _estimate(units, arm, cell, figure=SHARPNESS).mean / _estimate(units, arm, MEAN, figure=SHARPNESS).mean
        losses = [f"{_estimate(units, arm, name).mean:.3f}" for name in (SINGLE, MEAN, SCALED, PRINTED, DEFAULT, cell)]
        rows.append([
            f"{SETTINGS[arm['task']].title}, `{arm['preset']}`", *losses[:5], f"{losses[5]} ({cell})",
            interval_text(single[-1]), interval_text(scaled[-1]), f"{ratio:.2f}",
        ])  # fmt: skip
    printed = [_estimate(units, arm, PRINTED, SINGLE).sign > 0 for arm in units.arms()]
    plain = [_estimate(units, arm, DEFAULT, MEAN) for arm in units.arms()]
    text = (
        f"The cell of the map that is best on validation data has a lower test loss than the best single run in "
        f"{counted(d.sign < 0 for d in single)} cases, higher in {counted(d.sign > 0 for d in single)}; lower than the plain "
        f"mean with a tuned scale in {counted(d.sign < 0 for d in scaled)}, higher in {counted(d.sign > 0 for d in scaled)}; "
        f"and is flatter than the plain mean in {counted(d.sign < 0 for d in flatter)}. With the sum as reference, k = 2 and "
        f"λ = 0.4 the merge is worse than the best single run in {counted(printed)}. The default cell differs from the plain "
        f"mean by {max(abs(d.mean) for d in plain):.3f} at most."
    )
    notes = (
        f"Test losses; {SHALLOW} steps a run. Cells and scales are chosen by the mean validation loss over the seeds. "
        "Sharpness: Gaussian, at a tenth of the base's RMS per tensor, on 2,000 training rows. "
        f"{ABOUT}"
    )
    return Verdict(worded(flags), text, rows, notes)


def draw_maps(units: Units) -> Any:
    rows = []
    for cell, (reference, k, x) in CELLS.items():
        row: dict[str, Any] = {"column": f"reference: {reference}", "x": x, "y": k}
        for short, preset in SHORT.items():
            arm = {"task": "strong", "preset": preset}
            row[f"loss_{short}"] = _estimate(units, arm, cell, SINGLE).mean
            row[f"sharpness_{short}"] = _estimate(units, arm, cell, figure=SHARPNESS).mean
        rows.append(row)
    panels = [(f"loss_{short}", f"{preset}: loss − best run", "blueorange") for short, preset in SHORT.items()]
    panels += [(f"sharpness_{short}", f"{preset}: sharpness", "viridis") for short, preset in SHORT.items()]
    title = [
        "FashionMNIST, strong: where tall-mask merges are lower than the best of the five runs, and where they are flat",
    ]
    columns = [f"reference: {reference}" for reference in REFERENCES]
    return heat(rows, title, x="λ", y="k", columns=columns, panels=panels, labels=[p[0] for p in panels[:2]])


@claim(
    name="maps",
    says="TALL-masks emphasise what the runs have in common and so make a merge better than its runs, and flatter.",
    source="paper, “multiple positioning”, 2 and 3",
    control="A map of 54 cells (three references, three numbers of votes, six λ) beside the best single run, the plain mean, "
    "and the plain mean with a scale chosen on the same validation data, since a mask also shortens the task vector. It would "
    "hold if the chosen cell were lower than both the best run and the scaled mean in all cases, with intervals off 0.",
    taught="At its defaults the mask removes almost nothing from runs on one task: the merge is their mean. `reference: mean` "
    "stays the default, and emomerge goes on warning of the sum, which loses what all runs agree on. What a mask gains over "
    "the mean it gains where runs have hardly converged, with a reference longer than the mean (a tuned scale ends at 1.5). "
    "The merge that we recommend is another, the soup of rounds.",
    arms=by_task([{"preset": PUBLISHED}, {"preset": OURS}], TASKS),
    judge=judge_maps,
    figure=draw_maps,
)
def maps(arm: Arm, seed: int, effort: Effort) -> Figures:
    """Validation loss, test loss and sharpness of every cell and of the controls."""
    of = task(arm["task"], effort)
    published = arm["preset"] == PUBLISHED  # trains all runs on the same batches
    members = [Member(f"{name}/{arm['preset']}", 0 if published else order) for order, name in enumerate(FIVE)]
    states = train_apart(of, members, seed, effort.steps(SHALLOW))
    figures: Figures = {
        cell: _measured(of, of.merge(states, "tall-mask", reference=reference, k=k, lambda_=x))
        for cell, (reference, k, x) in CELLS.items()
    }
    single = _measured(of, of.best(states))
    mean, scaled = of.merge(states, "mean"), of.merge(states, "mean", scale="auto")
    return figures | {SINGLE: single, MEAN: _measured(of, mean), SCALED: _measured(of, scaled)}


def _measured(of: Task, state: State) -> list[float | None]:
    """Return validation loss, test loss and sharpness, with five significant digits."""
    found = [*of.losses(state), of.sharpness(state, directions=4)["0.1"]]
    return [None if value is None else float(f"{value:.5g}") for value in found]
