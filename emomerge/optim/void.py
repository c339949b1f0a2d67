"""EmoVoid: a rule without moments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from emomerge.optim import native
from emomerge.optim.batches import Lists, State, Tensors
from emomerge.optim.geometry import geom_relations
from emomerge.optim.l1 import Geometry, L1Option
from emomerge.optim.rule import Group, Rate, descend

HOLD_STEPS = 55
"""Number of steps for which `l1` holds Σ|W|: at the start, and again when `should_stop` turns true."""


class EmoVoid(L1Option):
    """W ← W − η·(1−ρ)·sign(G) (paper 6.3). No weight decay: growth along the weights is self-limiting.

    `geometry="l1"`: W ← W·L1_ref/L1 while Σ|W| is held (paper 6.4), then W ← W − η·sign(G).

    State: none. Arguments: those of `EmoOptimizer`, of which `betas` and `weight_decay` have no effect, and `geometry`.
    """

    scale = 1.0
    """L1_ref/L1 of this step (`l1`)."""

    def __init__(self, params: ParamsT, lr: float = 1.0, *, geometry: Geometry = "exact", **options: Any) -> None:
        super().__init__(params, lr, geometry=geometry, **options)
        self.param_groups[0].setdefault("l1_hold", HOLD_STEPS)  # steps left

    def init_state(self, w: Tensor, group: Group) -> State:
        """Return nothing."""
        return {}

    def follow_l1(self, now: float) -> None:
        """Compute the factor that restores Σ|W| to its value after the last step's rescaling."""
        head = self.param_groups[0]
        before = head["l1"]
        self.scale = before / (now + 1e-8) if before and head["l1_hold"] else 1.0
        head["l1"] = now * self.scale
        head["l1_hold"] = HOLD_STEPS if self.pulse.stop_steps == 1 else max(head["l1_hold"] - 1, 0)

    def measure(self, w: Tensors, g: Tensors, state: Lists, group: Group) -> Lists:
        """Return 1 − ρ of each tensor."""
        if group["geometry"] == "l1":
            return {}
        return {"across": list((1 - geom_relations(w, g, group["eps"])).unbind())}

    def update(self, w: Tensors, g: Tensors, state: Lists, rate: Rate, group: Group) -> None:
        """Step by the sign of G, shortened by the share of G that is parallel to the weights."""
        u = torch._foreach_sign(g)
        if group["geometry"] == "l1":
            torch._foreach_mul_(w, self.scale)
        else:
            torch._foreach_mul_(u, state["across"])
        descend(w, u, rate, decay=0.0)

    def update_native(self, w: Tensors, g: Tensors, state: Lists, rate: float, group: Group) -> bool:
        """Compute ρ of a tensor, then update the tensor while it is in the cache."""
        if group["geometry"] == "l1":
            return False
        native.run("void_", [[t.numel() for t in w]], [w, g], [group["eps"], rate])
        return True
