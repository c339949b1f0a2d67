"""A claim about inverse problems: the speed of a wave along a line, from what is measured at both ends."""

from __future__ import annotations

import contextlib
import math
from functools import lru_cache
from typing import Any

import torch
from claims_charts import curves, lines
from claims_core import Arm, Effort, Figures, Units, Verdict, claim, interval_text
from claims_small import named
from claims_training import FIVE, OURS, PUBLISHED, Diverged, Trainer, emo_arms, rule_title
from torch import Tensor, nn

from emomerge.optim import OPTIMIZERS

CELLS, SOLVES, NOISE = 40, 300, 0.02
KNOWN, HELD_OUT = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0), (2.5, 4.5)
"""Frequencies in wavelengths over the line at speed 1: measured, and kept back to choose rates by."""
VOID = f"void/{PUBLISHED}"
AS_PUBLISHED: tuple[Arm, ...] = tuple({**arm, "rate": 1.0} for arm in emo_arms(PUBLISHED))
RIVALS: tuple[Arm, ...] = (
    *({"rule": "adamw", "rate": rate} for rate in (1e-3, 3e-3, 1e-2, 3e-2)),
    *({"rule": VOID, "rate": rate} for rate in (10.0, 100.0)),
    *({"rule": "lion", "rate": rate} for rate in (1e-3, 3e-3, 1e-2)),
    {"rule": "prodigy", "rate": 1.0},
    {"rule": "l-bfgs"},
)


class Fitted(Exception):
    """The misfit is down to the noise."""


class Spent(Exception):
    """All solves are used."""


