"""Claims about training without tuning: FashionMNIST below 0.30, and any `lr`."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from claims_charts import curves, lines
from claims_core import Arm, Effort, Figures, Unit, Units, Verdict, claim, counted, interval_text, worded
from claims_training import (
    FIVE,
    OURS,
    PUBLISHED,
    Diverged,
    Trainer,
    accuracy_of,
    emo_arms,
    fashion,
    loss_of,
    mlp,
    rule_title,
    train_classifier,
)
from evidence_tables import Estimate

from emomerge.optim import OPTIMIZERS

# FashionMNIST below 0.30 --------------------------------------------------------------------------------------------------

GOAL, STEPS, TAIL = 0.30, 10_000, 200
RIVALS: tuple[Arm, ...] = (
    {"rule": "adamw", "rate": 1e-3}, {"rule": "adamw", "rate": 3e-3}, {"rule": "lion", "rate": 1e-4},
    {"rule": "lion", "rate": 3e-4}, {"rule": "prodigy", "rate": 1.0}, {"rule": "schedule-free", "rate": 2.5e-3},
)  # fmt: skip


def reached(unit: Unit) -> bool:
    """Return whether the mean loss of some 200 steps in a row was below the goal."""
    return unit.figures["reached"] is not None


def tuned(units: Units, rivals: Sequence[Arm], figure: str = "validation") -> dict[str, Arm]:
    """Return each rival's arm with the lowest mean of a figure of the validation split."""
    groups: dict[str, list[Arm]] = {}
    for arm in rivals:
        groups.setdefault(arm["rule"], []).append(arm)
    return {rule: units.best(figure, arms) for rule, arms in groups.items()}


def judge_fashion(units: Units) -> Verdict:
    rows = [["optimizer", "loss, last 200 steps", "below 0.30", "first after", "test loss", "test accuracy", "mean rate"]]
    arms = [*emo_arms(PUBLISHED, "guarded", OURS), *tuned(units, RIVALS).values()]
    below: dict[str, list[bool]] = {PUBLISHED: [], "guarded": [], OURS: []}
    for arm in arms:
        found = units.of(**arm)
        yes = all(map(reached, found))
        preset = arm["rule"].partition("/")[2]
        if preset:
            below[preset].append(yes)
        steps = [unit.figures["reached"] for unit in found if reached(unit)]
        rows.append([
            rule_title(arm["rule"]) + (f", {arm['rate']:g}" if "rate" in arm else ""),
            units.estimate("loss", **arm).text(), f"{counted(map(reached, found))} seeds",
            f"{statistics.fmean(steps):,.0f}" if steps else "–", units.estimate("test", **arm).text(),
            f"{units.estimate('accuracy', **arm).mean:.3f}", f"{units.estimate('mean rate', **arm).mean:.1e}",
        ])  # fmt: skip
    adamw = tuned(units, RIVALS)["adamw"]
    best = units.best("validation", emo_arms(OURS))
    gap = interval_text(units.paired("test", best, adamw))
    text = (
        f"Below 0.30 with every seed: {counted(below[PUBLISHED])} with `{PUBLISHED}`, {counted(below['guarded'])} with "
        f"`guarded`, {counted(below[OURS])} with `{OURS}`. AdamW at {adamw['rate']:g} is at "
        f"{units.estimate('loss', **adamw).text()}. Test loss of {rule_title(best['rule'])} minus AdamW's: {gap}."
    )
    return Verdict(
        worded(below[PUBLISHED]), text, rows,
        f"MLP 784-128-10, batches of 64, {STEPS:,} steps, `lr=1.0` untouched. “Below” means that the mean training loss of "
        "some 200 steps in a row is below 0.30; “first after” is the mean of that step over the seeds that reached it. Rivals: "
        "the best of their rates by validation loss (AdamW 1e-3 and 3e-3, Lion 1e-4 and 3e-4).",
    )  # fmt: skip


