"""EmoAiry: the Adafactor-type rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from emomerge.optim.base import EmoOptimizer, Group, State


class EmoAiry(EmoOptimizer):
    """r ← β₂r + (1−β₂)·mean₁…(G²); c ← β₂c + (1−β₂)·mean₀(G²); u = G/(√(r·c) + eps); W ← W(1−λη) − η·sign(u).

    r averages over all dimensions but the first, c over the first. Parameters of one dimension or none keep v, the EMA
    of G², instead: u = G/(√v + eps). State: far below one tensor of the parameter's size (paper, chapter 5).

    Args:
        sign: False steps by u itself instead of its sign.
        options: as in `EmoOptimizer`.
    """

    def __init__(self, params: ParamsT, lr: float = 1.0, *, sign: bool = True, **options: Any) -> None:
        super().__init__(params, lr, **options)
        self.add_default("sign", sign)

    def init_state(self, w: Tensor, group: Group) -> State:
        """Factors of the second moment, or the second moment itself."""
        if w.dim() < 2:
            return {"v": torch.zeros_like(w)}
        return {"r": w.new_zeros(w.shape[:1] + (1,) * (w.dim() - 1)), "c": w.new_zeros((1, *w.shape[1:]))}

    def update(self, w: Tensor, g: Tensor, state: State, rate: float, group: Group) -> None:
        """Second moment, weight decay, step by the sign."""
        weight = 1 - group["betas"][1]
        square = g.square()
        if w.dim() < 2:
            second = state["v"].lerp_(square, weight)
        else:
            r = state["r"].lerp_(square.mean(tuple(range(1, w.dim())), keepdim=True), weight)
            c = state["c"].lerp_(square.mean(0, keepdim=True), weight)
            second = torch.mul(r, c, out=square)
        u = g / second.sqrt().add_(group["eps"])
        w.mul_(1 - rate * group["weight_decay"])
        w.sub_(u.sign_() if group["sign"] else u, alpha=rate)
