"""EmoTion: the first moment, mixed by the freshness of the gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from emomerge.optim import native
from emomerge.optim.base import Group, Rate, descend
from emomerge.optim.batches import Lists, State, Tensors, wide, wide_zeros
from emomerge.optim.geometry import WRefOptimizer, geom_relations


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
        return {"m": wide_zeros(w), "rho": torch.full((), -1.0, dtype=wide(w.dtype), device=w.device)}

    def prepare(self, *surveyed: float) -> None:
        """q of this step."""
        for now in surveyed:
            head = self.param_groups[0]
            before = head["l1"]
            self.change = abs(now - before) / (before + 1e-8) if before else math.inf
            head["l1"] = now

    def measure(self, w: Tensors, g: Tensors, state: Lists, group: Group) -> Lists:
        """1 − ρ̄ of each tensor."""
        if group["geometry"] == "l1":
            return {}
        rho, mean = geom_relations(w, g, group["eps"]), torch.stack(state["rho"])
        mean = torch.where(mean < 0, rho, 0.9 * mean + 0.1 * rho)
        torch._foreach_copy_(state["rho"], mean.unbind())
        return {"fresh": list((1 - mean).unbind())}

    def update(self, w: Tensors, g: Tensors, state: Lists, rate: Rate, group: Group) -> None:
        """Momentum by freshness, weight decay, step by the sign."""
        weight = 1 - group["betas"][0]
        if group["geometry"] == "l1":
            weight *= min(max(self.change / 0.03, weight), 1.0)
        else:
            g = torch._foreach_mul(g, state["fresh"])
        torch._foreach_lerp_(state["m"], g, weight)
        descend(w, torch._foreach_sign(state["m"]), rate, group["weight_decay"])

    def update_native(self, w: Tensors, g: Tensors, state: Lists, rate: float, group: Group) -> bool:
        """ρ of a tensor, and then its update while it is in the cache."""
        if group["geometry"] == "l1":
            return False
        last = [group["betas"][0], group["eps"], group["weight_decay"], rate]
        native.run("tion", [[t.numel() for t in w]], [w, g, state["m"], state["rho"]], last)
        return True
