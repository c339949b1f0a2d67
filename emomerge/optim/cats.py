"""EmoCats: the Lion-type rule."""

from __future__ import annotations

import torch
from torch import Tensor

from emomerge.optim import native
from emomerge.optim.base import EmoOptimizer
from emomerge.optim.batches import Lists, State, Tensors, wide_zeros
from emomerge.optim.rule import Group, Rate, descend


class EmoCats(EmoOptimizer):
    """W ← W(1−λη) − η·sign(β₁m + (1−β₁)G); m ← β₂m + (1−β₂)G.

    State: one tensor of the parameter's shape (paper, chapter 5). Arguments: those of `EmoOptimizer`.
    """

    def init_state(self, w: Tensor, group: Group) -> State:
        """Return the momentum."""
        return {"m": wide_zeros(w)}

    def update(self, w: Tensors, g: Tensors, state: Lists, rate: Rate, group: Group) -> None:
        """Apply weight decay, step by the sign of a blend of momentum and gradient, and update the momentum."""
        beta1, beta2 = group["betas"]
        u = torch._foreach_lerp(state["m"], g, 1 - beta1)
        torch._foreach_sign_(u)
        descend(w, u, rate, group["weight_decay"])
        torch._foreach_lerp_(state["m"], g, 1 - beta2)

    def update_native(self, w: Tensors, g: Tensors, state: Lists, rate: float, group: Group) -> bool:
        """Do everything in one pass."""
        beta1, beta2 = group["betas"]
        native.run("cats", [[t.numel() for t in w]], [w, g, state["m"]], [beta1, beta2, group["weight_decay"], rate])
        return True
