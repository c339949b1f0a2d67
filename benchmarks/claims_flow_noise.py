"""The claim about flow matching with noise."""

from __future__ import annotations

import math
from typing import Any

import torch
from claims_core import Arm, Effort, Figures, Units, Verdict, claim, counted, worded
from claims_generative import AUTO, Draws, Flow, draw, flow_loss, small_fashion
from claims_training import Diverged, Rows, Trainer, batches, emo_arms, rule_title
from evidence_tables import Cells, Estimate

LEVELS: dict[str, tuple[float, float]] = {
    "clean": (0.0, 0.0), "gradients 1 : 8": (8.0, 0.0),
}  # fmt: skip
"""Level → noise added to the gradients, in multiples of the root mean square of each tensor's gradient, and to the targets."""
NOISY = tuple(LEVELS)[1:]
RATES = {"adamw": (1e-3, 3e-3), "lion": (3e-4, 1e-3)}
FIVE = [arm["rule"] for arm in emo_arms("v3.8")]
RULES: list[Arm] = [*emo_arms("v3.8"), *AUTO[:1]]
RULES += [{"rule": name, "rate": rate} for name, rates in RATES.items() for rate in rates]


class Read:
    """What the judge and the figure read from the units: the best rate of each rival at each level, and differences."""

    def __init__(self, units: Units) -> None:
        self.units = units

    def arm(self, rule: str, level: str, tuned_at: str = "") -> Arm:
        """Return the arm of a rule at a level, for a rival at the rate that is best by validation at `tuned_at`."""
        if rule not in RATES:
            return {"rule": rule, "level": level}
        tried: list[Arm] = [{"rule": rule, "rate": rate, "level": tuned_at or level} for rate in RATES[rule]]
        return {**self.units.best("validation", tried), "level": level}

    def loss(self, rule: str, level: str, tuned_at: str = "") -> Estimate:
        """Return the test loss."""
        return self.units.estimate("test", **self.arm(rule, level, tuned_at))

    def rise(self, rule: str, level: str, tuned_at: str = "") -> Estimate:
        """Return the test loss minus that of clean training, paired by seed."""
        return self.units.paired("test", self.arm(rule, level, tuned_at), self.arm(rule, "clean", tuned_at))

    def lower(self, rule: str, rival: str, level: str) -> bool:
        """Return whether a rule's loss is below that of a rival tuned at this level."""
        return self.units.paired("test", self.arm(rule, level), self.arm(rival, level)).sign < 0

    def tougher(self, rule: str, rival: str, level: str) -> bool:
        """Return whether a rule loses less to the noise than a rival whose rate is that of clean training."""
        pairs = zip(self.rise(rule, level).values, self.rise(rival, level, "clean").values, strict=True)
        return Estimate(tuple(a - b for a, b in pairs)).sign < 0


def judge(units: Units) -> Verdict:
    read = Read(units)
    table: Cells = [["", *LEVELS, *(f"rise, {level}" for level in NOISY)]]
    for arm in emo_arms("v3.8") + AUTO[:1]:
        rule = arm["rule"]
        table.append([rule_title(rule), *(read.loss(rule, level).text() for level in LEVELS),
                      *(f"{read.rise(rule, level).mean:+.3f}" for level in NOISY)])  # fmt: skip
    for rival in RATES:
        for tuned, where in (("", "each level"), ("clean", "clean data")):
            table.append([f"{rule_title(rival)}, rate tuned at {where}", *(read.loss(rival, x, tuned).text() for x in LEVELS),
                          *(f"{read.rise(rival, x, tuned).mean:+.3f}" for x in NOISY)])  # fmt: skip
    pairs = [(rule, level) for rule in FIVE for level in NOISY]
    lower = {rival: [read.lower(rule, rival, level) for rule, level in pairs] for rival in RATES}
    tougher = {rival: [read.tougher(rule, rival, level) for rule, level in pairs] for rival in RATES}
    failed = sum(unit.figures["test"] is None for unit in units.all if unit.arm["rule"] in FIVE)
    rivals_failed = sum(unit.figures["test"] is None for unit in units.all if unit.arm["rule"] in RATES)
    text = (
        f"With noise in the gradients of eight times their size, {counted(tougher['adamw'])} of `v3.8` lose less to it than "
        f"AdamW at the rate of clean training, and {counted(lower['adamw'])} end below AdamW tuned with the noise; against "
        f"Lion, {counted(tougher['lion'])} and {counted(lower['lion'])}. Of their runs {failed} diverged, of the rivals' "
        f"{rivals_failed}."
    )
    most = [sum(flags) > len(flags) / 2 for flags in (tougher["adamw"], lower["adamw"], lower["lion"])]
    return Verdict(
        worded(most),
        text,
        table,
        "Clean test loss of a flow of 0.3 million weights after 400 steps. Rise: it minus that of clean training.",
    )


