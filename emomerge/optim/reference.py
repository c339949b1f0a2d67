"""Reference implementation of the five rules as the paper states them: one tensor at a time, nothing in place, slow.

Tests compare the optimizers with it. Notation: w weights, g gradient, eta the learning rate of the step (emoPulse), s the state
before the step (empty at first), o the hyperparameters; each rule returns the new weights and the new state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]


@dataclass(frozen=True)
class Hyperparameters:
    """Hyperparameters, named like the arguments of the optimizers."""

    beta1: float = 0.9
    beta2: float = 0.995
    eps: float = 1e-8
    weight_decay: float = 0.01
    sign: bool = True
    """EmoAiry: step by the sign of u."""
    geometry: str = "exact"
    """EmoTion, EmoVoid."""
    l1_change: float | None = None
    """EmoTion, `l1`: q = |L1_t − L1_{t−1}| / (L1_{t−1} + 1e-8), L1 = Σ|W| over all parameters; None at the first step."""
    l1_scale: float = 1.0
    """EmoVoid, `l1`: L1_ref / (L1_t + 1e-8) in steps that hold Σ|W|."""


def rho(w: Tensor, g: Tensor, eps: float) -> Tensor:
    """ρ = |⟨W, G⟩| / (‖W‖·‖G‖ + eps) (paper 6.1)."""
    relation: Tensor = (w * g).sum().abs() / (w.norm() * g.norm() + eps)
    return relation


def shadow(w: Tensor, slow: Tensor, sigma: float, trust: float) -> tuple[Tensor, Tensor]:
    """Return weights and shadow before the update, with `use_shadow` (paper, chapter 4)."""
    if abs(sigma) > 0.625:
        ratio = 1 - abs(sigma)
        return w * (1 - ratio) + abs(trust) * slow, slow
    return w, slow + 0.1 * abs(trust) * (w - slow)


def sens(w: Tensor, g: Tensor, s: State, eta: float, o: Hyperparameters) -> tuple[Tensor, State]:
    """Adam type: two moments without bias correction (paper, chapter 4)."""
    m = o.beta1 * s.get("m", 0) + (1 - o.beta1) * g
    v = o.beta2 * s.get("v", 0) + (1 - o.beta2) * g**2
    return w * (1 - o.weight_decay * eta) - eta * m / (v.sqrt() + o.eps), {"m": m, "v": v}


def airy(w: Tensor, g: Tensor, s: State, eta: float, o: Hyperparameters) -> tuple[Tensor, State]:
    """Adafactor type: a second moment factored into rows and columns (paper, chapter 5)."""

    def average(name: str, square: Tensor) -> Tensor:
        mean: Tensor = o.beta2 * s.get(name, 0) + (1 - o.beta2) * square
        return mean

    if w.dim() < 2:
        state = {"v": average("v", g**2)}
        second = state["v"]
    else:
        across = tuple(range(1, w.dim()))
        state = {"r": average("r", (g**2).mean(across, keepdim=True)), "c": average("c", (g**2).mean(0, keepdim=True))}
        second = state["r"] * state["c"]
    u = g / (second.sqrt() + o.eps)
    return w * (1 - o.weight_decay * eta) - eta * (u.sign() if o.sign else u), state


def cats(w: Tensor, g: Tensor, s: State, eta: float, o: Hyperparameters) -> tuple[Tensor, State]:
    """Lion type: the sign of a blend of momentum and gradient (paper, chapter 5)."""
    m = s.get("m", torch.zeros_like(g))
    new = w * (1 - o.weight_decay * eta) - eta * (o.beta1 * m + (1 - o.beta1) * g).sign()
    return new, {"m": o.beta2 * m + (1 - o.beta2) * g}


def tion(w: Tensor, g: Tensor, s: State, eta: float, o: Hyperparameters) -> tuple[Tensor, State]:
    """The sign of a first moment that weights each gradient by its freshness (paper 6.2; `l1`: 6.4)."""
    m = s.get("m", torch.zeros_like(g))
    state: State = {}
    if o.geometry == "l1":
        fresh = 1.0 if o.l1_change is None else min(max(o.l1_change / 0.03, 1 - o.beta1), 1.0)
        a = (1 - o.beta1) * fresh
        m = (1 - a) * m + a * g
    else:
        now = rho(w, g, o.eps)
        state["rho"] = 0.9 * s["rho"] + 0.1 * now if "rho" in s else now
        m = o.beta1 * m + (1 - o.beta1) * (1 - state["rho"]) * g
    return w * (1 - o.weight_decay * eta) - eta * m.sign(), {**state, "m": m}


def void(w: Tensor, g: Tensor, s: State, eta: float, o: Hyperparameters) -> tuple[Tensor, State]:
    """No moments, no decay: a sign step, shortened where the gradient is parallel to the weights (paper 6.3; `l1`: 6.4)."""
    if o.geometry == "l1":
        return w * o.l1_scale - eta * g.sign(), {}
    return w - eta * (1 - rho(w, g, o.eps)) * g.sign(), {}


Rule = Callable[[Tensor, Tensor, State, float, Hyperparameters], tuple[Tensor, State]]

REFERENCE: Mapping[str, Rule] = MappingProxyType({"sens": sens, "airy": airy, "cats": cats, "tion": tion, "void": void})
"""The rules by the names of `OPTIMIZERS`."""
