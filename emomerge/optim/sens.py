"""EmoSens: the Adam-type rule."""

from __future__ import annotations

import torch
from torch import Tensor

from emomerge.optim.base import EmoOptimizer, Group, State


class EmoSens(EmoOptimizer):
    """m ← β₁m + (1−β₁)G; v ← β₂v + (1−β₂)G²; W ← W(1−λη) − η·m/(√v + eps). No bias correction.

    State: two tensors of the parameter's shape (paper, chapter 4; arguments as in `EmoOptimizer`).
    """

    def init_state(self, w: Tensor, group: Group) -> State:
        """First and second moment."""
        return {"m": torch.zeros_like(w), "v": torch.zeros_like(w)}

    def update(self, w: Tensor, g: Tensor, state: State, rate: float, group: Group) -> None:
        """Both moments, weight decay, normalised step."""
        beta1, beta2 = group["betas"]
        m, v = state["m"], state["v"]
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        w.mul_(1 - rate * group["weight_decay"])
        w.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-rate)
