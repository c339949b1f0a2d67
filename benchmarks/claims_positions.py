"""Claims about the five positions: which of them matter, and whether it matters that they are five different optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from claims_core import Arm, Effort, Figures, Units, Verdict, claim, counted, interval_text, worded
from claims_merging import ABOUT, SETTINGS, STEPS, Member, State, Task, by_task, soup_of, task, train_apart, train_rounds
from claims_merging_charts import dot, dots
from claims_training import FIVE, OURS, PUBLISHED, Diverged
from evidence_tables import Cells, Estimate

from emomerge.optim import OPTIMIZERS

TASKS = ("mild", "strong", "digits")
RATES = (1e-3, 3e-3, 1e-2)
LENGTH = len(FIVE)
TRUNKS = ("cats", "tion")
"""Other optimizers for the trunk than the first of the five."""
MERGES = ("mean", "tall-mask")


def display(name: str) -> str:
    """Return the name of an optimizer as users see it."""
    return "AdamW" if name == "adamw" else OPTIMIZERS[name].class_name


def members_of(arm: Arm) -> list[Member]:
    """Return the runs of a set: the five, each alone five times, or AdamW five times."""
    names = list(FIVE) if arm["set"] == "five" else [arm["set"]] * LENGTH
    names.sort(key=lambda name: name != arm.get("first"))  # the first run also takes the trunk
    rules = [name if name == "adamw" else f"{name}/{arm['preset']}" for name in names]
    return [Member(rule, 0 if arm.get("order") == "same" else order, arm.get("rate")) for order, rule in enumerate(rules)]


def sets(preset: str) -> list[Arm]:
    """Return the sets of a preset: the five, and each alone."""
    return [{"preset": preset, "set": name} for name in ("five", *FIVE)]


def _exact(arm: Arm) -> Arm:
    """Return an arm with every part that sets differ in, so that it stands for its own units only."""
    return {"order": None, "leave": None, "first": None, **arm}


def compared(units: Units, name: str, figure: str, preset: str) -> tuple[Arm, Arm, Estimate]:
    """Return on a task the five, the set of one optimizer that is best on validation data, and first − second on test data."""
    mine = [_exact(arm) for arm in units.arms() if arm["task"] == name and arm.get("preset") == preset]
    five = units.best(
        f"{figure} validation",
        [arm for arm in mine if arm["set"] == "five" and not (arm["leave"] or arm["first"])],
    )
    same = units.best(f"{figure} validation", [arm for arm in mine if arm["set"] in FIVE])
    return five, same, units.paired(f"{figure} test", five, same)


def summary_row(units: Units, name: str, figure: str, preset: str, title: str) -> list[str]:
    """Return a row of the table: the five, each set of one optimizer, and the difference."""
    five, same, difference = compared(units, name, figure, preset)
    alone = [units.estimate(f"{figure} test", task=name, preset=preset, set=x) for x in FIVE]
    cells = [f"**{a.mean:.3f}**" if same["set"] == x else f"{a.mean:.3f}" for x, a in zip(FIVE, alone, strict=True)]
    mean = units.estimate(f"{figure} test", **five).mean
    adamw = units.best(f"{figure} validation", [a for a in units.arms() if a["task"] == name and a["set"] == "adamw"])
    return [
        f"{SETTINGS[name].title}, {title}", f"{mean:.3f}", *cells, interval_text(difference),
        f"{units.estimate(f'{figure} test', **adamw).mean:.3f}",
    ]  # fmt: skip


HEAD = ["task, procedure", "the five", *(f"{display(name)} ×5" for name in FIVE), "five − best set of one", "AdamW ×5"]


# Runs apart ----------------------------------------------------------------------------------------------------------------


SUBSETS = ["".join(map(str, c)) for size in range(1, LENGTH + 1) for c in combinations(range(LENGTH), size)]
ALL = SUBSETS[-1]


def left_out(units: Units, name: str, preset: str) -> dict[str, Estimate]:
    """Return for each position how much the test loss of the mean rises if it is left out."""
    five, _, _ = compared(units, name, "mean", preset)
    found = {}
    for index, optimizer in enumerate(FIVE):
        without = ALL.replace(str(index), "")
        values = [unit.figures["subsets"] for unit in units.of(**five)]
        found[optimizer] = Estimate(tuple(v[without]["mean"][1] - v[ALL]["mean"][1] for v in values))
    return found


def chosen_subset(units: Units, name: str, preset: str) -> tuple[str, Estimate]:
    """Return the subset whose mean is best on validation data over the seeds, and its test loss − that of all five."""
    five, _, _ = compared(units, name, "mean", preset)
    values = [unit.figures["subsets"] for unit in units.of(**five)]
    best = min(SUBSETS, key=lambda key: sum(v[key]["mean"][0] for v in values))
    return best, Estimate(tuple(v[best]["mean"][1] - v[ALL]["mean"][1] for v in values))


def _blind(units: Units, name: str, preset: str) -> bool:
    """Return whether the five are surely lower than the average of the five sets of one optimizer."""
    five, _, _ = compared(units, name, "tall-mask", preset)
    differences = [units.paired("tall-mask test", five, {"task": name, "preset": preset, "set": x}).values for x in FIVE]
    return Estimate(tuple(sum(of_seed) / LENGTH for of_seed in zip(*differences, strict=True))).sign < 0


def judge_positions(units: Units) -> Verdict:
    cases = [(name, preset) for name in TASKS for preset in (PUBLISHED, OURS)]
    rows = [HEAD]
    differences = []
    for name, preset in cases:
        rows.append(summary_row(units, name, "tall-mask", preset, f"`{preset}`"))
        differences.append(compared(units, name, "tall-mask", preset)[2])
    flags = [d.sign < 0 for d in differences]
    lower, higher = (counted([d.sign == sign for d in differences]) for sign in (-1, 1))
    out = {case: left_out(units, *case) for case in cases}
    needed = {x: sum(out[case][x].sign > 0 for case in cases) for x in FIVE}
    harmful = {x: sum(out[case][x].sign < 0 for case in cases) for x in FIVE}
    subsets = {case: chosen_subset(units, *case) for case in cases}
    names = "; ".join(
        f"{SETTINGS[name].title}, `{preset}`: {'+'.join(display(FIVE[int(i)])[3:] for i in key)} ({interval_text(gain)})"
        for (name, preset), (key, gain) in subsets.items()
    )
    text = (
        f"The tall-mask merge of the five has a lower test loss than that of five runs of one optimizer with five data orders "
        f"(the one chosen on validation data) in {lower} cases, and a higher one in {higher}; it is below the average of the "
        f"five such sets, a blind choice, in {counted(_blind(units, *case) for case in cases)}. Leaving a run out of the mean "
        f"makes it worse with {_counts(needed, len(cases))}; it makes it better with {_counts(harmful, len(cases))}."
    )
    notes = (
        f"Test loss of the tall-mask merge at its defaults; {STEPS} steps a run; bold: the set of one optimizer chosen on "
        f"validation data. AdamW: the rate chosen on validation data. {ABOUT} Of the 31 subsets the mean that is best on "
        f"validation data is, with its test loss against the mean of all five: {names}."
    )
    return Verdict(worded(flags), text, rows, notes)


def _counts(by: Mapping[str, int], cases: int) -> str:
    shown = [f"{display(name)} in {count}" for name, count in by.items() if count]
    return f"{', '.join(shown)} of {cases} cases" if shown else "none of them in any case"


def draw_positions(units: Units) -> Any:
    rows = []
    for preset in (PUBLISHED, OURS):
        for name in TASKS:
            panel = f"{SETTINGS[name].title}, {preset}"
            five, _, _ = compared(units, name, "mean", preset)
            rows.append(dot("all five", "the five optimizers", panel, units.estimate("mean test", **five)))
            for index, optimizer in enumerate(FIVE):
                values = [unit.figures["subsets"][ALL.replace(str(index), "")]["mean"][1] for unit in units.of(**five)]
                rows.append(dot(f"without {display(optimizer)}", "four of the five", panel, Estimate(tuple(values))))
            for optimizer in FIVE:
                found = units.estimate("mean test", task=name, preset=preset, set=optimizer)
                rows.append(dot(f"{display(optimizer)} ×5", "one optimizer, five data orders", panel, found))
    title = ["Mean of five separate runs: one good optimizer five times is as good as the five together, or better"]
    return dots(rows, title, "test loss", step=15)


@claim(
    name="positions",
    says="Merging heterogeneous optimizers “enables … what cannot be achieved by a single optimization algorithm”: each of the "
    "five positions adds something.",
    source="paper, “multiple positioning”, 4 and 6",
    control="Five runs of one optimizer with five data orders, at equal cost, for each of the five; and the means of all 31 "
    "subsets. A merge of the five with a test loss below that of the best set of one optimizer (chosen on validation data), "
    "with an interval off 0, would have spoken for heterogeneity; on all tasks and with both presets: “holds”.",
    taught="That runs differ in their optimizer is worth nothing when they are merged once, at the end: the merge lies between "
    "its members, and the weakest of them costs more than the others gain. Often the best “merge” of some of them is a single "
    "run. `select: best` and the greedy soup are there for this; the default does not merge separate runs at all.",
    arms=by_task(
        [
            {"preset": PUBLISHED, "set": "five", "order": "same"},
            *sets(PUBLISHED),
            *sets(OURS),
            *({"set": "adamw", "rate": rate} for rate in RATES),
        ],
        TASKS,
    ),
    judge=judge_positions,
    figure=draw_positions,
)
def positions(arm: Arm, seed: int, effort: Effort) -> Figures:
    """Losses of the merges of five separate runs; of the five optimizers, of all subsets."""
    of = task(arm["task"], effort)
    try:
        states = train_apart(of, members_of(arm), seed, effort.steps(STEPS))
    except Diverged:
        return dict.fromkeys([f"{m} {split}" for m in MERGES for split in ("validation", "test")])
    merged = {method: of.losses(of.merge(states, method)) for method in MERGES}
    figures: Figures = {f"{m} {split}": merged[m][i] for m in MERGES for i, split in enumerate(("validation", "test"))}
    best = of.losses(of.best(states))
    figures |= {"best validation": best[0], "best test": best[1]}
    if arm["set"] == "five":
        figures["subsets"] = {key: _subset(of, [states[int(i)] for i in key]) for key in SUBSETS}
    return figures


def _subset(of: Task, states: Sequence[State]) -> dict[str, list[float | None]]:
    if len(states) == 1:  # the run itself
        return dict.fromkeys(MERGES, of.losses(states[0]))
    return {method: of.losses(of.merge(states, method)) for method in MERGES}


# Runs that meet in rounds --------------------------------------------------------------------------------------------------


def judge_rounds(units: Units) -> Verdict:
    rows: Cells = [HEAD]
    differences, rivals = [], []
    for name in TASKS:
        rows.append(summary_row(units, name, "soup", OURS, "default procedure"))
        five, _, difference = compared(units, name, "soup", OURS)
        differences.append(difference)
        adamw = units.best("soup validation", [a for a in units.arms() if a["task"] == name and a["set"] == "adamw"])
        rivals.append(units.paired("soup test", five, adamw))
    flags = [d.sign < 0 for d in differences]
    alike: dict[str, list[Arm]] = {x: [{"task": name, "preset": OURS, "set": x} for name in TASKS] for x in FIVE}
    winner = min(FIVE, key=lambda x: sum(units.estimate("soup validation", **arm).mean for arm in alike[x]))
    alike_trunk = [_same_trunk(units, name, x) for name in TASKS for x in (FIVE[0], *TRUNKS)]
    against = [units.paired("soup test", _five(str(arm["task"])), arm) for arm in alike[winner]]
    text = (
        f"With emomerge's default procedure the five have a lower test loss than five runs of the one optimizer that is best "
        f"on validation data on {counted(flags)} tasks, and a higher one on {counted([d.sign > 0 for d in differences])}. One "
        f"optimizer for all tasks, chosen on validation data, is {display(winner)}: the five − it is "
        f"{'; '.join(interval_text(d) for d in against)}. Against AdamW five times in the same procedure, its rate "
        f"tuned: {'; '.join(interval_text(d) for d in rivals)}. What differs is who takes the trunk: with the same optimizer "
        f"there, the five are lower than it five times in {counted([d.sign < 0 for d in alike_trunk])} cases, higher in "
        f"{counted([d.sign > 0 for d in alike_trunk])}. With {display(winner)} there instead of {display(FIVE[0])} the five "
        f"change by {_changes(units, first=winner) if winner in TRUNKS else 'an amount not measured'}."
    )
    lines = [f"{display(x)}: {_changes(units, leave=x)}" for x in FIVE]
    trunks = [f"{display(x)}: {_changes(units, first=x)}" for x in TRUNKS]
    notes = (
        f"Test loss of the greedy soup of rounds; {STEPS} steps a run, half of them in the trunk, which the first run takes; "
        "bold: the set of one optimizer chosen on validation data. Order of the tasks below: "
        f"{'; '.join(SETTINGS[n].title for n in TASKS)}. Without one of the five, at the same number of steps in all, test "
        f"loss − that of the five: {'; '.join(lines)}. The five with another optimizer for the trunk: {'; '.join(trunks)}."
    )
    return Verdict(worded(flags), text, rows, notes)


def _same_trunk(units: Units, name: str, optimizer: str) -> Estimate:
    """Return the test loss of the five with an optimizer in the trunk − that of this optimizer five times."""
    five = {**_five(name), "first": None if optimizer == FIVE[0] else optimizer}
    return units.paired("soup test", five, {"task": name, "preset": OURS, "set": optimizer})


def _changes(units: Units, **other: str) -> str:
    """Return on each task the difference that a change of the five makes."""
    return ", ".join(interval_text(units.paired("soup test", {**_five(name), **other}, _five(name))) for name in TASKS)


def _five(name: str) -> Arm:
    return {"task": name, "preset": OURS, "set": "five", "leave": None, "first": None}


def draw_rounds(units: Units) -> Any:
    rows = []
    for name in TASKS:
        panel = SETTINGS[name].title
        rows.append(dot("all five", "the five optimizers", panel, units.estimate("soup test", **_five(name))))
        for x in TRUNKS:
            found = units.estimate("soup test", **{**_five(name), "first": x})
            rows.append(dot(f"trunk by {display(x)}", "the five, another takes the trunk", panel, found))
        for x in FIVE:
            found = units.estimate("soup test", **{**_five(name), "leave": x})
            rows.append(dot(f"without {display(x)}", "four of the five", panel, found))
        for x in FIVE:
            found = units.estimate("soup test", task=name, preset=OURS, set=x)
            rows.append(dot(f"{display(x)} ×5", "one optimizer, five data orders", panel, found))
        adamw = units.best("soup validation", [a for a in units.arms() if a["task"] == name and a["set"] == "adamw"])
        rows.append(dot("AdamW ×5, tuned", "AdamW in the same procedure", panel, units.estimate("soup test", **adamw)))
    return dots(
        rows,
        ["The default procedure: who takes the trunk (by default EmoSens) matters, not whether the runs are of five kinds"],
        "test loss",
    )


@claim(
    name="positions-in-rounds",
    says="The five optimizers together are better than one of them five times, also where the runs meet in rounds, as by "
    "emomerge's default.",
    source="emomerge's defaults; paper, “multiple positioning”, 6",
    control="The same procedure (trunk, rounds, soup) at the same number of steps with five runs of one optimizer, for each of "
    "the five and for AdamW, and with four of the five. It would hold if the five had a lower test loss than the set chosen on "
    "validation data on all tasks, with intervals off 0.",
    taught="The mixture is neither better nor worse than one of its optimizers five times, as long as the same optimizer takes "
    "the trunk, which is half of all steps. So the choice of the trunk's optimizer is what matters: it is the first of "
    "`runs.optimizers`. On these three tasks EmoTion there is better than EmoSens or as good. In the recipes of the comparison "
    "with rivals, whose images and runs are larger, it was worse: on FashionMNIST with mild and with strong shift, in "
    "validation and test loss with each of three seeds (benchmarks/results/trunk_by_tion.jsonl). So EmoSens keeps the trunk.",
    arms=by_task(
        [
            {"preset": OURS, "set": "five", "leave": None},
            *({"preset": OURS, "set": "five", "leave": x} for x in FIVE),
            *({"preset": OURS, "set": "five", "first": x} for x in TRUNKS),
            *({"preset": OURS, "set": x} for x in FIVE),
            *({"set": "adamw", "rate": rate} for rate in RATES[:2]),
        ],
        TASKS,
    ),
    judge=judge_rounds,
    figure=draw_rounds,
)
def positions_in_rounds(arm: Arm, seed: int, effort: Effort) -> Figures:
    """Losses of the soup of rounds, and of the mean of the finished runs."""
    of, names = task(arm["task"], effort), ("soup", "mean")
    members = [m for m in members_of(arm) if m.rule.partition("/")[0] != arm.get("leave")]
    try:
        met = train_rounds(of, members, seed, effort.steps(STEPS) * LENGTH // len(members))
    except Diverged:
        return dict.fromkeys([f"{name} {split}" for name in names for split in ("validation", "test")])
    states = (soup_of(of, met), of.merge(met.finished, "mean"))
    losses = {name: of.losses(state) for name, state in zip(names, states, strict=True)}
    return {f"{name} {split}": losses[name][i] for name in names for i, split in enumerate(("validation", "test"))}