@lru_cache(maxsize=4)
def parts(frequencies: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the fixed part of the Helmholtz matrices, (F, n, n), the squared wave numbers, (F,), and the sources, (n, 2)."""
    n, step = CELLS, 1.0 / CELLS
    k = 2 * math.pi * torch.tensor(frequencies, dtype=torch.float64)
    second = torch.diag(torch.full((n,), -2.0)) + torch.diag(torch.ones(n - 1), 1) + torch.diag(torch.ones(n - 1), -1)
    matrix = (second.to(torch.complex128) / step**2).repeat(len(k), 1, 1)
    for end in (0, -1):  # waves leave at both ends: u' = ± iku, where the speed is 1
        matrix[:, end, end] = (-1 + 1j * k * step) / step**2
    source = torch.zeros(n, 2, dtype=torch.complex128)
    source[0, 0] = source[-1, 1] = 1 / step
    return matrix, k**2, source


def measured(slowness: Tensor, frequencies: tuple[float, ...]) -> Tensor:
    """Solve u'' + k²·s²·u = f for a source at each end, and return u at both ends, (F, 2, 2): one forward solve."""
    fixed, squares, source = parts(frequencies)
    matrix = fixed + torch.diag_embed(squares[:, None] * slowness.double().square()).to(torch.complex128)
    scale = squares.sqrt()[:, None, None]  # of u in the homogeneous medium
    return torch.linalg.solve(matrix, source.expand(len(squares), -1, -1))[:, [0, -1]] * scale


def medium(seed: int) -> Tensor:
    """Return the slowness 1/c of a smooth medium: three bumps of up to ±25 %, 1 at both ends."""
    generator = torch.Generator().manual_seed(500 + seed)
    x = (torch.arange(CELLS) + 0.5) / CELLS
    centers, widths, heights = torch.rand(3, 3, generator=generator)
    bumps = (0.5 * heights - 0.25) * torch.exp(-(((x[:, None] - 0.25 - 0.5 * centers) / (0.05 + 0.07 * widths)) ** 2))
    return 1 + bumps.sum(1)


def judge_wave(units: Units) -> Verdict:
    best = {rule: units.best("held out", [arm for arm in RIVALS if arm["rule"] == rule]) for rule in ("adamw", "lion")}
    rivals: dict[str, Arm] = {**best, "prodigy": RIVALS[-2], "l-bfgs": RIVALS[-1]}
    raised = [arm for arm in RIVALS if arm["rule"] == VOID]
    rows = [
        [
            "optimizer",
            "error of the speed",
            "÷ that of the start",
            "misfit ÷ noise",
            "solves",
            "error − AdamW's",
            "error − L-BFGS's",
        ]
    ]
    for arm in [*AS_PUBLISHED, *raised, *emo_arms(OURS), *rivals.values()]:
        against = [
            "–" if arm == rivals[name] else interval_text(units.paired("error", arm, rivals[name]), "+.4f")
            for name in ("adamw", "l-bfgs")
        ]
        error = units.estimate("error", **arm)
        rows.append([
            _title(arm), error.text(".4f"), f"{error.mean / units.estimate('start', **arm).mean:.2f}",
            f"{units.estimate('misfit', **arm).mean:,.2f}", f"{units.estimate('solves', **arm).mean:.0f}", *against,
        ])  # fmt: skip
    void: Arm = {"rule": VOID, "rate": 1.0}
    gaps = {name: units.paired("error", void, rivals[name]) for name in ("adamw", "l-bfgs")}
    ours = units.best("held out", emo_arms(OURS))
    text = (
        f"With {SOLVES} forward solves EmoVoid as published leaves {_share(units, void):.0f} % of the initial error of the "
        f"speed, AdamW {_share(units, rivals['adamw']):.0f} %, L-BFGS {_share(units, rivals['l-bfgs']):.0f} %; its error minus "
        f"AdamW's is {interval_text(gaps['adamw'], '+.4f')}, minus L-BFGS's {interval_text(gaps['l-bfgs'], '+.4f')}. The best "
        f"of `{OURS}`, {rule_title(ours['rule'])}, leaves {_share(units, ours):.0f} %; of the "
        f"five, {sum(units.paired('error', a, rivals['adamw']).sign < 0 for a in emo_arms(OURS))} are below AdamW by more than "
        "the interval. "
        f"L-BFGS is down to the noise after {units.estimate('solves', **rivals['l-bfgs']).mean:.0f} solves, AdamW after "
        f"{units.estimate('solves', **rivals['adamw']).mean:.0f}."
    )
    no_worse = [gap.sign <= 0 for gap in gaps.values()]
    word = "holds" if all(no_worse) else "holds in part" if any(no_worse) else "fails"
    return Verdict(
        word, text, rows,
        f"Helmholtz equation on a line of {CELLS} cells, sources and receivers at both ends, {len(KNOWN)} frequencies, "
        f"{100 * NOISE:.0f} % noise; at most {SOLVES} solves with gradient, from the homogeneous medium, until the misfit is "
        "down to the noise. Error: root mean square of the relative error of the speed. Misfit ÷ noise: 1 is a fit down to the "
        "noise. Seeds are media. Rates of AdamW and Lion are chosen by the misfit at two further frequencies.",
    )  # fmt: skip


def _share(units: Units, arm: Arm) -> float:
    """Return the error at the end in percent of that at the start."""
    return 100 * units.estimate("error", **arm).mean / units.estimate("start", **arm).mean


def _title(arm: Arm) -> str:
    if arm["rule"] == "l-bfgs":
        return "L-BFGS, strong Wolfe"
    return named(arm)


def draw_wave(units: Units) -> Any:
    adamw = units.best("held out", [arm for arm in RIVALS if arm["rule"] == "adamw"])
    rows = []
    for panel, preset in (("v3.8, as published", PUBLISHED), ("auto", OURS)):
        fixed = {"rate": 1.0} if preset == PUBLISHED else {}
        arms: list[tuple[Arm, str]] = [({"rule": f"{n}/{preset}", **fixed}, OPTIMIZERS[n].class_name) for n in FIVE]
        for arm, series in [*arms, (adamw, "AdamW"), ({"rule": "l-bfgs"}, "L-BFGS")]:
            rows += curves(Units(units.of(**arm)), "curve", range(0, SOLVES + 1, 10), series=series, panel=panel)
    return lines(
        rows, "Speed of a wave from its echoes: L-BFGS needs a seventh of AdamW's solves, EmoVoid hardly moves",
        "forward solves", "relative error of the speed", facet="panel", columns=2, limits=(0.02, 0.07), width=330,
        height=260, order=["v3.8, as published", "auto"],
    )  # fmt: skip


@claim(
    name="wave",
    says="EmoVoid has the potential to function as an analytical solver for wave scattering inverse problems.",
    source="README, first lines",
    control="AdamW and Lion at the best of several rates, Prodigy, and L-BFGS with a strong Wolfe search, which is what one "
    "would take for a problem of this size, at equal numbers of forward solves. The claim holds if the error of EmoVoid as "
    "published is not above that of AdamW nor that of L-BFGS by more than the interval; in part, if it is not above one of "
    "them.",
    taught="Nothing for the defaults. For a smooth problem with few unknowns and exact gradients, take a quasi-Newton method.",
    arms=(*AS_PUBLISHED, *emo_arms(OURS), *RIVALS),
    quick_arms=({"rule": VOID, "rate": 1.0}, {"rule": "void/auto"}, {"rule": "l-bfgs"}, {"rule": "adamw", "rate": 1e-2}),
    judge=judge_wave,
    figure=draw_wave,
    seeds=5,
)
def wave(arm: Arm, seed: int, effort: Effort) -> Figures:
    """Error of the recovered speed, misfits, and the error along the run."""
    truth, generator = medium(seed), torch.Generator().manual_seed(900 + seed)
    data, noise = {}, {}
    for name, frequencies in (("known", KNOWN), ("held out", HELD_OUT)):
        clean = measured(truth, frequencies)
        noise[name] = NOISE * float((clean - measured(torch.ones(CELLS), frequencies)).abs().square().mean().sqrt())
        data[name] = clean + noise[name] * torch.randn(clean.shape, generator=generator, dtype=torch.complex128)
    weights = nn.Parameter(torch.ones(CELLS))
    curve: list[list[float]] = []
    solves = effort.steps(SOLVES)

    def misfit(name: str = "known") -> Tensor:
        difference = measured(weights, KNOWN if name == "known" else HELD_OUT) - data[name]
        return difference.abs().square().mean() / noise[name] ** 2

    def error() -> float:
        return float((truth / weights.detach() - 1).square().mean().sqrt())

    def closure() -> Tensor:
        loss = misfit()
        if float(loss.detach()) <= 1:
            raise Fitted
        curve.append([len(curve), error()])
        return loss

    start = error()
    try:
        with contextlib.suppress(Fitted):
            _solve(arm, weights, closure, curve, solves)
    except Diverged:
        return {"start": start, "error": None, "held out": None, "misfit": None, "solves": None, "curve": []}
    with torch.no_grad():
        return {
            "start": start, "error": error(), "held out": float(misfit("held out")), "misfit": float(misfit()),
            "solves": len(curve), "curve": [[count, round(value, 6)] for count, value in [*curve[::10], [len(curve), error()]]],
        }  # fmt: skip


def _solve(arm: Arm, weights: nn.Parameter, closure: Any, curve: list[list[float]], solves: int) -> None:
    """Minimize with a number of forward solves."""
    if arm["rule"] != "l-bfgs":
        trainer = Trainer(arm["rule"], [weights], solves, rate=arm.get("rate"), weight_decay=0.0)
        for _ in range(solves):
            trainer.step(closure())
        trainer.finish()
        return
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=solves, max_eval=solves, history_size=10, tolerance_grad=0.0, tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip
    best: tuple[float, Tensor] = (math.inf, weights.detach().clone())

    def evaluate() -> Tensor:
        nonlocal best
        if len(curve) >= solves:
            raise Spent
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        if float(loss.detach()) < best[0]:
            best = float(loss.detach()), weights.detach().clone()
        return loss

    with contextlib.suppress(Spent):
        optimizer.step(evaluate)
    with torch.no_grad():
        weights.copy_(best[1])