def figure(units: Units) -> Any:
    import altair as alt

    from emomerge.reporting.palette import LIGHT

    read = Read(units)
    shown = {f"{rule.split('/')[0]}, v3.8": (rule, rule.split("/")[0]) for rule in FIVE}
    shown |= {"sens, auto": ("sens/auto", "other"), "AdamW, tuned": ("adamw", "adamw"), "Lion, tuned": ("lion", "ink")}
    rows = [
        {"rule": name, "level": level, "loss": read.loss(rule, level).mean}
        for name, (rule, _) in shown.items()
        for level in LEVELS
    ]
    colour = alt.Color("rule:N", title=None, sort=list(shown),
                       scale=alt.Scale(domain=list(shown), range=[LIGHT[c] for _, c in shown.values()]))  # fmt: skip
    base = alt.Chart(alt.InlineData(values=[row for row in rows if math.isfinite(row["loss"])])).encode(
        x=alt.X("level:N", sort=list(LEVELS), title=None, axis=alt.Axis(labelAngle=0)),
        y=alt.Y("loss:Q", title="test loss of flow matching", scale=alt.Scale(zero=False)),
        color=colour,
    )
    chart = base.mark_line(opacity=0.5) + base.mark_point(filled=True, size=55)
    return chart.properties(
        width=560,
        height=300,
        title="With noisy gradients all lose about as much; who is ahead without noise stays ahead",
        background="white",
    )


@claim(
    name="flow-noise",
    says="emoPulse overcomes flow matching's intolerance of noise.",
    source="paper, chapter 7",
    control="AdamW and Lion, each at two rates, with the same noise: tuned on clean data, as a user who does not know of the "
    "noise would have it, and tuned at each level. Lion takes signs like most of the five but has no emoPulse. “Holds” needs "
    "that most of the five lose less to the noise than AdamW tuned on clean data, end below AdamW tuned with the noise, and "
    "end below Lion tuned with it (intervals below 0); any of these alone would be “holds in part”.",
    taught="No default follows. Nothing diverges at this noise, with or without emoPulse, and all lose about as much; the "
    "published rate is far behind after 400 steps from scratch, with and without noise, and `auto` less so.",
    arms=tuple({**arm, "level": level} for level in LEVELS for arm in RULES),
    quick_arms=({"rule": "sens/v3.8", "level": "gradients 1 : 8"}, {"rule": "adamw", "rate": 1e-3, "level": "gradients 1 : 8"}),
    judge=judge,
    figure=figure,
)
def flow_noise(arm: Arm, seed: int, effort: Effort) -> Figures:
    """400 steps of 32 images from scratch."""
    data, (in_gradients, in_targets) = small_fashion(effort), LEVELS[arm["level"]]
    torch.manual_seed(seed)
    model, generator = Flow(), torch.Generator().manual_seed(seed)
    trainer = Trainer(arm["rule"], model.parameters(), effort.steps(400), arm.get("rate"))
    try:
        for batch in batches(len(data.train), 32, trainer.steps, seed):
            rows = data.train.of(batch)
            t, noise = draw(rows.x, generator)
            disturbance = in_targets * torch.randn(rows.x.shape, generator=generator)
            _step(trainer, flow_loss(model, rows, t, noise, disturbance), in_gradients, generator)
    except Diverged:
        return {"validation": None, "test": None}
    splits = {"validation": data.validation, "test": data.test.of(slice(5000))}
    found = {name: Draws(Rows(rows.x, rows.y), 7).loss(model) for name, rows in splits.items()}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def _step(trainer: Trainer, loss: torch.Tensor, noise: float, generator: torch.Generator) -> None:
    """Take a step with noise in the gradients."""
    if not math.isfinite(float(loss.detach())):
        raise Diverged
    trainer.optimizer.zero_grad()
    loss.backward()
    for parameter in trainer.parameters:
        if noise and parameter.grad is not None:
            size = parameter.grad.square().mean().sqrt()
            parameter.grad += noise * size * torch.randn(parameter.shape, generator=generator)
    trainer.update(loss)
