"""Claims about flat minima: are merges flatter than what they are merged of, at the same distance and at the same loss?"""

from __future__ import annotations

import statistics
from typing import Any

from claims_core import Arm, Effort, Figures, Units, Verdict, claim, counted, interval_text, worded
from claims_merging import ABOUT, SETTINGS, SHALLOW, Member, Run, State, Task, by_task, soup_of, task, train_apart, train_rounds
from claims_merging_charts import dot, dots
from claims_training import FIVE, OURS, PUBLISHED

TASKS = ("mild", "strong", "digits")
PROCEDURES = {"v3.8 apart": "`v3.8`, tall-mask", "auto apart": "`auto`, tall-mask", "rounds": "default, soup of rounds"}
RADII = (0.03, 0.1)
SNAPSHOTS = 40


def judge_flatter(units: Units) -> Verdict:
    rows = [["task, merge", "sharpness of the merge", "best run", "best run at ‖merge‖", "all runs at ‖merge‖",
             "same training loss", "merge − best run at ‖merge‖", "merge − same loss",
             "training loss: merge, run at ‖merge‖, same loss"]]  # fmt: skip
    at_distance, at_loss, against_run = [], [], []
    for arm in units.arms():
        differences = [_difference(units, arm, other) for other in ("best run", "best run at ‖merge‖", "same training loss")]
        against_run.append(differences[0])
        at_distance.append(differences[1])
        at_loss.append(differences[2])
        sharp = [
            f"{units.estimate(f'{name} sharpness', **arm).mean:.4f}"
            for name in ("merge", "best run", "best run at ‖merge‖", "all runs at ‖merge‖", "same training loss")
        ]
        losses = [units.estimate(f"{name} loss", **arm).mean for name in ("merge", "best run at ‖merge‖", "same training loss")]
        rows.append([
            f"{SETTINGS[arm['task']].title}, {PROCEDURES[arm['merge']]}", *sharp,
            *(interval_text(d, "+.4f") for d in differences[1:]), ", ".join(f"{loss:.3f}" for loss in losses),
        ])  # fmt: skip
    flags = [a.sign < 0 and b.sign < 0 for a, b in zip(at_distance, at_loss, strict=True)]
    parts = {
        "the best single run": against_run,
        "that run at the merge's distance from the base": at_distance,
        "a point of a long run with the same training loss": at_loss,
    }
    found = "; ".join(
        f"{name}: flatter in {sum(d.sign < 0 for d in ds)}, sharper in {sum(d.sign > 0 for d in ds)} of {len(ds)} cases"
        for name, ds in parts.items()
    )
    text = f"Merge against {found}. Flatter than both controls: {counted(flags)}."
    notes = (
        "Gaussian sharpness in nats: the mean rise of the training loss at a tenth of the base's RMS per tensor, 16 directions "
        f"and their opposites, 2,000 rows; {SHALLOW} steps a run. A long run that does not fall to the training loss of the "
        f"merge is taken at its lowest. {ABOUT}"
    )
    return Verdict(worded(flags), text, rows, notes)


def _difference(units: Units, arm: Arm, other: str) -> Any:
    values = [(unit.figures["merge sharpness"], unit.figures[f"{other} sharpness"]) for unit in units.of(**arm)]
    return type(units.estimate("merge sharpness", **arm))(tuple(a - b for a, b in values))


def draw_flatter(units: Units) -> Any:
    rows = []
    for arm in units.arms():
        for name in ("merge", "best run", "best run at ‖merge‖", "same training loss"):
            panel = f"{SETTINGS[arm['task']].title}: {PROCEDURES[arm['merge']].replace('`', '')}"
            kind = "merge" if name == "merge" else "controls"
            rows.append(dot(name, kind, panel, units.estimate(f"{name} sharpness", **arm)))
    title = ["Gaussian sharpness of merges, beside the best run, the same run at the merge's distance, and a point of",
             "a long run with the same training loss"]  # fmt: skip
    return dots(rows, title, "rise of the loss, nats", columns=3, width=200)


@claim(
    name="flatter",
    says="“Instead of exploring flat minima”, synthesis “creates flat minima”: merged minima are flatter.",
    source="paper, “multiple positioning”, 2",
    control="A merge lies closer to the base than its runs, and its loss is another; both alone can make it flat. So: the best "
    "run with its task vector scaled to the merge's length (also all runs), and the point of a run five times as long, by the "
    "same optimizer, whose training loss is the nearest. It would hold if merges were flatter than both in all cases, with "
    "intervals off 0, by the published procedure and by ours.",
    taught="Merges are about as flat as a run at the same distance from the base and as a single run with the same loss: it is "
    "distance and loss that flatness follows. No default is chosen by flatness, and the report goes on showing both controls "
    "(`distance-matched`, `loss-matched`) beside every merge.",
    arms=by_task([{"merge": name} for name in PROCEDURES], TASKS),
    judge=judge_flatter,
    figure=draw_flatter,
)
def flatter(arm: Arm, seed: int, effort: Effort) -> Figures:
    """Sharpness and training loss of the merge and its controls."""
    of, steps = task(arm["task"], effort), effort.steps(SHALLOW)
    preset = PUBLISHED if arm["merge"] == "v3.8 apart" else OURS
    members = [Member(f"{name}/{preset}", 0 if preset == PUBLISHED else order) for order, name in enumerate(FIVE)]
    if arm["merge"] == "rounds":
        met = train_rounds(of, members, seed, steps)
        states, merge = met.finished, soup_of(of, met)
    else:
        states = train_apart(of, members, seed, steps)
        merge = of.merge(states, "tall-mask")
    index = min(range(len(states)), key=lambda i: of.held_out(states[i]))
    length = of.distance(merge)
    at_length = [of.scaled(state, length) for state in states]
    measured = {
        "merge": merge, "best run": states[index], "best run at ‖merge‖": at_length[index],
        "same training loss": _loss_matched(of, members[index], seed, steps * len(members), merge),
    }  # fmt: skip
    figures: Figures = {"distance": length, "run's distance": of.distance(states[index])}
    for name, state in measured.items():
        for radius, value in of.sharpness(state, RADII).items():
            figures[f"{name} sharpness" + ("" if radius == "0.1" else f" at {radius}")] = value
        figures[f"{name} loss"] = of.loss(state, of.train.of(slice(2000)))
        figures[f"{name} test"] = of.loss(state, of.test)
    others = [of.sharpness(state)["0.1"] for state in at_length]
    known = [value for value in others if value is not None]
    return figures | {"all runs at ‖merge‖ sharpness": statistics.fmean(known) if len(known) == len(others) else None}


def _loss_matched(of: Task, member: Member, seed: int, steps: int, merge: State) -> State:
    """Return the snapshot of a long run that is nearest to the merge's training loss when the run first falls below it."""
    rows = of.train.of(slice(2000))
    goal, run = of.loss(merge, rows), Run(of, member._replace(order=50), seed, steps)
    found = (abs(of.loss(of.base, rows) - goal), of.base)
    for number in range(SNAPSHOTS):  # dense at the start, where the loss falls fast
        end = round(steps * ((number + 1) / SNAPSHOTS) ** 2)
        run.advance(end - run.trainer.taken, finish=False)
        state = run.state
        loss = of.loss(state, rows)
        found = min(found, (abs(loss - goal), state), key=lambda pair: pair[0])
        if loss < goal:
            break
    return found[1]
