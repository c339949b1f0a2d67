"""Claims about stopping and continuing, and about a second task on top of a first."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from claims_core import Arm, Effort, Figures, Units, Verdict, claim, counted, interval_text, worded
from claims_generative import (
    AUTO,
    PIXELS,
    SIDE,
    at_equal,
    change,
    finite,
    follow,
    path_chart,
    small_fashion,
    stored,
    usual_lines,
)
from claims_training import (
    Diverged,
    Rows,
    Trainer,
    batches,
    emo_arms,
    loss_of,
    mlp,
    rival_arms,
    rule_title,
    train_classifier,
)
from evidence_tables import Cells, Estimate
from torch import nn

MARGIN = 0.02
"""The largest rise of the test loss by an interruption, relative to the uninterrupted run, that counts as none."""
STOPS = (0, 3)
RIVALS = (*rival_arms("adamw")[3:], *rival_arms("prodigy"))
ADAMW = rival_arms("adamw")[1:]


def of(arm: Arm, stops: int) -> Arm:
    """Return an arm with a number of interruptions."""
    return {**arm, "stops": stops}


def cost(units: Units, arm: Arm, stops: int) -> Estimate:
    """Return the test loss minus that of the uninterrupted run, relative to this, paired by seed."""
    whole = {unit.seed: unit.figures["test"] for unit in units.of(**of(arm, 0))}
    cut = {unit.seed: unit.figures["test"] for unit in units.of(**of(arm, stops))}
    return Estimate(tuple((cut[seed] - whole[seed]) / whole[seed] for seed in sorted(whole)))


def judge_resuming(units: Units) -> Verdict:
    adamw = {
        key: value for key, value in units.best("validation", [of(arm, 0) for arm in RIVALS[:-1]]).items() if key != "stops"
    }
    rows: Cells = [["", "uninterrupted", *(f"{stops} × stopped, change in %" for stops in STOPS[1:])]]
    for arm in (*emo_arms("v3.8"), *AUTO[:1], *RIVALS):
        name = rule_title(arm["rule"]) + (f", rate {arm['rate']:g}" if arm["rule"] == "adamw" else "")
        costs = [Estimate(tuple(100 * value for value in cost(units, arm, stops).values)) for stops in STOPS[1:]]
        rows.append([name + (" (best)" if arm == adamw else ""), units.estimate("test", **of(arm, 0)).text(),
                     *(interval_text(each, "+.1f") for each in costs)])  # fmt: skip
    pairs = [(arm, stops) for arm in emo_arms("v3.8") for stops in STOPS[1:]]
    free = [cost(units, arm, stops).mean <= MARGIN for arm, stops in pairs]
    gains = [
        Estimate(
            tuple(a - b for a, b in zip(cost(units, arm, stops).values, cost(units, adamw, stops).values, strict=True))
        ).sign
        for arm, stops in pairs
    ]
    ours = [cost(units, arm, stops).mean for arm in AUTO[:1] for stops in STOPS[1:]]
    theirs = [cost(units, adamw, stops).mean for stops in STOPS[1:]]
    means = [cost(units, arm, stops).mean for arm, stops in pairs]
    text = (
        f"Stopped three times, {counted(free)} with `v3.8` lose at most 2 %: the test loss changes by {100 * min(means):+.1f} "
        f"to {100 * max(means):+.1f} %, that of EmoSens with `auto` by {100 * ours[0]:+.1f} %, and that of AdamW, with a "
        f"fresh state and the schedule continued, by {100 * theirs[0]:+.1f} %. Compared with AdamW, {gains.count(-1)} of "
        f"{len(gains)} lose less and {gains.count(1)} more."
    )
    notes = (
        "An MLP with 64 hidden units, 1,000 steps. Test loss of the uninterrupted run; changes relative to it, with 95 % "
        "intervals. Every continuation has a fresh optimizer."
    )
    return Verdict(worded([*free, gains.count(-1) > len(gains) / 2]), text, rows, notes)


@claim(
    name="resuming",
    says="Resuming learning is synchronization-free: a run may be stopped and continued with a fresh optimizer.",
    source="README, “Main Features”",
    control="The same run, uninterrupted, with the same batches; and AdamW at the rate that is best by validation, with a "
    "fresh state at each continuation while its schedule goes on, and Prodigy. An interruption is free if it costs at most 2 % "
    "of the test loss. “Holds” needs that for all five, with three interruptions, and that most lose less than AdamW "
    "(interval below 0): otherwise it says nothing about the optimizers, and the verdict is “holds in part”.",
    taught="A fresh pulse starts at dNR_hist = 1 and has to earn its rate again, which costs `v3.8` more than a fresh state "
    "costs AdamW. emomerge therefore saves pulse and optimizer with every run, resumes with the same bits, and lets the runs "
    "of its rounds keep theirs when they meet. EmoSens with `auto` gains because it takes its rate from the size of the "
    "weights, which a fresh one measures anew: it had doubled (0.006 to 0.013), with dNR_hist at 1 throughout. Measuring it "
    "again within a run is worth a trial where the base is untrained.",
    arms=tuple(of(arm, stops) for arm in (*emo_arms("v3.8"), *AUTO[:1], *RIVALS) for stops in STOPS),
    quick_arms=(of({"rule": "sens/v3.8"}, 0), of({"rule": "sens/v3.8"}, 1)),
    judge=judge_resuming,
)
def resuming(arm: Arm, seed: int, effort: Effort) -> Figures:
    """A classifier of 14 × 14 images, 1,000 steps of 64."""
    data, steps = small_fashion(effort), effort.steps(1000)
    torch.manual_seed(seed)
    model = mlp(PIXELS, 64)
    trainer = Trainer(arm["rule"], model.parameters(), steps, arm.get("rate"))
    ends = {steps * k // (arm["stops"] + 1) for k in range(1, arm["stops"] + 1)}
    try:
        for step, batch in enumerate(batches(len(data.train), 64, steps, seed)):
            if step in ends:
                trainer = Trainer(arm["rule"], model.parameters(), steps, arm.get("rate"))
                trainer.taken = step
            trainer.step(F.cross_entropy(model(data.train.x[batch]), data.train.y[batch]))
    except Diverged:
        return {"validation": None, "test": None}
    return {"validation": loss_of(model, data.validation), "test": loss_of(model, data.test)}


# A second task ---------------------------------------------------------------------------------------------------------------


def turned(rows: Rows) -> Rows:
    """Return the second task: the same images, turned by a quarter."""
    return Rows(rows.x.view(-1, SIDE, SIDE).rot90(1, (1, 2)).flatten(1), rows.y)


def first_task(effort: Effort) -> nn.Module:
    """Return a classifier that AdamW trained on upright images."""
    rows = small_fashion(effort).train
    torch.manual_seed(0)
    return stored(effort, "upright", mlp(PIXELS, 128), lambda model: train_classifier(
        model, Trainer("adamw", model.parameters(), effort.steps(4000), 3e-3), rows))  # fmt: skip


def judge_layering(units: Units) -> Verdict:
    published, ours = emo_arms("v3.8"), AUTO[:1]
    start = units.all[0].figures["path"][0]
    table: Cells = [["", "loss of the second task", "loss of the first task", "first, at equal loss of the second: it − AdamW"]]
    table.append(["before", f"{start['new']:.3f}", f"{start['old']:.3f}", ""])

    def end(arm: Arm, name: str) -> Estimate:
        return Estimate(tuple(unit.figures["path"][-1][name] for unit in units.of(**arm)))

    def equal(arm: Arm) -> Any:
        return at_equal(units, arm, ADAMW, "new", "old", "old validation")

    for arm in (*published, *ours, *ADAMW):
        name = rule_title(arm["rule"]) + (f", rate {arm['rate']:g}" if arm in ADAMW else "")
        difference = None if arm in ADAMW else equal(arm)
        table.append([name, end(arm, "new").text(), end(arm, "old").text(),
                      "–" if difference is None else interval_text(difference.difference)])  # fmt: skip
    safe = [change(units, arm, "old", relative=True).mean <= 0.05 and change(units, arm, "new").sign < 0 for arm in published]
    signs = [0 if (each := equal(arm)) is None else each.difference.sign for arm in published]
    best = min(ADAMW, key=lambda arm: change(units, arm, "new validation").mean)
    text = (
        f"With `v3.8`, {counted(safe)} learn the second task while the loss of the first rises by at most 5 %: it rises from "
        f"{start['old']:.2f} to {min(end(arm, 'old').mean for arm in published):.2f} … "
        f"{max(end(arm, 'old').mean for arm in published):.2f}, with AdamW, at the rate that is best on the second task, to "
        f"{end(best, 'old').mean:.2f}. At equal loss of the second task, {signs.count(-1)} of {len(signs)} forget less than "
        f"AdamW and {signs.count(1)} more."
    )
    return Verdict(
        worded([*safe, signs.count(-1) > len(signs) / 2]),
        text,
        table,
        "Test losses of an MLP with 128 hidden units. The second task, 600 steps, is the first one turned by a quarter.",
    )


def figure(units: Units) -> Any:
    said = "The better the second task is learned, the more of the first is forgotten"
    axes = ("new", "loss of the second task"), (("old", "loss of the first task"),)
    return path_chart(units, usual_lines(), *axes, said, log=True)


@claim(
    name="layering",
    says="Adding and stacking learning is synchronization-free: a second task on top of the first leaves this intact.",
    source="README, “Main Features”",
    control="AdamW at four rates on the same second task, and AdamW stopped where its loss of the second task is "
    "the same, at the rate that forgets least there by validation. “Holds” needs that all five learn the second task while the "
    "loss of the first rises by at most 5 %, and that most forget less than AdamW at equal loss of the second (interval below "
    "0); any part alone would be “holds in part”.",
    taught="Nothing protects the first task, and no default can: it has to be in the data, or the change has to be scaled, "
    "which emomerge's merges do by the loss of the rows that are held out. At equal "
    "loss of the second task none of the five forgets less than AdamW, and EmoTion forgets more.",
    arms=(*emo_arms("v3.8"), *AUTO[:1], *ADAMW),
    quick_arms=({"rule": "sens/v3.8"}, {"rule": "adamw", "rate": 1e-3}),
    judge=judge_layering,
    figure=figure,
)
def layering(arm: Arm, seed: int, effort: Effort) -> Figures:
    """A classifier of upright images, trained on turned ones for 600 steps of 64."""
    data, model = small_fashion(effort), first_task(effort)
    new = {"train": turned(data.train), "validation": turned(data.validation), "test": turned(data.test)}
    trainer = Trainer(arm["rule"], model.parameters(), effort.steps(600), arm.get("rate"))
    order = batches(len(new["train"]), 64, trainer.steps, seed)

    def loss() -> torch.Tensor:
        batch = next(order)
        return F.cross_entropy(model(new["train"].x[batch]), new["train"].y[batch])

    def measure() -> Figures:
        splits = {"new": new["test"], "new validation": new["validation"], "old": data.test, "old validation": data.validation}
        return {name: float("inf") if (value := loss_of(model, rows)) is None else value for name, rows in splits.items()}

    path, diverged = follow(trainer, loss, measure)
    return {"path": finite(path), "diverged": diverged}
