"""The claim that five shallow runs and a merge replace one long run."""

from __future__ import annotations

import time
from typing import Any

from claims_core import Arm, Effort, Figures, Units, Verdict, claim, interval_text, worded
from claims_merging import ABOUT, SETTINGS, SHALLOW, Member, Run, by_task, soup_of, task, train_apart, train_rounds
from claims_merging_charts import dot, dots
from claims_training import FIVE, OURS, PUBLISHED, Diverged
from evidence_tables import Estimate

from emomerge.optim import OPTIMIZERS

TASKS = ("strong", "digits")
RATES = (3e-3, 1e-2)
SNAPSHOTS = 12
MARGIN = 0.05
"""A merge replaces a long run if its loss is surely not higher than this share above it."""
SHORT = {PUBLISHED: "five apart, `v3.8`, tall-mask", OURS: "five apart, `auto`, tall-mask", "rounds": "default: soup of rounds"}


def long_run(units: Units, name: str, preset: str | None) -> Arm:
    """Return the long run that is best on validation data: of the five with a preset, or of AdamW's rates."""
    arms = [arm for arm in units.arms() if arm["task"] == name and "long" in arm]
    return units.best("validation", [arm for arm in arms if arm.get("preset") == preset])


def outcome(difference: Estimate, loss: float) -> str:
    """Return whether a merge replaces a long run, given first − second of the test loss and the long run's loss."""
    if difference.interval is None:
        return "open"
    low, high = difference.interval
    return "lower" if high < 0 else "higher" if low > 0 else "replaces" if high < MARGIN * loss else "open"


def judge_shallow(units: Units) -> Verdict:
    rows = [["task, merge", "its test loss", "long run of the same preset", "merge − it", "", "AdamW long, rate tuned",
             "merge − it", "", "CPU seconds: merge, long, AdamW"]]  # fmt: skip
    found: dict[str, list[list[str]]] = {kind: [] for kind in SHORT}
    for name in TASKS:
        for kind, title in SHORT.items():
            merge = {"task": name, "short": kind}
            rivals = [long_run(units, name, PUBLISHED if kind == PUBLISHED else OURS), long_run(units, name, None)]
            cells, outcomes = [], []
            for rival in rivals:
                loss, difference = units.estimate("test", **rival), units.paired("test", merge, rival)
                outcomes.append(outcome(difference, loss.mean))
                which = OPTIMIZERS[rival["long"]].class_name if rival["long"] in OPTIMIZERS else f"{rival['rate']:g}"
                cells += [f"{loss.mean:.3f} ({which})", interval_text(difference), outcomes[-1]]
            cpu = ", ".join(f"{units.estimate('seconds', **arm).mean:.1f}" for arm in (merge, *rivals))
            rows.append([f"{SETTINGS[name].title}, {title}", f"{units.estimate('test', **merge).mean:.3f}", *cells, cpu])
            found[kind].append(outcomes)
    flags = [all(o in ("lower", "replaces") for o in outcomes) for cases in found.values() for outcomes in cases]

    def summed(kind: str, rival: int) -> str:
        counts = [outcomes[rival] for outcomes in found[kind]]
        return ", ".join(f"{word} on {counts.count(word)}" for word in dict.fromkeys(counts))

    parts = [
        f"{title}: {summed(kind, 0)} of {len(TASKS)} tasks against the long run, {summed(kind, 1)} against AdamW"
        for kind, title in SHORT.items()
    ]
    text = f"At the same number of steps in all, {'; '.join(parts)}."
    notes = (
        f"Five runs of {SHALLOW} steps against one of {5 * SHALLOW:,}, of which the best of {SNAPSHOTS} snapshots on "
        "validation data counts; optimizer and rate of the long runs are chosen on validation data. “Replaces”: surely less "
        f"than {MARGIN:.0%} above it; “open”: the interval allows both. {ABOUT}"
    )
    return Verdict(worded(flags), text, rows, notes)


def draw_shallow(units: Units) -> Any:
    rows = []

    def add(name: str, label: str, kind: str, **arm: Any) -> None:
        rows.append(dot(label, kind, SETTINGS[name].title, units.estimate("test", task=name, **arm)))

    for name in TASKS:
        for kind, title in SHORT.items():
            add(name, title.replace("`", ""), "five short runs, merged", short=kind)
        for preset in (PUBLISHED, OURS):
            for optimizer in FIVE:
                label = f"{OPTIMIZERS[optimizer].class_name}, {preset}"
                add(name, label, "one long run", long=optimizer, preset=preset)
        for rate in RATES:
            add(name, f"AdamW, {rate:g}", "AdamW, one long run", long="adamw", rate=rate)
    title = ["Five short runs and a merge, against one run five times as long"]
    return dots(rows, title, "test loss", log=True, step=15)


@claim(
    name="short-for-long",
    says="“Instead of performing long-term training with a single optimizer”, shallow learning by several and a TALL-mask "
    "merge give as good a model “without relying on lengthy training sessions”.",
    source="paper, “multiple positioning”, 3",
    control="One run with as many steps as the five have together: of each of the five optimizers, and of AdamW at two "
    "rates, chosen on validation data. It would hold if the merge's test loss were below the long run's, or surely less than "
    "5 % above it, against both rivals on all tasks, for the published procedure and for ours.",
    taught="A merge does not replace steps. The default comes nearer to one long run than separate runs do, since half of its "
    "steps are one, the trunk; the report can train `long-run` and `adamw-long-run` beside it, so that users see the "
    "difference on their own task. With three times as many steps a run it is smaller: see the comparison with rivals.",
    arms=by_task(
        [
            *({"short": kind} for kind in SHORT),
            *({"long": name, "preset": preset} for preset in (PUBLISHED, OURS) for name in FIVE),
            *({"long": "adamw", "rate": rate} for rate in RATES),
        ],
        TASKS,
    ),
    judge=judge_shallow,
    figure=draw_shallow,
)
def short_for_long(arm: Arm, seed: int, effort: Effort) -> Figures:
    """Losses of the merge of five short runs, or of a long run, and the CPU seconds of training and choosing."""
    of, steps = task(arm["task"], effort), effort.steps(SHALLOW)
    started = time.process_time()
    try:
        if "long" in arm:
            rule = "adamw" if arm["long"] == "adamw" else f"{arm['long']}/{arm['preset']}"
            run = Run(of, Member(rule, 0, arm.get("rate")), seed, steps * len(FIVE))
            snapshots = []
            for number in range(SNAPSHOTS):
                end = steps * len(FIVE) * (number + 1) // SNAPSHOTS
                run.advance(end - run.trainer.taken)
                snapshots.append(run.state)
            state = of.best(snapshots)
        else:
            preset = PUBLISHED if arm["short"] == PUBLISHED else OURS
            members = [Member(f"{name}/{preset}", 0 if preset == PUBLISHED else order) for order, name in enumerate(FIVE)]
            if arm["short"] == "rounds":
                state = soup_of(of, train_rounds(of, members, seed, steps))
            else:
                state = of.merge(train_apart(of, members, seed, steps), "tall-mask")
    except Diverged:
        return {"validation": None, "test": None, "seconds": time.process_time() - started}
    seconds = time.process_time() - started
    validation, test = of.losses(state)
    return {"validation": validation, "test": test, "seconds": round(seconds, 2)}
