"""EmoCats: the Lion-type rule."""

from __future__ import annotations

import torch
from torch import Tensor

from emomerge.optim.base import EmoOptimizer, Group, State


class EmoCats(EmoOptimizer):
    """W ← W(1−λη) − η·sign(β₁m + (1−β₁)G); m ← β₂m + (1−β₂)G.

    State: one tensor of the parameter's shape (paper, chapter 5; arguments as in `EmoOptimizer`).
    """

    def init_state(self, w: Tensor, group: Group) -> State:
        """Momentum."""
        return {"m": torch.zeros_like(w)}

    def update(self, w: Tensor, g: Tensor, state: State, rate: float, group: Group) -> None:
        """Weight decay, step by the sign of a blend of momentum and gradient, momentum."""
        beta1, beta2 = group["betas"]
        m = state["m"]
        w.mul_(1 - rate * group["weight_decay"])
        w.sub_(m.lerp(g, 1 - beta1).sign_(), alpha=rate)
        m.lerp_(g, 1 - beta2)
