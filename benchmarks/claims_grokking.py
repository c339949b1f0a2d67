"""A claim about grokking: on modular addition, are the test pairs learned as soon as the training pairs?"""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torch.nn.functional as F
from claims_charts import curves, lines
from claims_core import Arm, Effort, Figures, Units, Verdict, claim, counted, interval_text, worded
from claims_small import named
from claims_training import FIVE, OURS, PUBLISHED, Diverged, Trainer, emo_arms
from torch import Tensor, nn

from emomerge.optim import OPTIMIZERS

PRIME, HIDDEN, SHARE, STEPS, EVERY = 31, 128, 0.7, 2000, 10
DECAY = 1.0
RIVALS: tuple[Arm, ...] = (
    *({"rule": "adamw", "rate": rate} for rate in (3e-3, 1e-2)),
    *({"rule": "lion", "rate": rate} for rate in (1e-3, 3e-3)),
)


class Net(nn.Module):
    """Two matrices with squares between them, which can add modulo a prime exactly (Gromov 2023)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(2 * PRIME, HIDDEN, bias=False), nn.Linear(HIDDEN, PRIME, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).square())


def pairs(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return inputs and sums of the training pairs, of the pairs to choose by and of the test pairs."""
    a, b = torch.arange(PRIME).repeat_interleave(PRIME), torch.arange(PRIME).repeat(PRIME)
    x, y = torch.cat([F.one_hot(a, PRIME), F.one_hot(b, PRIME)], 1).float(), (a + b) % PRIME
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(600 + seed))
    first = int(SHARE * len(y))
    cut = [order[:first], order[first : (first + len(y)) // 2], order[(first + len(y)) // 2 :]]
    return [(x[index], y[index]) for index in cut]


def judge_grokking(units: Units) -> Verdict:
    best = {rule: units.best("validation", [arm for arm in RIVALS if arm["rule"] == rule]) for rule in ("adamw", "lion")}
    rows = [["optimizer", "training pairs after", "test pairs after", "ratio", "learned", "test accuracy", "steps − AdamW's"]]
    skipped: dict[str, bool] = {}
    learned: dict[str, bool] = {}
    for arm in [*emo_arms(PUBLISHED, OURS), *best.values()]:
        found = units.of(**arm)
        done = [unit.figures["learned"] for unit in found]
        ratio = max(unit.figures["test"] / unit.figures["train"] for unit in found)
        learned[arm["rule"]], skipped[arm["rule"]] = all(done), all(done) and ratio < 1.5
        train, test = units.estimate("train", **arm), units.estimate("test", **arm)
        rows.append([
            named(arm), f"{train.mean:,.0f}", f"{'' if all(done) else '≥ '}{test.mean:,.0f}",
            f"{test.mean / train.mean:.1f}" if all(done) else "–", f"{counted(done)} seeds",
            f"{statistics.fmean(unit.figures['accuracy'] for unit in found):.3f}",
            "–" if arm == best["adamw"] else interval_text(units.paired("test", arm, best["adamw"]), "+,.0f"),
        ])  # fmt: skip
    flags = {preset: [skipped[f"{name}/{preset}"] for name in FIVE] for preset in (PUBLISHED, OURS)}
    counts = {preset: [learned[f"{name}/{preset}"] for name in FIVE] for preset in (PUBLISHED, OURS)}
    faster = [arm for arm in emo_arms(PUBLISHED, OURS) if units.paired("test", arm, best["adamw"]).sign < 0]
    adamw = units.estimate("test", **best["adamw"])
    text = (
        f"The test pairs are learned within {STEPS:,} steps with every seed by {counted(counts[PUBLISHED])} as published and "
        f"{counted(counts[OURS])} with `{OURS}`, without a plateau by {counted(flags[PUBLISHED])} and {counted(flags[OURS])}; "
        f"AdamW at {best['adamw']['rate']:g} needs {adamw.mean:,.0f} steps "
        f"({'also without' if skipped['adamw'] else 'after'} a plateau). Faster than AdamW beyond the interval: "
        f"{len(faster)} of 10."
    )
    return Verdict(
        worded(flags[PUBLISHED]), text, rows,
        f"Addition modulo {PRIME}, {100 * SHARE:.0f} % of the pairs to train by, full batches, a network "
        f"{2 * PRIME}-{HIDDEN}-{PRIME} with squares, weight decay {DECAY:g}, constant rates for AdamW and Lion. Columns: the "
        f"mean step at which 99 % of the pairs are right, counted as {STEPS:,} where that is not reached; the ratio of the "
        f"two.",
    )  # fmt: skip


def draw_grokking(units: Units) -> Any:
    best = {rule: units.best("validation", [arm for arm in RIVALS if arm["rule"] == rule]) for rule in ("adamw", "lion")}
    rows = []
    for panel, preset in (("v3.8, as published", PUBLISHED), ("auto", OURS)):
        arms: list[tuple[Arm, str]] = [({"rule": f"{name}/{preset}"}, OPTIMIZERS[name].class_name) for name in FIVE]
        for arm, series in [*arms, (best["adamw"], "AdamW"), (best["lion"], "Lion")]:
            for what in ("training", "test"):
                rows += curves(Units(units.of(**arm)), f"{what} curve", series=series, panel=panel, what=f"{what} pairs")
    return lines(
        rows, f"Addition modulo {PRIME}: share of pairs that are right", "step", "accuracy", facet="panel", columns=2,
        dash="what", limits=(0.0, 1.0), width=340, height=260, order=["v3.8, as published", "auto"],
    )  # fmt: skip


@claim(
    name="grokking",
    says="Grokking is avoided: the five approach the general solution without the plateau.",
    source="paper, “Predictions about Grokking”",
    control="AdamW and Lion at the better of two constant rates, with the same weight decay. The claim holds for an optimizer "
    "that has 99 % of the test pairs right at less than 1.5 times the step at which it has 99 % of the training pairs, with "
    "every seed. A rival without a plateau would show that the task has none.",
    taught="No default follows. Delayed generalization depends on rate and weight decay, which emoPulse multiplies by its "
    "rate.",
    arms=(*emo_arms(PUBLISHED, OURS), *RIVALS),
    quick_arms=({"rule": "sens/v3.8"}, {"rule": "void/auto"}, RIVALS[1]),
    judge=judge_grokking,
    figure=draw_grokking,
)
def grokking(arm: Arm, seed: int, effort: Effort) -> Figures:
    """Steps to 99 % of the training, validation and test pairs."""
    splits = dict(zip(("train", "validation", "test"), pairs(seed), strict=True))
    torch.manual_seed(seed)
    model = Net()
    steps = effort.steps(STEPS)
    trainer = Trainer(arm["rule"], model.parameters(), steps, rate=arm.get("rate"), weight_decay=DECAY)
    trainer.cosine = False  # the paper's explanation of the plateau is that the rate has decayed
    reached: dict[str, int] = {}
    history: list[list[float]] = []
    x, y = splits["train"]
    try:
        for step in range(1, steps + 1):
            trainer.step(F.cross_entropy(model(x), y))
            if step % EVERY:
                continue
            right = {name: _accuracy(model, *split) for name, split in splits.items()}
            history.append([step, right["train"], right["test"]])
            for name, share in right.items():
                if share >= 0.99:
                    reached.setdefault(name, step)
            if len(reached) == len(splits):
                break
    except Diverged:
        reached = {}
    figures: Figures = {name: reached.get(name, STEPS) for name in splits}
    rest = range(len(history) * EVERY + EVERY, STEPS + 1, EVERY)  # what has been learned is taken to stay so
    history += [[step, *history[-1][1:]] for step in rest if reached]
    kept = [point for point in history if point[0] % (5 * EVERY) == 0]
    return figures | {
        "learned": "test" in reached,
        "accuracy": history[-1][2] if history else 0.0,
        "training curve": [[step, round(train, 4)] for step, train, _ in kept],
        "test curve": [[step, round(test, 4)] for step, _, test in kept],
    }


@torch.no_grad()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).float().mean())
