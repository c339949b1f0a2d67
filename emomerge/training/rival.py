"""The optimizer everybody else would have used: AdamW whose rate falls along a cosine, the rival in the controls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from emomerge.errors import NonFiniteLossError


class AdamWCosine(torch.optim.AdamW):
    """torch's AdamW with η_t = η·(1 + cos(π·t/T))/2, t = 0 … T − 1, in the shape of an emo optimizer: it observes losses.

    Args:
        parameters: what is trained.
        lr: the peak rate η.
        steps: the budget T.
        weight_decay: decoupled (Loshchilov & Hutter 2019).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float, steps: int, weight_decay: float = 0.01) -> None:
        super().__init__(list(parameters), lr=lr, weight_decay=weight_decay)
        self.param_groups[0] |= {"peak": lr, "budget": steps, "taken": 0}
        self._losses: list[Tensor] = []

    def observe(self, loss: Tensor) -> None:
        """A micro-batch's loss, which decides nothing but whether the step is taken."""
        self._losses.append(loss.detach())

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step.

        Raises:
            NonFiniteLossError: an observed loss is NaN or infinite; weights and state are as they were.
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
        """Itself: what an emo optimizer's pulse tells a log, this one tells too."""
        return self

    def figures(self) -> dict[str, Any]:
        """What a log wants to know of the last step."""
        return {"rate": self.param_groups[0]["lr"]}
