"""The interface of an update rule, and the loop that runs it over the tensors of a step."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from emomerge.optim.batches import Batch, Lists, State, Tensors, block_size, to_wide, wide

Group = dict[str, Any]
"""A parameter group: parameters and their hyper-parameters."""
Rate = float | Tensor
"""η: a number, or a tensor of one element with `capturable`."""
Write = Callable[[Tensors, Tensors], None]
"""Rounds updated values (second argument) into half-precision weights (first argument)."""


class Rule:
    """An update rule. Subclasses implement `init_state` and `update`, and what else they need of the rest."""

    one_pass = False
    """Whether `update` reads each tensor only once, so that cutting it into blocks that fit the cache gains nothing."""

    @abstractmethod
    def init_state(self, w: Tensor, group: Group) -> State:
        """Return the state tensors of one parameter by name, in the dtype of the arithmetic (`wide`)."""

    @abstractmethod
    def update(self, w: Tensors, g: Tensors, state: Lists, rate: Rate, group: Group) -> None:
        """Apply the formula elementwise, changing weights and state in place.

        Args:
            w: weights in the dtype of the arithmetic: whole tensors, or one block of a large tensor.
            g: their gradients; read only.
            state: lists of state tensors by name, from `init_state` and `measure`. Those of the parameter's shape are cut into
                blocks like the weights.
            rate: η.
            group: the hyper-parameters.
        """

    def update_native(self, w: Tensors, g: Tensors, state: Lists, rate: float, group: Group) -> bool:
        """Do the whole step by a kernel of kernels.c. Return False, changing nothing, if there is none for these options."""
        return False

    def measure(self, w: Tensors, g: Tensors, state: Lists, group: Group) -> Lists:
        """Compute what `update` needs from whole tensors (norms, means). Return it as further lists by name."""
        return {}

    def apply(self, batch: Batch, rate: Rate, group: Group, write: Write) -> None:
        """Update the weights and state of a batch: by a compiled kernel if there is one, otherwise block by block."""
        if batch.native and isinstance(rate, float) and self.update_native(batch.w, batch.g, batch.state, rate, group):
            return
        whole = self.one_pass and batch.w[0].dtype == wide(batch.w[0].dtype)
        limit = sys.maxsize if whole else block_size(batch.w[0].device)
        for part in batch.parts(limit):
            part.state |= self.measure(part.w, part.g, part.state, group)
            part = part.local()
            for block in part.blocks(limit):
                w, g = to_wide(block.w), to_wide(block.g)
                self.update(w, g, block.state, rate, group)
                if w is not block.w:
                    write(block.w, w)


def descend(w: Tensors, u: Tensors, rate: Rate, decay: float) -> None:
    """W ← W(1 − λη) − η·u."""
    if isinstance(rate, Tensor):
        rate = rate.to(w[0].device, w[0].dtype)
        torch._foreach_mul_(w, 1 - rate * decay)
        torch._foreach_sub_(w, torch._foreach_mul(u, rate))
        return
    if decay:
        torch._foreach_mul_(w, 1 - rate * decay)
    torch._foreach_add_(w, u, alpha=-rate)


def blend_with_shadow(w: Tensors, shadow: Tensors, sigma: float, trust: float) -> None:
    """Pull weights towards their shadow if the loss jumps (|σ| > 0.625), else let the shadow follow (paper, chapter 4)."""
    if abs(sigma) > 0.625:
        torch._foreach_mul_(w, abs(sigma))
        torch._foreach_add_(w, shadow, alpha=abs(trust))
    else:
        torch._foreach_lerp_(shadow, w, 0.1 * abs(trust))