def draw_fashion(units: Units) -> Any:
    rows, panels = [], {PUBLISHED: "v3.8, as published", "guarded": "guarded", OURS: "auto"}
    for (preset, panel), name in itertools.product(panels.items(), FIVE):
        rows += curves(Units(units.of(rule=f"{name}/{preset}")), "curve", series=OPTIMIZERS[name].class_name, panel=panel)
    for panel in panels.values():
        rows += curves(Units(units.of(**tuned(units, RIVALS)["adamw"])), "curve", series="AdamW", panel=panel)
    passed = sum(all(map(reached, units.of(rule=f"{name}/{PUBLISHED}"))) for name in FIVE)
    return lines(
        rows, f"FashionMNIST: {passed} of five get below a training loss of 0.30 as published", "step",
        "training loss, mean of 500 steps", facet="panel", order=list(panels.values()), rule=GOAL, limits=(0.15, 1.0),
    )  # fmt: skip


@claim(
    name="fashion",
    says="On FashionMNIST the loss falls below 0.30 within 10,000 steps, with lr = 1.0 untouched.",
    source="paper, “The True Nature of Loss-Saturated Learning Progress”",
    control="AdamW, Lion, Prodigy and schedule-free AdamW on the same batches, and two other presets of the five. The claim "
    "holds if all five published optimizers reach the loss with every seed, and fails if none does. Had AdamW not reached it, "
    "the figure would have set the five apart.",
    taught="The published rate is tied to the network: what is right for EmoSens is too large or too small for the sign rules. "
    "The default preset is `auto`, which takes the scale of the rate from the weights.",
    arms=(*emo_arms(PUBLISHED), RIVALS[0], *emo_arms(OURS), *RIVALS[1:], *emo_arms("guarded")),
    quick_arms=({"rule": "sens/v3.8"}, {"rule": "void/auto"}, {"rule": "adamw", "rate": 1e-3}),
    judge=judge_fashion,
    figure=draw_fashion,
)
def fashion_below(arm: Arm, seed: int, effort: Effort) -> Figures:
    """Losses and rates of a run over 10,000 steps."""
    images = fashion(effort)
    torch.manual_seed(seed)
    model = mlp()
    trainer = Trainer(arm["rule"], model.parameters(), effort.steps(STEPS), rate=arm.get("rate"))
    rates: list[float] = []
    try:
        losses = train_classifier(
            model, trainer, images.train, seed=seed, on_step=lambda step, loss: rates.append(trainer.rate)
        )
    except Diverged:
        return {"loss": None, "reached": None, "validation": None, "test": None, "accuracy": 0.0, "mean rate": 0.0, "curve": []}
    sums = [0.0, *itertools.accumulate(losses)]
    means = {end: (sums[end] - sums[end - TAIL]) / TAIL for end in range(TAIL, len(sums))}
    block = 500
    return {
        "loss": means[len(losses)],
        "reached": next((end for end, mean in means.items() if mean < GOAL), None),
        "validation": loss_of(model, images.validation),
        "test": loss_of(model, images.test),
        "accuracy": accuracy_of(model, images.test),
        "mean rate": statistics.fmean(rates),
        "curve": [[end, round(statistics.fmean(losses[end - block : end]), 4)] for end in range(block, len(losses) + 1, block)],
    }


# Any lr -------------------------------------------------------------------------------------------------------------------

FACTORS = (0.01, 0.1, 1.0, 10.0, 100.0)
RATE_STEPS = 1000
ADAMW = 1e-3
"""The rate of AdamW at factor 1: what its users take unless they tune it."""
LRS: tuple[Arm, ...] = (
    *({"rule": f"{name}/{PUBLISHED}", "lr": factor} for name in FIVE for factor in FACTORS),
    *({"rule": "adamw", "lr": factor} for factor in FACTORS),
    *({"rule": f"{name}/{OURS}", "lr": factor} for name in FIVE for factor in FACTORS[::2]),
)


def losses(units: Units, rule: str) -> dict[float, Estimate]:
    """Return factor → test loss."""
    return {arm["lr"]: units.estimate("test", **arm) for arm in LRS if arm["rule"] == rule}


def spread_of(units: Units, rule: str) -> float:
    """Return the worst mean test loss over lr, divided by the best."""
    means = [found.mean for found in losses(units, rule).values()]
    return max(means) / min(means)


