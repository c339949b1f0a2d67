"""Claims about low precision: weights and gradients of 16 bits, and of 8 to 1 by simulation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from claims_charts import estimate_row, points
from claims_core import Arm, Effort, Figures, Units, Verdict, claim, counted, interval_text, worded
from claims_small import PIXELS, named, pooled
from claims_training import NAMES, OURS, PUBLISHED, Diverged, Rows, Trainer, batches, emo_arms, rule_title
from evidence_tables import Estimate
from torch import Tensor, nn

FORMATS = ("fp32", "bf16", "fp16", "8 bit", "4 bit", "2 bit", "1 bit")
STOCHASTIC = "bf16, stochastic"
"""bf16 with `stochastic_rounding`, which only emomerge's optimizers have."""
LOW = ("8 bit", "4 bit", "2 bit", "1 bit")
STEPS = 250
TUNED: tuple[Arm, ...] = tuple(
    {"rule": rule, "rate": rate} for rule, rates in {"adamw": (3e-3, 1e-2), "lion": (3e-4, 1e-3)}.items()
    for rate in rates
)  # fmt: skip


def quantized(values: Tensor, bits: int) -> Tensor:
    """Round to at most 2^bits − 1 levels around 0, or to two with one bit.

    The unit is that of Esser et al. (2020), 2·mean|w|/√top, or max|w|/top where this is smaller.
    """
    sizes = values.abs()
    if bits == 1:
        return torch.where(values < 0, -1.0, 1.0) * sizes.mean()
    top = 2 ** (bits - 1) - 1
    unit = torch.minimum(2 * sizes.mean() / math.sqrt(top), sizes.max() / top) + 1e-12
    return (values / unit).round().clamp(-top, top) * unit


class Quantized(nn.Module):
    """An MLP whose matrices are rounded in the forward pass; their gradients pass through the rounding to the fp32 weights.

    Args:
        bits: of every matrix, and of every gradient after the backward pass.
    """

    def __init__(self, network: nn.Sequential, bits: int) -> None:
        super().__init__()
        self.network, self.bits = network, bits

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.network:
            if isinstance(layer, nn.Linear):
                w = layer.weight
                x = F.linear(x, w + (quantized(w.detach(), self.bits) - w.detach()), layer.bias)
            else:
                x = layer(x)
        return x

    def round_gradients(self) -> None:
        """Round every gradient, as if that were all that arrived."""
        for p in self.parameters():
            if p.grad is not None:
                p.grad.copy_(quantized(p.grad, self.bits))


def network(form: str) -> tuple[nn.Module, torch.dtype]:
    """Return a network in a format, and the dtype of its inputs."""
    model = nn.Sequential(nn.Linear(PIXELS, 64), nn.ReLU(), nn.Linear(64, 10))
    if form.endswith("bit"):
        return Quantized(model, int(form.split()[0])), torch.float32
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(form, torch.bfloat16)
    return model.to(dtype), dtype


def worse(units: Units, rule: Arm, form: str) -> Estimate:
    """Return log(test loss ÷ that of the same rule in fp32), by seed."""
    low, full = ({u.seed: u.figures["test"] for u in units.of(**rule, format=f)} for f in (form, "fp32"))
    return Estimate(tuple(math.inf if low[seed] is None else math.log(low[seed] / full[seed]) for seed in sorted(low)))


def more(first: Sequence[Estimate], second: Sequence[Estimate]) -> Estimate:
    """Return the paired difference of two means over formats."""
    means = [[sum(values) / len(values) for values in zip(*(e.values for e in side), strict=True)] for side in (first, second)]
    return Estimate(tuple(a - b for a, b in zip(*means, strict=True)))


def stable(units: Units, rule: Arm, forms: Sequence[str] = FORMATS) -> list[bool]:
    """Return for each format whether the loss stayed finite with every seed and fell below that before training."""
    return [all((u.figures["test"] or math.inf) < u.figures["start"] for u in units.of(**rule, format=f)) for f in forms]


def best_rivals(units: Units) -> dict[str, Arm]:
    """Return AdamW and Lion at the rate that is best in fp32."""
    return {
        rule: min(
            (arm for arm in TUNED if arm["rule"] == rule),
            key=lambda arm: units.estimate("validation", **arm, format="fp32").mean,
        )
        for rule in ("adamw", "lion")
    }


