"""Claims about training on one image and on ten."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from claims_core import Arm, Effort, Figures, Units, Verdict, claim, counted, interval_text, worded
from claims_generative import (
    LEFT_OUT,
    Draws,
    add_lora,
    at_equal,
    change,
    draw,
    finite,
    flow_base,
    flow_loss,
    follow,
    of_class,
    path_chart,
    sample,
    small_fashion,
    trained,
    usual_lines,
)  # fmt: skip
from claims_training import FIVE, Rows, Trainer, emo_arms, rival_arms, rule_title
from evidence_tables import Cells, number
from torch import Tensor, nn

MARGIN = 0.05
"""The largest rise of a loss on other images, relative to the base, that counts as none."""
COPIES, DIVERSITY = 0.10, 0.5
"""The largest share of copies beyond the base's, and the least diversity relative to real images, that count as no collapse."""
ADAMW = rival_arms("adamw")
AS_PUBLISHED: list[Arm] = [{**arm, "rate": 1.0} for arm in emo_arms("v3.8")]
GENTLE: list[Arm] = [{**arm, "rate": 0.1} for arm in emo_arms("v3.8")]
"""A tenth of the published rate: does what is seen depend on it?"""
AUTO = emo_arms("auto")
LOSSES = {"test": "the loss of other bags", "others": "the loss of other classes"}
ARMS = (*AS_PUBLISHED, *AUTO, *GENTLE, *ADAMW, *rival_arms("prodigy"))
QUICK = ({"rule": "sens/v3.8", "rate": 1.0}, {"rule": "adamw", "rate": 1e-3})


def images_of(rows: Rows, count: int, seed: int) -> Rows:
    """Return some training images of the class that the base has not seen."""
    bags = of_class(rows, LEFT_OUT)
    return bags.of(torch.randperm(len(bags), generator=torch.Generator().manual_seed(100 + seed))[:count])


