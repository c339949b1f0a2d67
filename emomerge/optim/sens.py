"""EmoSens: the Adam-type rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from emomerge.optim.base import EmoOptimizer, Group, Rate, descend
from emomerge.optim.batches import Lists, State, Tensors, wide_zeros

LATE = 1e12
"""A number of steps after which Adam's bias correction, 1 − βˢ, is 1."""


class EmoSens(EmoOptimizer):
    """m ← β₁m + (1−β₁)G; v ← β₂v + (1−β₂)G²; W ← W(1−λη) − η·m/(√v + eps). No bias correction.

    State: two tensors of the parameter's shape (paper, chapter 4; arguments as in `EmoOptimizer`).
    """

    one_pass = True

    def init_state(self, w: Tensor, group: Group) -> State:
        """First and second moment."""
        return {"m": wide_zeros(w), "v": wide_zeros(w)}

    def update(self, w: Tensors, g: Tensors, state: Lists, rate: Rate, group: Group) -> None:
        """Both moments, weight decay, normalised step: torch's fused AdamW at a late step is exactly this."""
        beta1, beta2 = group["betas"]
        m, v, decay, eps = state["m"], state["v"], group["weight_decay"], group["eps"]
        device, single = w[0].device, w[0].dtype == torch.float32
        numels = list(map(Tensor.numel, w))  # torch's kernel would pair elements by address, beyond the ends as well
        dense = all(all(map(Tensor.is_contiguous, ts)) and list(map(Tensor.numel, ts)) == numels for ts in (w, g, m, v))
        exact = single or isinstance(rate, float)  # it takes a tensor for a float32 rate
        if dense and exact and device.type in _get_fused_kernels_supported_devices():
            late = torch.full((), LATE, device=device)
            lr: Any = rate.to(device, torch.float32) if isinstance(rate, Tensor) else rate
            torch._fused_adamw_(
                w, g, m, v, [], [late] * len(w),
                lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay, eps=eps, amsgrad=False, maximize=False,
            )  # fmt: skip
            return
        torch._foreach_lerp_(m, g, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, value=1 - beta2)
        root = torch._foreach_sqrt(v)
        torch._foreach_add_(root, eps)
        descend(w, torch._foreach_div(m, root), rate, decay)
