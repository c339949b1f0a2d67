"""Weight averaging within a run: EMA, or LAWA (Kaddour 2022; Izmailov et al. 2018 without its schedule)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from emomerge.checkpoints import working_dtype
from emomerge.recipe import Ema, Lawa
from emomerge.training.sharded import shard_like


class WeightAverage:
    """θ̄ ← θ̄ + w·(θ − θ̄) after every step: w = 1/n (LAWA), or (1 − d)/(1 − dⁿ) (EMA without bias) at the n-th term.

    All floating-point tensors are averaged, including running means of layers. A LoRA adapter is averaged factor by factor:
    mean(B)·mean(A) keeps the rank and PEFT's form, while the mean of B·A would need the sum of all ranks. The two differ by the
    covariance of B and A over the averaged steps, which is small if both move little.

    Args:
        how: the recipe's `runs.average`.
        learnt: the tensors to average, by name.
        start, end: first and last step of the round in which the average is taken.
    """

    def __init__(self, how: Ema | Lawa, learnt: Mapping[str, Tensor], start: int, end: int) -> None:
        self._how = how
        self._learnt = {name: tensor for name, tensor in learnt.items() if tensor.is_floating_point()}
        self._before = start if how.kind == "ema" else end - max(1, round((end - start) * how.last))
        self.tensors: dict[str, Tensor] = {}
        """θ̄ by name, in float32 or wider; empty before the first term."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore θ̄ from a checkpoint."""
        self.tensors = {
            name: shard_like(tensors[name].to(tensor.device), tensor)
            for name, tensor in self._learnt.items()
            if name in tensors
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after a step, counted from 1 over the whole run."""
        terms = step - self._before
        if terms < 1:
            return
        weights = [tensor.to(working_dtype(tensor.dtype)) for tensor in self._learnt.values()]
        if terms == 1:
            self.tensors = {name: tensor.clone() for name, tensor in zip(self._learnt, weights, strict=True)}
            return
        weight = (1 - self._how.decay) / (1 - self._how.decay**terms) if self._how.kind == "ema" else 1 / terms
        torch._foreach_lerp_(list(self.tensors.values()), weights, weight)