def train_on(count: int, steps: int, size: int, arm: Arm, seed: int, effort: Effort) -> Figures:
    """Train a LoRA of the flow on a few bags, and measure it on these, on other bags and on the other classes."""
    data = small_fashion(effort)
    rows, real = images_of(data.train, count, seed), of_class(data.test, LEFT_OUT)
    model = flow_base(effort)
    add_lora(model, seed)
    before = samples(model, rows.x, real.x)
    splits = {
        "train": Draws(rows, 1, of_each=500 // count),
        "validation": Draws(of_class(data.validation, LEFT_OUT), 2),
        "test": Draws(real, 3),
        "others": Draws(of_class(data.test, LEFT_OUT, other=True).of(slice(900)), 4),
    }
    trainer = Trainer(arm["rule"], trained(model), effort.steps(steps), arm.get("rate"))
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        some = rows.of(torch.randint(count, (size,), generator=generator))
        return flow_loss(model, some, *draw(some.x, generator))

    path, diverged = follow(trainer, loss, lambda: {name: split.loss(model) for name, split in splits.items()})
    return {"path": finite(path), "diverged": diverged, **samples(model, rows.x, real.x),
            "copies before": before["copies"]}  # fmt: skip


def samples(model: nn.Module, seen: Tensor, unseen: Tensor) -> Figures:
    """Return the share of samples nearer to a training image than to each of 1,000 others, and the samples' diversity.

    Diversity is the mean distance of two samples over that of two real images.
    """
    made = sample(model, torch.full((200,), LEFT_OUT), seed=5)
    if not bool(made.isfinite().all()):
        return {"copies": 1.0, "diversity": 0.0}
    copies = torch.cdist(made, seen).amin(1) < torch.cdist(made, unseen).amin(1)
    spread = torch.pdist(made).mean() / torch.pdist(unseen[:200]).mean()
    return {"copies": float(copies.double().mean()), "diversity": float(spread)}


def harmless(units: Units, arm: Arm) -> bool:
    """Return whether a rule learned and did no harm: the losses of other images and classes, copies and diversity."""
    return (
        not any(unit.figures["diverged"] for unit in units.of(**arm))
        and change(units, arm, "train").sign < 0
        and all(change(units, arm, name, relative=True).mean <= MARGIN for name in ("test", "others"))
        and units.estimate("copies", **arm).mean - units.estimate("copies before", **arm).mean <= COPIES
        and units.estimate("diversity", **arm).mean >= DIVERSITY
    )


def row(units: Units, arm: Arm, name: str) -> list[str]:
    """Return an arm's row of the table."""
    cells = [name]
    for figure in ("train", "test", "others"):
        cells.append(number(100 * change(units, arm, figure, relative=True).mean, "+.0f") + " %")
    cells += [f"{100 * units.estimate('copies', **arm).mean:.0f} %", f"{units.estimate('diversity', **arm).mean:.2f}"]
    for figure in ("test", "others"):
        equal = None if arm["rule"] == "adamw" else at_equal(units, arm, ADAMW, "train", figure, "validation")
        cells.append("–" if equal is None else interval_text(equal.difference, "+.4f"))
    return cells


def judge(units: Units) -> Verdict:
    published, ours = AS_PUBLISHED, AUTO
    base = units.estimate("copies before").mean
    adamw = min(ADAMW, key=lambda arm: change(units, arm, "validation").mean)
    table: Cells = [["", "training images", "other bags", "other classes", "copies", "diversity", "other bags, at equal "
                     "training loss: it − AdamW", "other classes, at equal training loss: it − AdamW"]]  # fmt: skip
    table += [row(units, arm, rule_title(arm["rule"])) for arm in (*published, *ours)]
    table += [row(units, arm, rule_title(arm["rule"]) + ", lr 0.1") for arm in GENTLE if units.of(**arm)]
    table += [row(units, arm, f"AdamW, rate {arm['rate']:g}" + (" (best)" if arm == adamw else "")) for arm in ADAMW]
    table.append(row(units, {"rule": "prodigy", "rate": 1.0}, "Prodigy"))
    safe = [harmless(units, arm) for arm in published]
    equal = [at_equal(units, arm, ADAMW, "train", "test", "validation") for arm in published]
    better = [each is not None and each.difference.sign < 0 for each in equal]
    worse = [each is not None and each.difference.sign > 0 for each in equal]
    moved = {name: [100 * change(units, arm, name, relative=True).mean for arm in (*published, adamw)] for name in LOSSES}
    spans = [f"{what} by {min(moved[name][:-1]):+.0f} to {max(moved[name][:-1]):+.0f} %" for name, what in LOSSES.items()]
    text = (
        f"With `v3.8`, {counted(safe)} learn without any harm. Training changes {' and '.join(spans)}; with AdamW, at its best "
        f"rate by validation, {moved['test'][-1]:+.0f} and {moved['others'][-1]:+.0f} %. Stopped where it reaches the same "
        f"training loss, AdamW is worse on other bags than {counted(better)} and better than {counted(worse)}. With `auto`, "
        f"{counted([harmless(units, arm) for arm in ours])} learn without harm."
    )
    gentle = [harmless(units, arm) for arm in GENTLE if units.of(**arm)]
    if gentle:
        text += f" With `v3.8` at a tenth of its rate, {counted(gentle)} do."
    notes = (
        "The base is a flow of 0.3 million weights for images of 14 × 14 pixels, trained on the other nine classes; the LoRA "
        "has rank 8 in every linear layer. First three columns: change of the loss by training, relative to the base. "
        f"Copies: samples nearer to a training image than to any of 1,000 others; the base has {100 * base:.0f} %. Diversity: "
        "mean distance of two samples; 1 is that of real images. AdamW's rate is chosen by the validation loss of other bags."
    )
    return Verdict(worded([*safe, sum(better) > len(better) / 2]), text, table, notes)


def figure(units: Units, title: str) -> Any:
    lines = usual_lines()
    for name in FIVE:
        lines[f"{name}, v3.8"] = {"rule": f"{name}/v3.8", "rate": 1.0}, name
    return path_chart(
        units, lines, ("train", "loss of the training images"),
        (("test", "loss of other bags"), ("others", "loss of other classes")), title,
    )  # fmt: skip


CONTROL = (
    "AdamW at five rates and Prodigy with equal steps, and AdamW stopped where it reaches the same training loss, at the rate "
    "that is best there by validation. A rule does no harm if its training loss falls while the loss of other bags and that of "
    "the other classes rise by at most 5 %, at most a tenth more of its samples than of the base's are copies, and their "
    "diversity is at least half that of real images. “Holds” needs that of all five, and most of the five below AdamW on other "
    "bags at equal training loss (interval below 0); any part alone would be “holds in part”."
)


@claim(
    name="one-image",
    says="Training on a single image for 300 steps shows no overfitting, no collapse into copying and no interference with "
    "unrelated prompts.",
    source="paper, “Predictions about Grokking”",
    control=CONTROL,
    taught="How far the training loss falls decides how much is overfitted, and emoPulse does not stop it. emomerge's "
    "procedure holds rows out, keeps the round with the lowest held-out loss and scales the merged change by it; with a single "
    "image there is nothing to hold out, and `auto`, which makes larger steps, overfits most. We change no default: the remedy "
    "is fewer steps, or images of the same kind for validation.",
    arms=ARMS,
    quick_arms=QUICK,
    judge=judge,
    figure=partial(
        figure,
        title="One image: overfitting follows from how far its loss falls, more than from the optimizer",
    ),
    seeds=5,
)
def one_image(arm: Arm, seed: int, effort: Effort) -> Figures:
    """300 steps of 8 draws of one image."""
    return train_on(1, 300, 8, arm, seed, effort)


@claim(
    name="ten-images",
    says="300 epochs with about ten images give a LoRA without overfitting.",
    source="paper, “The True Nature of Loss-Saturated Learning Progress”",
    control=CONTROL,
    taught="No default changes. What is kept of other classes depends on how far training goes; a run that ends where the "
    "held-out loss is lowest, as in emomerge's procedure, stops long before: with every rule the loss of other bags first "
    "falls and then rises.",
    arms=tuple(arm for arm in ARMS if arm not in GENTLE),
    quick_arms=QUICK,
    judge=judge,
    figure=partial(figure, title="Ten images: at equal training loss none of the five overfits less than AdamW"),
)
def ten_images(arm: Arm, seed: int, effort: Effort) -> Figures:
    """750 steps of four images."""
    return train_on(10, 750, 4, arm, seed, effort)
