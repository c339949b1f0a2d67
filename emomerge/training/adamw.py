"""AdamW with cosine decay, the optimizer of the AdamW controls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from emomerge.errors import NonFiniteLossError


class AdamWCosine(torch.optim.AdamW):
    """torch's AdamW with η_t = η·(1 + cos(π·t/T))/2, t = 0 … T − 1, behind the interface of the emo optimizers.

    The fused kernel updates all parameters in one call; on a CPU, torch's default takes ten operations for each of them.

    Args:
        parameters: the parameters to train.
        lr: the peak rate η.
        steps: the step budget T.
        weight_decay: decoupled (Loshchilov & Hutter 2019).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float, steps: int, weight_decay: float = 0.01) -> None:
        trained = list(parameters)
        plain = all(type(p) in (Tensor, nn.Parameter) and p.is_floating_point() for p in trained)  # no shards of a DTensor
        super().__init__(trained, lr=lr, weight_decay=weight_decay, fused=plain or None)
        self.param_groups[0] |= {"peak": lr, "budget": steps, "taken": 0}
        self._losses: list[Tensor] = []

    def observe(self, loss: Tensor) -> None:
        """Record a micro-batch's loss, which is only checked for being finite."""
        self._losses.append(loss.detach())

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take one step.

        Raises:
            NonFiniteLossError: an observed loss is NaN or infinite; weights and state are unchanged.
        """
        losses, self._losses = self._losses, []
        if losses and not bool(torch.isfinite(torch.stack(losses)).all()):
            raise NonFiniteLossError(f"the loss is {float(torch.stack(losses).mean())}")
        clock = self.param_groups[0]
        for group in self.param_groups:
            group["lr"] = clock["peak"] * (1 + math.cos(math.pi * clock["taken"] / clock["budget"])) / 2
        result = super().step(closure)
        clock["taken"] += 1
        return result

    @property
    def pulse(self) -> AdamWCosine:
        """This optimizer, which provides the `figures` that an emo optimizer's pulse provides."""
        return self

    def figures(self) -> dict[str, Any]:
        """Return the metrics of the last step."""
        return {"rate": self.param_groups[0]["lr"]}
