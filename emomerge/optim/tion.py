"""EmoTion: the first moment, mixed by the freshness of the gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from emomerge.optim.base import Group, State
from emomerge.optim.geometry import WRefOptimizer, geom_relation


class EmoTion(WRefOptimizer):
    """W ← W(1−λη) − η·sign(m), where m takes in the more of G the fresher it is (paper 6.2–6.4).

    `geometry="exact"`: ρ̄ ← 0.9ρ̄ + 0.1ρ; m ← β₁m + (1−β₁)(1−ρ̄)G.
    `geometry="l1"`: q = |ΔL1|/L1; freshness = clamp(q/0.03, 1−β₁, 1); a = (1−β₁)·freshness; m ← (1−a)m + aG.

    State: one tensor of the parameter's shape and a scalar (arguments as in `WRefOptimizer`).
    """

    change = math.inf
    """q, the relative change of Σ|W| since the last step (`l1`); infinite at the first."""

    def init_state(self, w: Tensor, group: Group) -> State:
        """Momentum, and the mean of ρ, which is −1 until the first ρ."""
        return {"m": torch.zeros_like(w), "rho": w.new_full((), -1.0)}

    def prepare(self) -> None:
        """q of this step."""
        if any(group["geometry"] == "l1" for group in self.param_groups):
            head = self.param_groups[0]
            before, now = head["l1"], self.measure_l1()
            self.change = abs(now - before) / (before + 1e-8) if before else math.inf
            head["l1"] = now

    def update(self, w: Tensor, g: Tensor, state: State, rate: float, group: Group) -> None:
        """Momentum by freshness, weight decay, step by the sign."""
        beta1 = group["betas"][0]
        m, mean = state["m"], state["rho"]
        if group["geometry"] == "exact":
            rho = geom_relation(w, g, group["eps"])
            mean.copy_(torch.where(mean < 0, rho, 0.9 * mean + 0.1 * rho))
            m.mul_(beta1).addcmul_(g, 1 - mean, value=1 - beta1)
        else:
            freshness = min(max(self.change / 0.03, 1 - beta1), 1.0)
            m.lerp_(g, (1 - beta1) * freshness)
        w.mul_(1 - rate * group["weight_decay"])
        w.sub_(m.sign(), alpha=rate)
