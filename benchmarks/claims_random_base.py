"""The claim about a LoRA trained on a randomly initialised base."""

from __future__ import annotations

import math
from typing import Any

import torch
from claims_core import Arm, Effort, Figures, Units, Verdict, claim, counted, interval_text, worded
from claims_generative import AUTO, Draws, Flow, Lora, add_lora, draw, flow_base, flow_loss, small_fashion, trained
from claims_training import Diverged, Trainer, batches, emo_arms, rule_title
from evidence_tables import Cells, Estimate
from torch import nn

STEPS = 1500
MARGIN = 0.05
"""The largest rise of the trained base's loss that counts as no breakdown."""
PUBLISHED = emo_arms("v3.8")
ADAMW: list[Arm] = [{"rule": "adamw", "rate": rate} for rate in (1e-3, 3e-3)]
ON_TRAINED: list[Arm] = [
    {"rule": "adamw", "rate": 1e-3, "on": "trained base"},
]
FIVE_ARMS = [{**arm, "on": "random base"} for arm in PUBLISHED]
AUTO_ARMS = [{**arm, "on": "random base"} for arm in AUTO[:1]]
ADAMW_ARMS = [{**arm, "on": "random base"} for arm in ADAMW]


def change_of(units: Units, arm: Arm, name: str, start: str = "base") -> Estimate:
    """Return a figure relative to another, minus 1, over the seeds of an arm; infinite if the run diverged."""
    values = [(unit.figures[name], unit.figures[start]) for unit in units.of(**arm)]
    return Estimate(tuple(math.inf if value is None else value / of - 1 for value, of in values))


def beyond_random(units: Units, arm: Arm) -> Estimate:
    """Return the loss with the LoRA minus that with random ones."""
    pairs = [(unit.figures["applied"], unit.figures["random"]) for unit in units.of(**arm)]
    return Estimate(tuple(math.inf if a is None or b is None else a - b for a, b in pairs))


def percent(estimate: Estimate) -> str:
    """Return a share with its interval in per cent."""
    return interval_text(Estimate(tuple(100 * value for value in estimate.values)), "+.1f")


def judge(units: Units) -> Verdict:
    best = units.best("validation", ADAMW_ARMS)
    head = ["LoRA of", "trained on", "its own base's loss", "trained base's loss, LoRA applied"]
    table: Cells = [[*head, "trained base's loss, random LoRA of the same spectra"]]
    for arm in (*FIVE_ARMS, *AUTO_ARMS, *ADAMW_ARMS, *ON_TRAINED):
        name = rule_title(arm["rule"]) + (f", rate {arm['rate']:g}" if "rate" in arm else "")
        cells = [percent(change_of(units, arm, key, start)) for key, start in
                 (("after", "before"), ("applied", "base"), ("random", "base"))]  # fmt: skip
        table.append([name, arm["on"], *cells])
    stable = [change_of(units, arm, "after", "before").sign < 0 for arm in FIVE_ARMS]
    rivals = [change_of(units, arm, "after", "before").sign < 0 for arm in ADAMW_ARMS]
    applied = [change_of(units, arm, "applied") for arm in FIVE_ARMS]
    whole = [each.mean <= MARGIN for each in applied]
    improved = [each.sign < 0 for each in applied]
    than_random = [beyond_random(units, arm).sign for arm in FIVE_ARMS]
    adamw = change_of(units, best, "applied")
    text = (
        f"{counted(stable)} with `v3.8` complete {STEPS:,} steps on a random base with a falling loss, and so do "
        f"{counted(rivals)} rates of AdamW. Applied to the trained base, the LoRAs change its loss by "
        f"{100 * min(e.mean for e in applied):+.0f} to {100 * max(e.mean for e in applied):+.0f} %; AdamW's best one by "
        f"{100 * adamw.mean:+.0f} %. {counted(whole)} stay within 5 %, and {counted(improved)} improve it. Against random "
        f"LoRAs of the same spectra, {than_random.count(-1)} are better and {than_random.count(1)} worse. A LoRA of AdamW on "
        f"the trained base itself reaches {100 * change_of(units, ON_TRAINED[0], 'applied').mean:+.0f} %."
    )
    notes = (
        "Flows of 0.3 million weights; rank 8 in every linear layer. Changes of the test loss on all ten classes in per "
        "cent, with 95 % intervals. The trained base has seen nine of them. A random LoRA has, in each matrix, the singular "
        "values of the trained one and random singular vectors; mean of three."
    )
    return Verdict(worded([all(stable), all(whole), sum(improved) > len(improved) / 2]), text, table, notes)


