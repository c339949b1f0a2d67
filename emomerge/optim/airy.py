"""EmoAiry: the Adafactor-type rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from emomerge.optim import native
from emomerge.optim.base import EmoOptimizer
from emomerge.optim.batches import Lists, State, Tensors, reduced, to_wide, wide_zeros
from emomerge.optim.rule import Group, Rate, descend


class EmoAiry(EmoOptimizer):
    """r ← β₂r + (1−β₂)·mean₁…(G²); c ← β₂c + (1−β₂)·mean₀(G²); u = G/(√(r·c) + eps); W ← W(1−λη) − η·sign(u).

    r averages over all dimensions but the first, c over the first. Parameters of at most one dimension keep v, the EMA of G²,
    instead: u = G/(√v + eps). State: much smaller than the parameter (paper, chapter 5).

    Args:
        sign: step by the sign of u, which is that of G; if False, by u itself.
        options: those of `EmoOptimizer`.
    """

    def __init__(self, params: ParamsT, lr: float = 1.0, *, sign: bool = True, **options: Any) -> None:
        super().__init__(params, lr, **options)
        self.add_default("sign", sign)

    def init_state(self, w: Tensor, group: Group) -> State:
        """Return the factors of the second moment, or the second moment itself."""
        if w.dim() < 2:
            return {"v": wide_zeros(w)}
        rows, columns = _factors(wide_zeros(w))
        return {"r": rows, "c": columns}

    def measure(self, w: Tensors, g: Tensors, state: Lists, group: Group) -> Lists:
        """Update the second moment; with `sign` the step does not depend on it."""
        weight = 1 - group["betas"][1]
        squares = [t.square() for t in to_wide(g)]
        if "v" in state:
            torch._foreach_lerp_(state["v"], squares, weight)
            return {"second": state["v"]}
        for square, r, c in zip(squares, state["r"], state["c"], strict=True):
            rows, columns = _factors(square)
            r.lerp_(rows, weight)
            c.lerp_(columns, weight)
        return {} if group["sign"] else {"second": torch._foreach_mul(state["r"], state["c"])}

    def update(self, w: Tensors, g: Tensors, state: Lists, rate: Rate, group: Group) -> None:
        """Apply weight decay and step by the sign of G, or by u."""
        if group["sign"]:
            u = torch._foreach_sign(g)
        else:
            root = torch._foreach_sqrt(state["second"])
            torch._foreach_add_(root, group["eps"])
            u = torch._foreach_div(g, root)
        descend(w, u, rate, group["weight_decay"])

    def update_native(self, w: Tensors, g: Tensors, state: Lists, rate: float, group: Group) -> bool:
        """Do everything in one pass."""
        if not group["sign"]:
            return False
        last = [group["betas"][1], group["weight_decay"], rate]
        if "v" in state:
            native.run("airy_1d", [[t.numel() for t in w]], [w, g, state["v"]], last)
        else:
            rows = [t.shape[0] for t in w]
            columns = [t.numel() // t.shape[0] for t in w]
            native.run("airy", [rows, columns], [w, g, state["r"], state["c"]], last)
        return True


def _factors(square: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means over all dimensions but the first, and over the first."""
    return _mean(square, tuple(range(1, square.dim()))), _mean(square, (0,))


def _mean(t: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return the mean over `dims`, which are kept with size 1; 0 for an empty tensor."""
    total = reduced(t.sum(dims, keepdim=True))
    return total / max(t.numel() // max(total.numel(), 1), 1)