def judge_rates(units: Units) -> Verdict:
    rows = [["optimizer", *(f"lr × {factor:g}" for factor in FACTORS), "worst ÷ best", "best at"]]
    rules = list(dict.fromkeys(arm["rule"] for arm in LRS))
    for rule in rules:
        found = losses(units, rule)
        best = min(found, key=lambda factor: found[factor].mean)
        rows.append([
            rule_title(rule), *(found[factor].text() if factor in found else "" for factor in FACTORS),
            f"{spread_of(units, rule):.2f}", "any" if spread_of(units, rule) == 1 else f"{best:g}",
        ])  # fmt: skip
    published, ours = ([spread_of(units, f"{name}/{preset}") for name in FIVE] for preset in (PUBLISHED, OURS))

    def near(rule: str) -> bool:
        found = losses(units, rule)
        return found[1.0].mean < 1.1 * min(estimate.mean for estimate in found.values())

    untouched = [near(f"{name}/{PUBLISHED}") for name in FIVE]
    reach = [units.estimate("test", rule=f"{name}/{OURS}", lr=1.0).mean for name in FIVE]
    text = (
        f"Over lr × 0.01 … 100 the worst test loss is {min(published):.2f} to {max(published):.2f} times the best with "
        f"`{PUBLISHED}`, {max(ours):.2f} with `{OURS}`, and {spread_of(units, 'adamw'):.2f} with AdamW around {ADAMW:g}. "
        f"On this network the untouched lr = 1.0 is within 10 % of the best of the five lr with {counted(untouched)} published "
        f"optimizers; AdamW at {ADAMW:g} is {'also' if near('adamw') else 'not'}. "
        f"`{OURS}` reaches {min(reach):.3f} to {max(reach):.3f}, AdamW at its best factor "
        f"{min(found.mean for found in losses(units, 'adamw').values()):.3f}."
    )
    return Verdict(
        worded([ratio < 1.1 for ratio in published]), text, rows,
        f"Test loss on FashionMNIST after {RATE_STEPS:,} steps, MLP 784-128-10, batches of 64. lr is the factor with the "
        f"five, and {ADAMW:g} times the factor with AdamW. The claim holds for an optimizer whose worst "
        "loss is within 10 % of its best.",
    )  # fmt: skip


def draw_rates(units: Units) -> Any:
    panels, rows = {PUBLISHED: "v3.8, as published", OURS: "auto"}, []
    for preset, panel in panels.items():
        for rule in [*(f"{name}/{preset}" for name in FIVE), "adamw"]:
            series = OPTIMIZERS[rule.partition("/")[0]].class_name if "/" in rule else "AdamW"
            rows += [
                {"x": factor, "y": found.mean, "series": series, "panel": panel}
                for factor, found in losses(units, rule).items()
            ]
    return lines(
        rows, "As published, lr matters as much as AdamW's; with auto it has no effect", "factor on lr", "test loss",
        facet="panel", columns=2, log_x=True, log_y=True, limits=(0.35, 2.5), order=list(panels.values()), width=320,
    )  # fmt: skip


@claim(
    name="rates",
    says="Convergence is robust and independent of the learning rate that the user sets.",
    source="paper, abstract and chapter 1; README, “Features in v3.7 and later”",
    control="The same factors on AdamW's usual rate. The claim holds for an optimizer whose worst test loss over four orders "
    "of magnitude is within 10 % of its best; an optimizer that finds its rate from the loss would pass.",
    taught="The published rate is proportional to lr between its limits, so lr has to be right. `auto` takes the scale from "
    "the weights and ignores lr; it is the default.",
    arms=LRS,
    quick_arms=({"rule": "sens/v3.8", "lr": 1.0}, {"rule": "sens/auto", "lr": 100.0}, {"rule": "adamw", "lr": 1.0}),
    judge=judge_rates,
    figure=draw_rates,
)
def rates(arm: Arm, seed: int, effort: Effort) -> Figures:
    """Test loss after a short training with a multiple of lr."""
    images = fashion(effort)
    torch.manual_seed(seed)
    model = mlp()
    rate = arm["lr"] * (ADAMW if arm["rule"] == "adamw" else 1.0)
    trainer = Trainer(arm["rule"], model.parameters(), effort.steps(RATE_STEPS), rate=rate)
    try:
        train_classifier(model, trainer, images.train, seed=seed)
    except Diverged:
        return {"test": None}
    return {"test": loss_of(model, images.test)}
