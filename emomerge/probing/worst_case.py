"""Worst-case sharpness: the highest loss in a ball around the model, found by APGD, apart from the gradient's contribution.

m-sharpness (Foret et al. 2021, Andriushchenko et al. 2023): each batch has its own maximiser, so m is the number of rows in a
batch; 128 is common. The ascent is Auto-PGD (Croce and Hein 2020).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from emomerge.errors import BadInput
from emomerge.numerics.sums import inner, square_sum
from emomerge.probing import report
from emomerge.probing.perturb import Ball, Perturbable, SetWeights, Weights, normals
from emomerge.probing.registry import BACKWARD, Array, Measurement, Options, metric

Norm: TypeAlias = Literal["l2", "linf"]
RADII: Mapping[Norm, tuple[float, ...]] = {"l2": (0.5, 1.0, 2.0), "linf": (0.0005, 0.001, 0.002)}
MOMENTUM = 0.75
MIN_PROGRESS = 0.75
"""The step size is halved if fewer than this share of the steps since the last checkpoint increased the loss."""
START_NOISE = 0.1
"""Share of noise in the first step: at a minimum, or if the gradient is orthogonal to the top curvature, the gradient alone
does not lead upwards."""


def _cost(options: Options, batches: int) -> float:
    radii: int = sum(len(options["radii"][norm]) for norm in options["norms"])
    return float(BACKWARD * options["steps"] * radii * len(options["balls"]) * batches)


@metric("worst-case", preset="full", split="whole", cost=_cost, report=report.worst_case)
def worst_case(
    probe: Perturbable,
    norms: Sequence[Norm] = ("l2", "linf"),
    balls: Sequence[Ball] = ("base", "own"),
    radii: Mapping[Norm, Sequence[float]] = RADII,
    steps: int = 20,
) -> Measurement:
    """Measure max L(θ + T⊙u) − L(θ) over ‖u‖ ≤ ρ in ℓ2 and ℓ∞ balls, standard (T: the base's RMS) and adaptive (T = |w|).

    Away from a minimum most of the rise is the slope ρ‖T⊙∇L‖*, which says nothing about flatness: `gradient` is this part,
    `excess` the rest. Nothing is divided by T, so a zero weight stays zero in the adaptive ball. Like any ascent, it finds a
    lower bound. Cost: `steps` · radii · batches forward and backward passes for each norm and ball, and those of
    `Perturbable.center_losses`. Memory: six copies of the perturbed parameters.

    Args:
        probe: the model; each of its batches holds m rows.
        norms: norms of the balls.
        balls: units of the balls.
        radii: ρ by norm, in the ball's units: for ℓ2 of all weights together, for ℓ∞ of each weight.
        steps: number of ascent steps.

    Returns:
        values (norms, balls, radii, units): the rise of each group of rows at its batch's maximiser, in nats; the summary by
        norm, ball and radius.

    Raises:
        BadInput: weights in half precision.
    """
    for name, parameter in probe.parameters.items():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise BadInput(
                "an ascent's steps are below what the weights' dtype resolves", where=f"parameter {name}",
                expected="float32", found=parameter.dtype, fix="load the model in float32",
            )  # fmt: skip
    weight = probe.unit_weights()
    values, summary = [], {}
    with probe.weight_setter(in_place=True) as set_weights:
        for norm in norms:
            for ball in balls:
                found = [_by_batch(probe, set_weights, norm, ball, radius, steps) for radius in radii[norm]]
                values.append([np.concatenate([row["rise"] for row in rows]) for rows in found])
                name = norm if ball == "base" else f"adaptive {norm}"
                summary[name] = {f"{r:g}": _summary(rows, weight, r) for r, rows in zip(radii[norm], found, strict=True)}
    shape = (len(norms), len(balls), -1, len(weight))
    return Measurement(np.array(values).reshape(shape), summary, weight)


def _by_batch(
    probe: Perturbable, set_weights: SetWeights, norm: Norm, ball: Ball, radius: float, steps: int
) -> list[dict[str, Any]]:
    rows = []
    for batch in range(len(probe.batches)):

        def evaluate(batch: int = batch) -> dict[str, Any]:
            return _Ascent(probe, set_weights, norm, ball, radius, batch).run(steps)

        name = f"worst-case {norm} {ball} {steps}"
        rows.append(probe.ledger.ask(evaluate, **probe.ledger_key(name, radius, None, batch)))
    return rows


def _summary(rows: Sequence[Mapping[str, Any]], weight: Array, radius: float) -> dict[str, Any]:
    """Return weighted means over batches of the rise, of the slope ρ‖g‖ and of the rest."""
    of_units = [np.full(len(row["rise"]), row["gradient"]) for row in rows]
    rise, gradient = float(np.concatenate([row["rise"] for row in rows]) @ weight), float(np.concatenate(of_units) @ weight)
    if not math.isfinite(rise):
        return {"rise": None, "gradient": _finite(gradient), "excess": None, "finding": f"diverged at radius {radius:g}"}
    return {"rise": rise, "gradient": gradient, "excess": rise - gradient}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass
class _Point:
    """A point of the ascent: u, the loss there, overall and by group, and T⊙∇L."""

    u: dict[str, Tensor]
    loss: float
    groups: Array
    gradient: dict[str, Tensor]


@dataclass
class _Ascent:
    """Auto-PGD on one batch."""

    probe: Perturbable
    set_weights: SetWeights
    norm: Norm
    ball: Ball
    radius: float
    batch: int

    def run(self, steps: int) -> dict[str, Any]:
        """Return the rise of every group at the highest point found, and ρ‖T⊙∇L‖*, the rise of the tangent."""
        checkpoints = _checkpoints(steps)
        start = best = self.at({name: torch.zeros_like(self.probe.center[name]) for name in self.probe.units(self.ball)})
        slope = self.radius * self.dual(start.gradient)
        size, last, since, rises, was = 2 * self.radius, 0, start.u, 0, (0.0, start.loss)
        here = start
        for step in range(1, steps):
            before, here = here, self.at(self.next(here, since, size, first=step == 1))
            since = before.u
            if not math.isfinite(here.loss):
                return {"rise": [here.loss] * len(start.groups), "gradient": slope}
            rises += here.loss > before.loss
            best = max(best, here, key=lambda point: point.loss)
            if step in checkpoints:
                stuck = was == (size, best.loss)
                was = (size, best.loss)
                if rises < MIN_PROGRESS * (step - last) or stuck:
                    size, here, since = size / 2, best, best.u
                last, rises = step, 0
        return {"rise": (best.groups - start.groups).tolist(), "gradient": slope}

    def at(self, u: Weights) -> _Point:
        units, center = self.probe.units(self.ball), self.probe.center
        with torch.no_grad():
            self.set_weights({name: center[name] + units[name] * x for name, x in u.items()})
        parameters = {name: self.probe.parameters[name] for name in u}
        losses, weight = self.probe.loss(self.probe.model, self.probe.batches[self.batch])
        groups = losses.reshape(-1)
        weights = torch.as_tensor(weight, dtype=groups.dtype, device=groups.device).reshape(-1)
        loss = (groups * weights).sum() / weights.sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        self.probe.on_passes(BACKWARD)
        scaled = {
            name: torch.zeros_like(u[name]) if gradient is None else units[name] * gradient
            for name, gradient in zip(parameters, gradients, strict=True)
        }
        return _Point(dict(u), float(loss.detach()), groups.detach().cpu().double().numpy(), scaled)

    def next(self, here: _Point, since: Weights, size: float, *, first: bool) -> dict[str, Tensor]:
        step = self.steepest(here.gradient)
        if first:
            noise = self.steepest({name: normals(self.probe.seed, -1, name, g) for name, g in here.gradient.items()})
            step = {name: x + START_NOISE * noise[name] for name, x in step.items()}
        ahead = self.project({name: here.u[name] + size * x for name, x in step.items()})
        if first:
            return ahead
        return self.project(
            {
                name: x + MOMENTUM * (ahead[name] - x) + (1 - MOMENTUM) * (x - since[name])
                for name, x in here.u.items()
            }
        )  # fmt: skip

    def steepest(self, gradient: Weights) -> dict[str, Tensor]:
        """Return the direction of the unit ball along which the tangent rises most; zero where the gradient is."""
        if self.norm == "linf":
            return {name: g.sign() for name, g in gradient.items()}
        norm = _l2(gradient)
        return {name: g / norm if norm else g for name, g in gradient.items()}

    def project(self, u: Weights) -> dict[str, Tensor]:
        if self.norm == "linf":
            return {name: x.clamp(-self.radius, self.radius) for name, x in u.items()}
        norm = _l2(u)
        return {name: x * (self.radius / norm) if norm > self.radius else x for name, x in u.items()}

    def dual(self, gradient: Weights) -> float:
        """Return the dual norm: ‖·‖₂ for the ℓ2 ball, ‖·‖₁ for the ℓ∞ ball."""
        if self.norm == "l2":
            return _l2(gradient)
        return sum(inner(g, g.sign()) for g in gradient.values())


def _l2(tensors: Weights) -> float:
    return math.sqrt(sum(square_sum(x) for x in tensors.values()))


def _checkpoints(steps: int) -> set[int]:
    """Return the steps after which the step size is reconsidered: at shares 0, 0.22, … whose distances shrink down to 0.06."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return {math.ceil(share * steps) for share in shares[1:] if share < 1}