def judge_precision(units: Units) -> Verdict:
    rivals = best_rivals(units)
    columns = [*FORMATS[:2], STOCHASTIC, *FORMATS[2:]]
    rows = [["optimizer", *columns, "8 to 1 bit ÷ fp32", "less than AdamW", "less than Lion"]]
    rules = [*emo_arms(PUBLISHED, OURS), *rivals.values()]
    beats: dict[str, list[int]] = {}
    for rule in rules:
        own = [worse(units, rule, form) for form in LOW]
        against = {name: more(own, [worse(units, arm, form) for form in LOW]) for name, arm in rivals.items()}
        beats[rule["rule"]] = [against["adamw"].sign, against["lion"].sign]
        ratio = math.exp(sum(e.mean for e in own) / len(own))
        answers = ["–" if rule == rivals[name] else _answer(against[name].sign) for name in rivals]
        rows.append([
            named(rule), *(_text(units, {**rule, "format": form}) for form in columns), f"{ratio:.3f}", *answers,
        ])  # fmt: skip
    published = [arm["rule"] for arm in emo_arms(PUBLISHED)]
    steady = [all(stable(units, {"rule": rule})) for rule in published]
    failed = [f"{NAMES[name]} in {form}" for name, arm in rivals.items()
              for form, fine in zip(FORMATS, stable(units, arm), strict=True) if not fine]  # fmt: skip
    ours = units.best("validation", [{**arm, "format": "1 bit"} for arm in emo_arms(OURS)])
    one = {name: units.paired("test", ours, {**arm, "format": "1 bit"}) for name, arm in rivals.items()}
    half = {form: [math.exp(worse(units, {"rule": rule}, form).mean) for rule in published] for form in ("bf16", STOCHASTIC)}
    text = (
        f"Training is stable in every format with {counted(steady)} published optimizers "
        f"({', '.join(failed) + ' is not' if failed else 'so it is with AdamW and Lion'}). From 8 to 1 bit they lose "
        f"less than AdamW in {counted(beats[rule][0] < 0 for rule in published)} cases and less than Lion, a rule of signs "
        f"without emoPulse, in {counted(beats[rule][1] < 0 for rule in published)}. With weights stored in bf16 they stall: "
        f"the loss is {min(half['bf16']):.1f} to {max(half['bf16']):.1f} times that in fp32, as steps are smaller than the "
        f"spacing of the weights; with `stochastic_rounding` it is {min(half[STOCHASTIC]):.2f} to {max(half[STOCHASTIC]):.2f} "
        f"times. With one bit the best of `{OURS}`, {rule_title(ours['rule'])}, has a test loss of "
        f"{units.estimate('test', **ours).text()}; minus AdamW's {interval_text(one['adamw'])}, minus Lion's "
        f"{interval_text(one['lion'])}."
    )
    parts = [all(steady), *(all(beats[rule][k] < 0 for rule in published) for k in (0, 1))]
    return Verdict(
        worded(parts), text, rows,
        f"Test loss on FashionMNIST at 14 × 14 pixels, MLP 196-64-10, batches of 64, {STEPS} steps. bf16 and fp16: weights and "
        "gradients are stored so, without loss scaling. 8 to 1 bit: weights rounded in the forward pass, gradients before the "
        "step, tensor by tensor; the fp32 weights behind them take the steps. “Less than”: whether the mean log ratio to fp32 "
        "over 8 to 1 bit is smaller by more than its interval. AdamW and Lion at the better of two rates in fp32 by "
        "validation loss.",
    )  # fmt: skip


def _text(units: Units, arm: Arm) -> str:
    return units.estimate("test", **arm).text() if units.of(**arm) else "–"


def _answer(sign: int) -> str:
    return {-1: "yes", 0: "cannot be told", 1: "no, more"}[sign]


def draw_precision(units: Units) -> Any:
    rows = []
    for rule in [*emo_arms(PUBLISHED, OURS), *best_rivals(units).values()]:
        rows += [estimate_row(rule["rule"], worse(units, rule, form), panel=form) for form in FORMATS[1:]]
    return points(
        [{**row, **{key: math.exp(row[key]) for key in ("mean", "low", "high")}} for row in rows],
        "Weights stored in bf16 stall the published rates; at 2 bits and 1 bit Lion, and EmoCats with auto, lose least",
        "test loss ÷ fp32", facet="panel", columns=3, rule=1.0, width=210,
        order=FORMATS[1:], sort=list(dict.fromkeys(row["name"] for row in rows)),
    )  # fmt: skip


@claim(
    name="precision",
    says="emoPulse proceeds safely and stably with ultra-low precision and ultra-quantization, down to one bit.",
    source="README, “Features in v3.7 and later”; paper, chapters 1 and 5",
    control="AdamW and Lion at the rates that are best in fp32, in the same formats. Three parts: no published optimizer fails "
    "in any format; all five lose less of their fp32 loss than AdamW; all five lose less than Lion, which has the sign but not "
    "emoPulse. The claim holds with all three.",
    taught="Stability at few bits comes from the bounded step, which AdamW and Lion have as well. Weights in bf16 need "
    "`stochastic_rounding=True` at published rates; `auto` takes steps that are large enough.",
    arms=(
        *({**arm, "format": form} for arm in (*emo_arms(PUBLISHED, OURS), *TUNED) for form in FORMATS),
        *({**arm, "format": STOCHASTIC} for arm in emo_arms(PUBLISHED, OURS)),
    ),
    quick_arms=({"rule": "sens/v3.8", "format": "fp16"}, {"rule": "void/auto", "format": "1 bit"},
                {"rule": "adamw", "rate": 1e-3, "format": "bf16"}),
    judge=judge_precision,
    figure=draw_precision,
)  # fmt: skip
def precision(arm: Arm, seed: int, effort: Effort) -> Figures:
    """Loss before and after a training in a format."""
    train, validation, test = pooled(effort)
    torch.manual_seed(seed)
    model, dtype = network(arm["format"])
    options = {"stochastic_rounding": True} if arm["format"] == STOCHASTIC else {}
    trainer = Trainer(arm["rule"], model.parameters(), effort.steps(STEPS), rate=arm.get("rate"), **options)
    start = _loss(model, test, dtype)
    try:
        for batch in batches(len(train), 64, trainer.steps, seed):
            loss = F.cross_entropy(model(train.x[batch].to(dtype)).float(), train.y[batch])
            if not math.isfinite(float(loss.detach())):
                raise Diverged
            trainer.optimizer.zero_grad()
            loss.backward()
            if isinstance(model, Quantized):
                model.round_gradients()
            trainer.update(loss)
    except Diverged:
        return {"start": start, "validation": None, "test": None}
    trainer.finish()
    return {"start": start, "validation": _loss(model, validation, dtype), "test": _loss(model, test, dtype)}


@torch.no_grad()
def _loss(model: nn.Module, rows: Rows, dtype: torch.dtype) -> float | None:
    value = float(F.cross_entropy(model(rows.x.to(dtype)).float(), rows.y))
    return value if math.isfinite(value) else None
