"""emoPulse as a learning-rate scheduler for any torch optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer

from emomerge.errors import BadInput
from emomerge.optim.base import EmoOptimizer
from emomerge.optim.intake import LossIntake
from emomerge.optim.pulse import EmoPulse
from emomerge.optim.size import weight_size


class EmoPulseLR(LRScheduler):
    """Sets the `lr` of every parameter group to emoPulse (paper, chapter 3).

    Args:
        optimizer: any torch optimizer with an `lr`; emo optimizers have a pulse of their own.
        preset: the version of emoPulse, a name in `PRESETS`.
        scope: emoScope, a multiplier of the rate; the `lr` of the optimizer is overwritten.
        cautious: start the pulse with N = d = 0.2.

    Raises:
        BadInput: the optimizer is an emo optimizer, the preset is unknown, or the scope is out of range.

    Example:
        >>> scheduler = EmoPulseLR(torch.optim.AdamW(model.parameters()))
        >>> loss.backward()
        >>> scheduler.step(loss)  # before optimizer.step(), so that the rate follows this loss
        >>> optimizer.step()
    """

    def __init__(self, optimizer: Optimizer, preset: str = "v3.8", scope: float = 1.0, cautious: bool = False) -> None:
        if isinstance(optimizer, EmoOptimizer):
            raise BadInput(
                "emo optimizers do not take an EmoPulseLR", found=type(optimizer).__name__, fix="use its own `pulse`"
            )
        self.optimizer = optimizer
        self.pulse = EmoPulse(preset, scope, cautious)
        if self.pulse.sized:
            self.pulse.size = float(weight_size(p for group in optimizer.param_groups for p in group["params"]))
            self.pulse.rate = self.pulse.rate_at(scope)
        self._intake = LossIntake()
        self._write_lr()

    def observe(self, loss: Tensor | float, divided: bool = False) -> None:
        """Record the loss of a micro-batch of the coming step; see `EmoOptimizer.observe`."""
        self._intake.observe(loss, divided, self._params())

    def step(self, loss: Tensor | float | None = None) -> None:
        """Set the rate of the coming optimizer step from this loss and the losses observed so far.

        Raises:
            MissingLossError: no loss was passed or observed.
            NonFiniteLossError: the loss is NaN or infinite; pulse and rate are unchanged.
        """
        if loss is not None:
            self.observe(loss)
        params = self._params()
        device = params[0].device if params else torch.device("cpu")
        self.pulse.update(float(self._intake.take(device, params)))
        self._write_lr()

    def state_dict(self) -> dict[str, Any]:
        """Return the pulse as plain numbers."""
        return self.pulse.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict()`, to continue with the same bits."""
        self.pulse.load_state_dict(state_dict)
        self._write_lr()

    def _params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _write_lr(self) -> None:
        self.last_epoch = self.pulse.steps
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # of compiled and capturable optimizers
                group["lr"].fill_(self.pulse.rate)
            else:
                group["lr"] = self.pulse.rate
        self._last_lr = [self.pulse.rate for _ in self.optimizer.param_groups]
