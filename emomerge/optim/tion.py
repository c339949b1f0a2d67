"""EmoTion: a first moment that weights each gradient by its freshness."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from emomerge.optim import native
from emomerge.optim.batches import Lists, State, Tensors, wide, wide_zeros
from emomerge.optim.geometry import geom_relations
from emomerge.optim.l1 import L1Option
from emomerge.optim.rule import Group, Rate, descend


class EmoTion(L1Option):
    """W ← W(1−λη) − η·sign(m), where m takes in more of G the fresher it is (paper 6.2–6.4).

    `geometry="exact"`: ρ̄ ← 0.9ρ̄ + 0.1ρ; m ← β₁m + (1−β₁)(1−ρ̄)G.
    `geometry="l1"`: q = |ΔL1|/L1; freshness = clamp(q/0.03, 1−β₁, 1); a = (1−β₁)·freshness; m ← (1−a)m + aG.

    State: one tensor of the parameter's shape and a scalar. Arguments: those of `EmoOptimizer`, and `geometry`.
    """

    change = math.inf
    """q, the relative change of Σ|W| since the last step (`l1`); infinite at the first step."""

    def init_state(self, w: Tensor, group: Group) -> State:
        """Return the momentum and ρ̄, which is −1 until the first ρ."""
        return {"m": wide_zeros(w), "rho": torch.full((), -1.0, dtype=wide(w.dtype), device=w.device)}

    def follow_l1(self, now: float) -> None:
        """Compute q of this step."""
        head = self.param_groups[0]
        before = head["l1"]
        self.change = abs(now - before) / (before + 1e-8) if before else math.inf
        head["l1"] = now

    def measure(self, w: Tensors, g: Tensors, state: Lists, group: Group) -> Lists:
        """Update ρ̄ of each tensor and return 1 − ρ̄."""
        if group["geometry"] == "l1":
            return {}
        rho, mean = geom_relations(w, g, group["eps"]), torch.stack(state["rho"])
        mean = torch.where(mean < 0, rho, 0.9 * mean + 0.1 * rho)
        torch._foreach_copy_(state["rho"], mean.unbind())
        return {"fresh": list((1 - mean).unbind())}

    def update(self, w: Tensors, g: Tensors, state: Lists, rate: Rate, group: Group) -> None:
        """Update the momentum, apply weight decay and step by the sign of the momentum."""
        weight = 1 - group["betas"][0]
        if group["geometry"] == "l1":
            weight *= min(max(self.change / 0.03, weight), 1.0)
        else:
            g = torch._foreach_mul(g, state["fresh"])
        torch._foreach_lerp_(state["m"], g, weight)
        descend(w, torch._foreach_sign(state["m"]), rate, group["weight_decay"])

    def update_native(self, w: Tensors, g: Tensors, state: Lists, rate: float, group: Group) -> bool:
        """Compute ρ of a tensor, then update the tensor while it is in the cache."""
        if group["geometry"] == "l1":
            return False
        last = [group["betas"][0], group["eps"], group["weight_decay"], rate]
        native.run("tion", [[t.numel() for t in w]], [w, g, state["m"], state["rho"]], last)
        return True