def figure(units: Units) -> Any:
    import altair as alt

    from emomerge.reporting.palette import LIGHT

    kinds = {"applied": "the LoRA", "random": "random LoRA, same spectra"}
    named = {rule_title(arm["rule"]).replace("`", ""): arm for arm in (*FIVE_ARMS, *AUTO_ARMS)}
    named |= {f"AdamW, {arm['rate']:g}": arm for arm in ADAMW_ARMS}
    named |= {"AdamW, 0.001, on the trained base": ON_TRAINED[-1]}
    rows = [
        {"rule": name, "kind": title, "loss": value}
        for name, arm in named.items()
        for kind, title in kinds.items()
        if math.isfinite(value := 1 + change_of(units, arm, kind).mean)
    ]
    colours = alt.Scale(domain=list(kinds.values()), range=[LIGHT["sens"], LIGHT["muted"]])
    points = alt.Chart(alt.InlineData(values=rows)).mark_point(filled=True, size=60).encode(
        x=alt.X("loss:Q", title="loss of the trained base with the LoRA, base = 1", scale=alt.Scale(type="log", nice=False)),
        y=alt.Y("rule:N", sort=list(named), title=None, axis=alt.Axis(labelLimit=260)),
        color=alt.Color("kind:N", title=None, scale=colours),
    )  # fmt: skip
    line = alt.Chart(alt.InlineData(values=[{"loss": 1}])).mark_rule(color=LIGHT["ink"], strokeDash=[4, 3]).encode(x="loss:Q")
    return (line + points).properties(
        width=480, height=330, title="What a LoRA of a random base does to the trained base", background="white"
    )


@claim(
    name="random-base",
    says="LoRA training on a randomly initialised base completes 1,500 steps without divergence; the LoRA applies to the "
    "trained base without breakdown and improves it.",
    source="paper, “The True Nature of Loss-Saturated Learning Progress”",
    control="AdamW at two rates on the same random bases; random LoRAs with the same singular values in each matrix; LoRAs "
    "trained on the trained base itself. The parts are: all five complete with a falling loss; applied, all five leave the "
    "trained base's loss within 5 %; most lower it (interval below 0). Each could have failed alone. That AdamW completes too, "
    "or that a random LoRA does no more harm, would show that a part says nothing about the optimizers.",
    taught="No default follows: a LoRA belongs to the base on which it was trained, whatever trained it.",
    arms=(*FIVE_ARMS, ADAMW_ARMS[0], *ON_TRAINED, ADAMW_ARMS[1], *AUTO_ARMS),
    quick_arms=(FIVE_ARMS[0], ADAMW_ARMS[1]),
    judge=judge,
    figure=figure,
)
def random_base(arm: Arm, seed: int, effort: Effort) -> Figures:
    """1,500 steps of 16 images of all classes, rank 8 in every linear layer."""
    data = small_fashion(effort)
    test, validation = Draws(data.test.of(slice(3000)), 1), Draws(data.validation.of(slice(2000)), 2)
    torch.manual_seed(seed)
    model: nn.Module = Flow() if arm["on"] == "random base" else flow_base(effort)
    added, generator = add_lora(model, seed), torch.Generator().manual_seed(seed)
    figures: Figures = {"before": test.loss(model), "base": test.loss(flow_base(effort))}
    trainer = Trainer(arm["rule"], trained(model), effort.steps(STEPS), arm.get("rate"))
    try:
        for batch in batches(len(data.train), 16, trainer.steps, seed):
            rows = data.train.of(batch)
            trainer.step(flow_loss(model, rows, *draw(rows.x, generator)))
    except Diverged:
        return {**figures, "after": None, "applied": None, "random": None, "validation": None}
    randoms = [test.loss(applied(effort, [_random_like(lora, generator) for lora in added])) for _ in range(3)]
    figures |= {"after": test.loss(model), "applied": test.loss(applied(effort, [lora.change() for lora in added])),
                "random": sum(randoms) / len(randoms), "validation": validation.loss(model)}  # fmt: skip
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def applied(effort: Effort, changes: list[torch.Tensor]) -> nn.Module:
    """Return the trained base with changes of its linear layers, in the order of `add_lora`."""
    model = flow_base(effort)
    layers: list[Lora] = add_lora(model, 0)
    with torch.no_grad():
        for lora, change in zip(layers, changes, strict=True):
            lora.layer.weight += change  # B is zero, so that the wrapper adds nothing
    return model


def _random_like(lora: Lora, generator: torch.Generator) -> torch.Tensor:
    """Return a matrix with the singular values of a LoRA's change and random singular vectors."""
    change = lora.change()
    values = torch.linalg.svdvals(change)
    sides = [torch.linalg.qr(torch.randn(size, len(values), generator=generator)).Q for size in change.shape]
    return sides[0] * values @ sides[1].T
