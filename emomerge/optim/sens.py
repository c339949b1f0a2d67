"""EmoSens: the Adam-type rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emomerge.optim.base import EmoOptimizer
from emomerge.optim.batches import Lists, State, Tensors, wide_zeros
from emomerge.optim.rule import Group, Rate, descend

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Devices for which torch has a fused AdamW."""
LATE = 1e12
"""A step number at which Adam's bias correction, 1 − βˢ, is 1."""


class EmoSens(EmoOptimizer):
    """m ← β₁m + (1−β₁)G; v ← β₂v + (1−β₂)G²; W ← W(1−λη) − η·m/(√v + eps). No bias correction.

    State: two tensors of the parameter's shape (paper, chapter 4). Arguments: those of `EmoOptimizer`.
    """

    one_pass = True

    def init_state(self, w: Tensor, group: Group) -> State:
        """Return the first and second moment."""
        return {"m": wide_zeros(w), "v": wide_zeros(w)}

    def update(self, w: Tensors, g: Tensors, state: Lists, rate: Rate, group: Group) -> None:
        """Update both moments, apply weight decay and take the normalised step."""
        beta1, beta2 = group["betas"]
        m, v = state["m"], state["v"]
        if _fused(w, g, m, v, rate, group):
            return
        torch._foreach_lerp_(m, g, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, value=1 - beta2)
        root = torch._foreach_sqrt(v)
        torch._foreach_add_(root, group["eps"])
        descend(w, torch._foreach_div(m, root), rate, group["weight_decay"])


def _fused(w: Tensors, g: Tensors, m: Tensors, v: Tensors, rate: Rate, group: Group) -> bool:
    """Do the update by torch's fused AdamW, which at a late step is this rule. Return False if it cannot do it."""
    kernel = getattr(torch, "_fused_adamw_", None)  # private: a later torch may lack it
    device = w[0].device
    if kernel is None or device.type not in FUSED_DEVICES:
        return False
    if isinstance(rate, Tensor) and w[0].dtype != torch.float32:  # the kernel takes a float32 tensor as the rate
        return False
    numels = list(map(Tensor.numel, w))  # the kernel pairs elements by address, without checking shapes
    if not all(all(map(Tensor.is_contiguous, ts)) and list(map(Tensor.numel, ts)) == numels for ts in (w, g, m, v)):
        return False
    beta1, beta2 = group["betas"]
    late = torch.full((), LATE, device=device)
    lr: Any = rate.to(device, torch.float32) if isinstance(rate, Tensor) else rate
    kernel(
        w, g, m, v, [], [late] * len(w),
        lr=lr, beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
    )  # fmt: skip
    return True
